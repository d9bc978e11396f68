"""What is read of a script is what bash passes to the program; what is not certain is refused."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from megatron_bert.config.errors import ConfigError
from megatron_bert.translation.script import Script
from megatron_bert.translation.translate import translate

RUN = "torchrun pretrain_bert.py"
REMEDY = "put echo before the command that runs pretrain_bert.py, run the script, translate what it"

# In the form of Megatron-LM's examples.
USUAL = """#!/bin/bash
# Runs a model; it's small.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NUM_NODES=1
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))

CHECKPOINT_PATH=$1 #<Specify path>
DATA_PATH=$2 #<Specify path and file prefix>_text_document
SEQ_LENGTH=512

if [ -z "$2" ]; then
    echo "give two paths"; exit 1
fi
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
)
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024 # --hidden-size 2048
    --num-attention-heads 16
    --seq-length ${SEQ_LENGTH}
    --max-position-embeddings $SEQ_LENGTH
)
TRAINING_ARGS="
    --micro-batch-size 4 \\
    --global-batch-size 32 --train-iters 1000000 \\
    --lr 0.0001 --fp16
"
DATA_ARGS=(
    --data-path $DATA_PATH
    --split 949,50,1
)
mkdir -p "$CHECKPOINT_PATH"
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_bert.py \\
    "${MODEL_ARGS[@]}" \\
    $TRAINING_ARGS \\
    ${DATA_ARGS[@]} \\
    --save $CHECKPOINT_PATH 2>&1 | tee $CHECKPOINT_PATH/$(date +%s).log
"""


def _arguments(text: str, **given: str) -> list[str]:
    names = {"first": "1", "second": "2", "own": "@"}
    return Script(text, "x.sh", {names.get(n, n): v for n, v in given.items()}).arguments()


def test_the_usual_script_is_read_once_its_own_arguments_are_given() -> None:
    line = USUAL.splitlines().index("torchrun ${DISTRIBUTED_ARGS[@]} pretrain_bert.py \\") + 1
    with pytest.raises(ConfigError) as caught:
        _arguments(USUAL)
    assert str(caught.value) == (
        f"x.sh, line {line}: arguments need $2 (set nowhere), $1 (set nowhere), whose value is not "
        f"certain; give --variable 2=VALUE --variable 1=VALUE, or {REMEDY} prints"
    )
    tree = translate(_arguments(USUAL, first="runs/large", second="0.5 a 0.5 b")).tree
    assert tree["model"]["hidden_size"] == 1024
    assert tree["curriculum"] == [{"seq_length": 512, "steps": 1000000}]
    assert [corpus["prefix"] for corpus in tree["data"]["train"]] == ["a", "b"]
    assert tree["run"]["dir"] == "runs/large"
    assert _arguments(USUAL, CHECKPOINT_PATH="c", DATA_PATH="d")[-1] == "c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--a 1 \\\n --b", ["--a", "1", "--b"]),
        ("# Of March.\n--a 1 # not 2\n\n--b 'x y'\n", ["--a", "1", "--b", "x y"]),
        ("+ /usr/bin/torchrun --nnodes 1 /m/pretrain_bert.py --a 1 --b", ["--a", "1", "--b"]),
        ("python -u pretrain_bert.py --a\r\n", ["--a"]),
        # What an argument needs not may be anything.
        (f"A=$(date)\nread B\nC=1\nif x; then C=2; fi\nfor D in 1; do :; done\n{RUN} --a", ["--a"]),
        (f'echo "Would run {RUN} $A"\n[ -f pretrain_bert.py ] || exit 1\n{RUN} --a', ["--a"]),
        (f"if [ $MODE = large ]; then\n  {RUN} --a || exit 1\nfi", ["--a"]),
        (f"(cd x; {RUN} --a)", ["--a"]),
        (f"{RUN} --a '$B' > log 2>&1 && echo done", ["--a", "$B"]),
    ],
)
def test_lists_launches_and_scripts_hold_arguments(text: str, expected: list[str]) -> None:
    assert _arguments(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        f"A=1\n{RUN} --a $A",
        f"A='1 2'\n{RUN} --a $A \"$A\" x${{A}}y",
        f'A=(1 "2 3" # four\n 5)\nB=()\n{RUN} --a ${{A[@]}} "${{A[@]}}" "${{B[@]}}"',
        f'export A=x; \nB="--b $A \\\n --c"\n{RUN} $B',
        f'A=\n{RUN} --a $A "$A"',
        f"if true; then\nB=1\nfi\nf() {{\nB=2\n}}\nA=1\n{RUN} --a $A",
        f"(true)\nfor i in 1 2; do\n true\ndone\nA=1\n{RUN} --a $A >log 2>&1",
        'D="$(cd "$(dirname "$0")" && pwd)"\nA=a:b\ntorchrun "$D"/pretrain_bert.py --a $A # $B',
    ],
)
def test_what_is_read_is_what_bash_passes(text: str, tmp_path: Path) -> None:
    assert _arguments(text) == _passed_by_bash(text, tmp_path)


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("A=2", "line 1, 2"),
        ("A+=2", "line 1, 2"),
        ("if grep -q x f; then A=2; fi", "line 1, 2"),
        ("grep -q x f && A=2", "line 1, 2"),
        ("setup() { A=2; }", "line 1, 2"),
        ("(( A++ ))", "line 1, 2"),
        ("let 'A += 2'", "line 1, 2"),
        ("read -r A", "line 1, 2"),
        ("unset A", "line 1, 2"),
        ("for A in 1 2; do :; done", "line 1, 2"),
        ("printf -v A 2", "line 1, 2"),
        ("A[1]=2", "line 1, 2"),
        (": ${A:=2}", "line 1, 2"),
        ("A=2 true", "line 1, 2"),
        # What may set any variable, or makes the script another than it looks.
        ("source env.sh", "line 1"),
        ("[ -f env.sh ] && . ./env.sh", "line 1"),
        ('eval "$X"', "line 1"),
        ("IFS=,", "line 1"),
        ("cat <<END\nA is 2\nEND", "line 1, 3"),
    ],
)
def test_a_variable_that_may_have_changed_is_refused(line: str, lines: str) -> None:
    script = f"A=1\n{line}\n{RUN} --a $A"
    _refused(script, rf"arguments need \$A \({lines}\), .* give --variable A=VALUE, or {REMEDY}")
    assert _arguments(script, A="9") == ["--a", "9"]


@pytest.mark.parametrize(
    ("script", "doubt"),
    [
        # Where nobody knows whether it is set.
        ("if x; then\nA=1\nfi", "line 2"),
        ("if x; then true; elif y; then\nA=1\nfi", "line 2"),
        ("x && \\\nif y; then\nA=1\nfi", "line 3"),
        ("for i in 1; do\nA=1\ndone", "line 2"),
        ("while x\ndo\nA=1\ndone", "line 3"),
        ("case x in\ny)\nA=1\n;;\nesac", "line 3"),
        ("case x in\n(y)\nA=1\n;;\nesac", "line 3"),
        ("f() {\nA=1\n}", "line 2"),
        ("f(){\nA=1\n}", "line 2"),
        ("(\nA=1\n)", "line 2"),
        ("x && {\nA=1\n}", "line 2"),
        ("x ||\n\nA=1", "line 3"),
        ("x |\nA=1", "line 2"),
        # What nobody knows but a shell.
        ("A=$(nproc)", "line 1"),
        ("A=`nproc`", "line 1"),
        ("A=$((2 * 3))", "line 1"),
        ("A=${B:-8}", "line 1"),
        ("A=~/data", "line 1"),
        ("A=data/*", "line 1"),
        ('A="1 $(nproc)"', "line 1"),
        ("A='\"'", "line 1"),
        ("A=(1 $(nproc))", "line 1"),
        ("true", "set nowhere"),
    ],
)
def test_a_value_that_is_not_certain_is_refused(script: str, doubt: str) -> None:
    script = f"{script}\n{RUN} --a $A"
    _refused(script, rf"x.sh, line \d: arguments need \$A \({doubt}\), .* --variable A=VALUE, or")
    assert _arguments(script, A="9") == ["--a", "9"]


def test_the_variable_that_is_not_certain_is_named_not_the_one_that_holds_it() -> None:
    _refused(f'B="--b $A"\nA=1\n{RUN} $B "$@"', r"need \$A \(line 2\), \$@ \(set nowhere\), whose")
    assert _arguments(f'B="--b $A"\n{RUN} $B "$@"', A="2", own="--c 3") == ["--b", "2", "--c", "3"]
    _refused(f"{RUN} --a $A\nA=1", r"need \$A \(line 2\)")


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ("--a $(nproc)", r"\$\(nproc\)"),
        ("--a $((2*3))", r"\$\(\(2\*3\)\)"),
        ("--a `nproc`", "`nproc`"),
        ("--a ${A:-1}", r"\$"),
        ("--a data/*", r"\*"),
        ("--a {1,2}", "{"),
        ("--a $L", r"\$L"),
        ('--a "x${L[@]}"', r"\${L\[@\]}"),
        ("--a > log --b", "end"),
        ("--a &> log --b", "end"),
        ("--a > >(tee log)", "end"),
    ],
)
def test_arguments_that_a_shell_makes_are_refused(arguments: str, piece: str) -> None:
    _refused(
        f"L=(1 2)\n{RUN} {arguments}",
        rf"x.sh, line 2: only a shell knows the arguments' {piece}; write it out, .* {REMEDY}",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo pretrain_bert", "stand in lines none, not in one; leave one in the file, or put"),
        (f"{RUN} --a\n{RUN} --b", "stand in lines 1, 2, not in one"),
        (f"srun sh -c '{RUN} --a'", "stand in lines none"),
        (f"{RUN} --a\n--b", "stand in lines 1, 2"),
        (f"{RUN} --a \\\n # --b \\\n --c", "stand in lines 1, 3"),
        ("--a 1; --b 2", "the arguments' ;"),
        ("true\npretrain_bert.py --a 'b", "line 2: a quote does not end; close it"),
    ],
)
def test_a_text_that_is_not_one_list_of_arguments_is_refused(text: str, message: str) -> None:
    _refused(text, message)


def test_a_value_that_is_given_has_to_be_of_use() -> None:
    with pytest.raises(ConfigError, match=r"--variable B=1: x.sh has no \$B; correct the name"):
        _arguments(f"A=1\n{RUN} --a $A", B="1")
    with pytest.raises(ConfigError, match=r"--variable A=\$B: not plain text; put echo before"):
        _arguments(f"{RUN} --a $A", A="$B")


def test_no_script_is_read_otherwise_than_by_bash(tmp_path: Path) -> None:
    """Scripts of random lines: whatever is not refused is what bash passes."""
    draw = random.Random(0)
    values = [
        "1", '"a b"', "'c d'", "$A", '"$B"', '"x ${A} y"', "'$A'", "${A:-9}", '"${B[@]}"',
        "${A[@]}", "$(echo 5)", '""', r"\$A", r"a\ b", "x#y", "--f", '"it\'s"', "k=v", '"p \\\n q"',
        '"$@"',
    ]  # fmt: skip
    around = [
        "{}", "{}", "{}", "{}", "if false; then\n{}\nfi", "if true; then {}\nfi", "false &&\n\n{}",
        "f() {{\n{}\n}}", "(\n{}\n)", "case 1 in\n1)\n{}\n;;\nesac", "true; {}", "A=3 true",
        "eval 'B=7'", "unset A", ": ${{A:=5}}", "echo 'x\nA=5\n'", "true # if", "f 2>&1",
    ]  # fmt: skip
    read = 0
    for _ in range(600):
        lines = []
        for _ in range(draw.randint(0, 4)):
            name, value, more = draw.choice("AB"), draw.choice(values), draw.choice(values)
            assignment = draw.choice([f"{name}={value}", f"{name}=({value}\n{more})"])
            lines.append(draw.choice(around).format(assignment))
        end = draw.choice(["", " 2>&1", " | cat", " > x --y", " # z", " || true"])
        text = "\n".join([*lines, f"{RUN} --a {' '.join(draw.choices(values, k=2))}{end}"])
        try:
            arguments = _arguments(text)
        except ConfigError:
            continue
        assert arguments == _passed_by_bash(text, tmp_path), text
        read += 1
    assert read > 50


@pytest.mark.parametrize("text", ["cat <<END\n", "A=$(\n", "if (\n", " \\\n", '"$(x ', "$("])
def test_a_script_of_many_lines_is_read_in_time(text: str) -> None:
    start = time.process_time()
    with contextlib.suppress(ConfigError):
        _arguments(text * 10_000 + f"\n{RUN} --a")
    assert time.process_time() - start < 5


def _refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _arguments(text)


def _passed_by_bash(text: str, folder: Path) -> list[str]:
    """What stands behind the program in the words that bash starts."""
    stub, out = folder / "torchrun", folder / "out"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {out}\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-c", text, "x.sh"], env=environment, cwd=folder, capture_output=True, timeout=60
    )
    words = out.read_text().split("\0")[:-1]
    return words[next(i for i, word in enumerate(words) if word.endswith("bert.py")) + 1 :]
