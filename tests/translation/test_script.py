"""What is read of a text is what a shell would pass on; what only a shell knows is refused."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.config.load import load_config
from megatron_bert.errors import ConfigError
from megatron_bert.translation.script import read_arguments
from tools import translate_megatron as tool

RUN = "torchrun --nproc_per_node 8 pretrain_bert.py"
REMEDY = "let a shell do it: put echo before the command that runs pretrain_bert.py"

# In the form of Megatron-LM's examples.
USUAL = """#!/bin/bash
# Runs a model; it's small.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
WORLD_SIZE=$(($GPUS_PER_NODE*1))

CHECKPOINT_PATH=$1 #<Specify path>
DATA_PATH=$2 #<Specify path and file prefix>_text_document

if [ ! -f pretrain_bert.py ]; then echo "pretrain_bert.py isn't here"; fi
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
)
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024 # --hidden-size 2048
    --num-attention-heads 16
    --seq-length 512
    --max-position-embeddings 512
)
TRAINING_ARGS="
    --micro-batch-size 4
    --global-batch-size 32 --train-iters 1000000
    --lr 0.0001 --fp16
"
DATA_ARGS=(
    --data-path $DATA_PATH
    --split 949,50,1
)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_bert.py \\
    ${MODEL_ARGS[@]} \\
    $TRAINING_ARGS \\
    ${DATA_ARGS[@]} \\
    --save $CHECKPOINT_PATH 2>&1 | tee run.log
"""


def test_a_script_with_variables_is_refused_and_what_it_prints_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, output = tmp_path / "train.sh", tmp_path / "my.yaml"
    script.write_text(USUAL)
    line = USUAL.splitlines().index("    ${MODEL_ARGS[@]} \\") + 1
    with pytest.raises(ConfigError) as caught:
        tool.main([str(script), "--output", str(output)])
    told = str(caught.value)
    assert told.startswith(f"{script}, line {line}: only a shell knows what ${{MODEL_ARGS[@]}}")
    assert f"{REMEDY} (before torchrun, srun or python)" in told
    remedy = f"bash {script} ARGS | python tools/translate_megatron.py - --output my.yaml"
    assert told.endswith(f"then: {remedy}")
    assert not output.exists()

    script.write_text(USUAL.replace("\ntorchrun", "\necho torchrun"))
    command = ["bash", str(script), "runs/large", "data/wiki"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    monkeypatch.setattr(sys, "stdin", io.StringIO(printed.stdout))
    tool.main(["-", "--output", str(output)])
    config = load_config(output)
    assert (config.model.hidden_size, config.data.train[0].prefix) == (1024, "data/wiki")
    assert config.run.dir == "runs/large"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--a 1 \\\n --b", ["--a", "1", "--b"]),
        ("--a 1\\\n --b \\", ["--a", "1", "--b"]),
        ("# It's of March.\n--a 1 # isn't 2 \\\n\n# --b 2 \\\n--c", ["--a", "1", "--c"]),
        ("srun -n 2 python -u /m/pretrain_bert.py --a=1 --b -2", ["--a=1", "--b", "-2"]),
        (f"+ PROGRAM=pretrain_bert.py\n+ A='\n--x'\n+ {RUN} --a '$B'\nit's well", ["--a", "$B"]),
        (f"+ echo {RUN} --a\n{RUN} --a", ["--a"]),
        (f"echo 'would run {RUN} --x'\n[ -f pretrain_bert.py ] || exit\n{RUN} --a", ["--a"]),
        ('torchrun "$D"/pretrain_bert.py --a 1 # $B', ["--a", "1"]),
    ],
)  # fmt: skip
def test_arguments_stand_alone_or_behind_the_command_among_other_lines(
    text: str, expected: list[str]
) -> None:
    assert read_arguments(text, "-") == expected


def test_a_file_of_windows_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "arguments.txt"
    text = """--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 \\
    --max-position-embeddings 64 --micro-batch-size 4 \\
    --global-batch-size 32 --lr 1e-4 --train-iters 5 --save 'my runs/1'\n"""
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    tool.main([str(path)])
    assert "dir: my runs/1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        r"""--a 'x y' "x y" x\ y '' "" --b='x y' --c="it's" 'it'\''s' "a\"b" a\\b x#y # z""",
        r"""'$A' '`A`' 'a;b' 'a "b" c' '~' "*" "a;b" "{a,b}" \'a\" a"b"c 'é　x' --d=-1,2""",
        r"""'a\b' \a a\\b "a b\"c" --d""",
        # Blanks that are none for a shell.
        "1 \u3000 \xa0\f 2\u3000",
    ],
)
def test_words_are_those_of_bash(words: str) -> None:
    command = ["bash", "-c", f"printf '%s\\0' --a {words}"]
    passed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert read_arguments(f"--a {words}", "-") == passed.split("\0")[:-1]


@pytest.mark.parametrize(
    "word",
    [
        "$A", '"$A"', "${A[@]}", "$(nproc)", "`nproc`", "data/*", "a?", "[ab]", "{1,2}", "~/a", ">",
        "2>&1", "log>&2", "<<END", "|", "&", "&&", "1;", "(a)", r"\$A", "'a", "--b\\", "\\ ",
        '"a $B"', "'a'$B'c'", '"$A"\'b\'"c"', "$'a'",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["", RUN])
def test_what_only_a_shell_knows_is_refused(command: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments(f"\n{command} --a 1 \\\n  --b {word}\n--c 3", "x.sh")
    told = str(caught.value)
    assert told.startswith(f"x.sh, line 3: only a shell knows what {word.strip()} stands for")
    assert REMEDY in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stand in lines none, not in one"),
        ("echo pretrain_bert.py", "stand in lines none, not in one; leave those of one run in"),
        ("torchrun pretrain_gpt.py --a", "stand in lines none"),
        (f"{RUN} --a\n{RUN} --b", "stand in lines 1, 2, not in one"),
        (f"srun sh -c '{RUN} --a'", f"stand in lines none.*{REMEDY}"),
        (f"{RUN} --a\n--b", r"line 2: --b stands behind the command's end; put a backslash"),
        (f"{RUN} --a \\\n # --b \\\n\n --c", "line 4: --c stands behind"),
    ],
)
def test_a_text_that_is_not_one_list_of_arguments_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_arguments(text, "x.sh")
