"""Megatron-LM's arguments become a configuration, and nothing of them is lost in silence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.checks import check_config
from megatron_bert.config.errors import ConfigError
from megatron_bert.config.keys import all_keys, key_at
from megatron_bert.config.load import config_dict, load_config
from megatron_bert.config.megatron.argument import Fate
from megatron_bert.config.megatron.document import render_file
from megatron_bert.config.megatron.emit_table import GUIDE_FILE, main, render
from megatron_bert.config.megatron.ranks import ranks_remarks
from megatron_bert.config.megatron.shell_arithmetic import with_results
from megatron_bert.config.megatron.shell_text import read_command
from megatron_bert.config.megatron.table import ARGUMENTS, find
from megatron_bert.config.megatron.translation import Translation, translate
from tools import translate_megatron as tool

DOCS = Path(__file__).resolve().parents[2] / "docs"

# What a run cannot do without, in the size of BERT large as Megatron-LM's example has it.
LARGE = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 "
    "--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 32 --lr 0.0001"
)
# The rest of that example's arguments, and the variables it is given.
EXAMPLE = f"""
{LARGE} --train-iters 1000000 --attention-backend auto --weight-decay 1e-2 --clip-grad 1.0 --fp16
--lr-decay-iters 990000 --lr-decay-style linear --min-lr 1.0e-5 --lr-warmup-fraction .01
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path $DATA_PATH
--vocab-file $VOCAB_FILE --split 949,50,1 --log-interval 100 --save-interval 10000
--eval-interval 1000 --save $CHECKPOINT_PATH --load $CHECKPOINT_PATH --eval-iters 10
--tensorboard-dir $LOGS
"""
# What is known of RetrievaBERT's training there.
RETRIEVABERT = """
--num-layers 48 --hidden-size 1536 --ffn-hidden-size 4096 --swiglu --num-attention-heads 24
--group-query-attention --num-query-groups 1 --max-position-embeddings 2048 --seq-length 512
--norm-epsilon 1e-12 --bert-no-binary-head --micro-batch-size 16 --global-batch-size 1024
--train-iters 192000 --lr 1.5e-4 --min-lr 1e-6 --lr-decay-style linear --lr-warmup-fraction 0.01
--bf16 --tokenizer-model llm-jp.model --data-path 0.6 ja_cc 0.4 en_refinedweb
"""


def _of(text: str) -> Translation:
    return translate(text.split())


def _short(extra: str) -> dict[str, Any]:
    return _of(f"{LARGE} --train-iters 1000 --bf16 {extra}").tree


def test_the_published_example_becomes_a_configuration_that_loads(tmp_path: Path) -> None:
    translation = _of(EXAMPLE)
    path = tmp_path / "large.yaml"
    path.write_text(render_file(translation))
    with pytest.raises(ConfigError, match=r"run\.dir = \$CHECKPOINT_PATH: .* write out"):
        load_config(path)
    by_hand = ["run.dir=runs/large", "data.train.0.prefix=data/wiki", "log.tensorboard=false"]
    config = load_config(path, by_hand)
    check_config(config, world_size=128)
    assert (config.model.num_layers, config.model.ffn_hidden_size) == (24, 2688)
    assert (config.parallel.tensor, config.parallel.pipeline) == (8, 16)
    assert config.schedule.warmup_steps == 9900
    assert config.data.held_out_fraction == pytest.approx(0.05)
    assert config.optimizer.min_lr == 1e-5
    assert config.precision.compute == "bf16"
    told = path.read_text()
    for sentence in ("# - --vocab-file $VOCAB_FILE: WordPiece", "# - data.train.0.prefix = $DATA"):
        assert sentence in told
    assert not translation.unknown


def test_retrievaberts_arguments_become_its_preset_and_learning_rate() -> None:
    tree = _of(RETRIEVABERT).tree
    assert tree["model"] == {
        "num_layers": 48, "hidden_size": 1536, "ffn_hidden_size": 4096, "num_attention_heads": 24,
        "num_query_groups": 1, "max_position_embeddings": 2048, "norm_eps": 1e-12,
        "init_std": 0.02, "hidden_dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip
    assert tree["schedule"] == {"decay": "linear", "warmup_fraction": 0.01}
    assert tree["data"]["train"] == [
        {"prefix": "ja_cc", "weight": 0.6},
        {"prefix": "en_refinedweb", "weight": 0.4},
    ]
    assert _of(RETRIEVABERT).differs == ()


@pytest.mark.parametrize(
    ("extra", "section", "expected"),
    [
        ("--data-path a b", "data",
         [{"prefix": "a", "epochs": 1.0}, {"prefix": "b", "epochs": 1.0}]),
        ("--train-data-path a --valid-data-path 1 v", "data", [{"prefix": "a"}]),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 100", "schedule",
         {"decay": "wsd", "warmup_steps": 0, "wsd_decay_fraction": 0.1}),
        ("--lr-warmup-samples 320", "schedule", {"decay": "linear", "warmup_steps": 10}),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2", "parallel",
         {"pipeline": 4, "pipeline_schedule": "interleaved", "virtual_stages": 3}),
        ("--sequence-parallel", "parallel", None),
        ("--tensor-model-parallel-size=2 --sequence-parallel", "parallel",
         {"tensor": 2, "sequence": True}),
        ("--recompute-granularity full", "recompute", "full"),
        ("--profile --profile-step-end 20", "profile", {"steps": "11:20"}),
        ("--wandb-project p --wandb-exp-name n", "log",
         {"interval": 100, "wandb": {"name": "n", "mode": "online", "project": "p"}}),
        ("--fp8-format hybrid", "precision", {"compute": "bf16", "fp8": "current"}),
        ("--optimizer muon", "mlm", {"probability": 0.15, "unit": "ngram", "max_ngram": 3}),
    ],
)  # fmt: skip
def test_arguments_that_belong_together_are_read_together(
    extra: str, section: str, expected: object
) -> None:
    found = _short(extra).get(section)
    assert (found["train"] if section == "data" else found) == expected


def test_that_tensorboards_folder_is_another_is_told() -> None:
    differs = _of(f"{LARGE} --train-iters 10 --tensorboard-dir logs/tb").differs
    assert "log.tensorboard = true: its files stand in the run directory, not in logs/tb" in differs


def test_samples_become_steps() -> None:
    assert _of(f"{LARGE} --train-samples 3200").tree["curriculum"] == [
        {"seq_length": 512, "steps": 100}
    ]


def test_what_is_not_understood_is_named() -> None:
    translation = _of(f"stray {LARGE} --train-iters 10 --clip-grads 2 --normalization RMSNorm")
    assert translation.unknown == (
        "--clip-grads 2: unknown; is it --clip-grad?",
        "stray: stands behind no argument",
    )
    assert any(line.startswith("--normalization RMSNorm:") for line in translation.lacks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-layers 2", "--hidden-size, --num-attention-heads.*add what the run had"),
        (f"{LARGE} --train-iters $STEPS", r"--train-iters \$STEPS.*--variable STEPS=VALUE"),
        (f"{LARGE} --train-iters many", "--train-iters many: not a number"),
        (f"{LARGE} --train-iters 9 --split a,b", "--split a,b: give shares"),
        (f"{LARGE} --train-iters 9 --data-path 1 a 2", "the last weight has no dataset"),
        (f"{LARGE} --train-iters 9 --seq-length 1024", "longer than model.max_position"),
        (f"{LARGE} --train-iters 9 --hidden-dropout 2", "model.hidden_dropout = 2"),
    ],
)
def test_what_cannot_become_a_configuration_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _of(arguments)


def test_every_key_of_the_table_exists_and_every_flag_stands_in_it_once() -> None:
    keys = set(all_keys())
    for entry in ARGUMENTS:
        assert bool(entry.keys) == (entry.fate is Fate.BECOMES), entry.name
        for key in entry.keys:
            path = [int(part) if part.isdigit() else part for part in key.split(".")]
            assert key in keys or key_at(path), f"{entry.name}: {key}"
        assert entry.keys or entry.note, entry.name
    flags = [flag for entry in ARGUMENTS for flag in entry.flags]
    assert sorted({flag for flag in flags if flags.count(flag) > 1}) == []


# Of every argument that becomes a key: a value, and the other arguments that it needs.
SAMPLES = {
    "--num-layers": "12", "--hidden-size": "2048", "--ffn-hidden-size": "512",
    "--num-attention-heads": "8", "--num-query-groups": "4 --group-query-attention",
    "--max-position-embeddings": "1024", "--norm-epsilon": "1e-6", "--init-method-std": "0.01",
    "--hidden-dropout": "0.3", "--attention-dropout": "0.3", "--data-path": "a",
    "--train-data-path": "a", "--valid-data-path": "a", "--split": "8,1,1 --data-path data/train",
    "--tokenizer-model": "a.model", "--padded-vocab-size": "512", "--mask-prob": "0.3",
    "--seq-length": "128", "--train-iters": "500", "--train-samples": "960",
    "--global-batch-size": "64", "--micro-batch-size": "8", "--seed": "1",
    "--deterministic-mode": "", "--optimizer": "muon", "--lr": "1e-3", "--min-lr": "1e-6",
    "--weight-decay": "0.1", "--adam-beta1": "0.8", "--adam-beta2": "0.98", "--adam-eps": "1e-6",
    "--clip-grad": "0.5", "--muon-momentum": "0.9", "--lr-decay-style": "cosine",
    "--lr-warmup-fraction": "0.1", "--lr-warmup-iters": "10", "--lr-warmup-samples": "64",
    "--lr-wsd-decay-iters": "100 --lr-decay-style WSD",
    "--lr-wsd-decay-samples": "64 --lr-decay-style WSD", "--eval-interval": "5",
    "--eval-iters": "5", "--save": "a", "--save-interval": "5", "--async-save": "",
    "--log-interval": "5", "--tensorboard-dir": "a", "--wandb-project": "p",
    "--wandb-exp-name": "n", "--profile": "", "--profile-step-start": "5 --profile",
    "--profile-step-end": "20 --profile", "--exit-duration-in-mins": "5",
    "--tensor-model-parallel-size": "2", "--pipeline-model-parallel-size": "2",
    "--num-layers-per-virtual-pipeline-stage": "6 --pipeline-model-parallel-size 2",
    "--num-virtual-stages-per-pipeline-rank": "2 --pipeline-model-parallel-size 2",
    "--sequence-parallel": "--tensor-model-parallel-size 2",
    "--data-parallel-sharding-strategy": "optim_grads_params",
    "--num-distributed-optimizer-instances": "2", "--distributed-timeout-minutes": "5",
    "--bf16": "", "--fp16": "", "--grad-reduce-in-bf16": "", "--fp8-format": "e4m3 --bf16",
    "--recompute-activations": "", "--recompute-granularity": "full",
}  # fmt: skip


def test_every_argument_with_a_key_sets_that_key() -> None:
    entries = {entry.name: entry for entry in ARGUMENTS if entry.fate is Fate.BECOMES}
    assert set(SAMPLES) == set(entries)
    for flag, sample in SAMPLES.items():
        value, context, others = sample.partition("--")
        length = "" if flag == "--train-samples" else "--train-iters 1000"
        base = f"{LARGE} {length} {context}{others}"
        with_it = translate([*base.split(), flag, *value.split()]).tree
        without = {} if not length else _of(base).tree
        changed = {key for key in entries[flag].keys if _at(with_it, key) != _at(without, key)}
        assert changed, flag


def _at(tree: Any, key: str) -> object:
    """The value of a key, of a list's first entry where the key has an N."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[0]
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def command_arguments(text: str, source: str, variables: dict[str, str]) -> list[str]:
    return read_command(text, source, variables).arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchrun x/pretrain_bert.py --a 1 \\\n  --b 'two words' > log 2>&1",
         ["--a", "1", "--b", "two words"]),
        ("A=(\n --a 1 # one\n --b\n)\npython pretrain_bert.py ${A[@]} | tee log",
         ["--a", "1", "--b"]),
        ('OPTIONS=" --a 1 \\\n --b"\nX=1 torchrun pretrain_bert.py $OPTIONS', ["--a", "1", "--b"]),
        ('N=${N:-8}\nA="--n $N"\nA+=" --m"\npretrain_bert.py $A', ["--n", "8", "--m"]),
        ("W=$(($G*2))\npretrain_bert.py --w $W --d $1/x", ["--w", "$W", "--d", "data/x"]),
        ("export A=1 B='2 3'\npretrain_bert.py --a $A --b $B", ["--a", "1", "--b", "2", "3"]),
        ("A=1 B=2 # two\npretrain_bert.py --a $A --b $B", ["--a", "1", "--b", "2"]),
        ("export A B=2 2>/dev/null; pretrain_bert.py --a $A --b $B", ["--a", "$A", "--b", "2"]),
        ("A=1 && B=2 &&\n pretrain_bert.py --a $A$B", ["--a", "12"]),
        ("cd x && A=1 && pretrain_bert.py --a $A", ["--a", "1"]),
        ("[ -z x ] && A=1\nfalse || B=1\npretrain_bert.py $A $B", ["$A", "$B"]),
        ("cat <<END >x.json\n{\"a\": 'it\nA=1 && (\nEND\npretrain_bert.py --a $A", ["--a", "$A"]),
        ("cat <<-'END'\n\tA=1\n\tEND\nB=2; pretrain_bert.py $A $B", ["$A", "2"]),
        ("sbatch <<END\nA=\\$((2*3))\ntorchrun pretrain_bert.py --a \\$A\nEND\n", ["--a", "6"]),
        ("echo '<< END'\ncat <<<END\nA=$((1<<END))\npretrain_bert.py --a", ["--a"]),
        ("D=${X:-$1}\npretrain_bert.py --d $D", ["--d", "data"]),
        ('run="python pretrain_bert.py --a"\nsrun sh -c "$run"; echo done', ["--a"]),
        ("--a 1 \\\n --b", ["--a", "1", "--b"]),
        ("if true; then\n torchrun pretrain_bert.py --a\nfi", ["--a"]),
        ("H=1\nif a; then\n H=2\nelse\n H=3\nfi\npretrain_bert.py --h $H", ["--h", "$H"]),
        ("if a; then H=2; fi\npretrain_bert.py --h $H", ["--h", "$H"]),
        ("case $X in\n a) H=2 ;;\nesac\nH=${H:-4}\npretrain_bert.py --h $H", ["--h", "$H"]),
        ("if a; then H=2; fi\nH=5\npretrain_bert.py --h $H", ["--h", "5"]),
        # Quotes.
        ('B="1 2"\npretrain_bert.py "$B" $B x"$B"y', ["1 2", "1", "2", "x1 2y"]),
        ('B=(1 "2 3")\npretrain_bert.py "${B[@]}" ${B[@]}', ["1", "2 3", "1", "2", "3"]),
        ("B=1\npretrain_bert.py '$B' \\$B \"\\$B ${X:-it's}\"", ["$B", "$B", "$B it's"]),
        ('echo "5\\" disk; x"\npretrain_bert.py --a', ["--a"]),
        ("pretrain_bert.py --w $((X * 2)) \"$((X * 2))\"", ["--w", "$((X * 2))", "$((X * 2))"]),
        ("A=\"--b 'c d'\"; eval \"pretrain_bert.py $A; echo\"", ["--b", "c d"]),
        # Groups.
        ("(cd x; case $1 in a|b) ;; esac; pretrain_bert.py --a) | tee log", ["--a"]),
        ("run() { pretrain_bert.py --a; }\nA=1", ["--a"]),
        # Here-documents that only name it, one with a quote.
        ("cat <<END\nIt's pretrain_bert.py\nEND\npretrain_bert.py --a", ["--a"]),
        ("cat <<END\npretrain_bert.py is it\n  it's\nEND\npretrain_bert.py --a", ["--a"]),
        ("cat <<END\nuse pretrain_bert.py\nEND\npretrain_bert.py --a", ["--a"]),
        ("cat >x <<END\n X=1 torchrun \\\n pretrain_bert.py --a\nEND", ["--a"]),
    ],
)  # fmt: skip
def test_a_script_is_read_as_the_shell_would(text: str, expected: list[str]) -> None:
    given = {"1": "data"} if "$1" in text else {}
    assert command_arguments(text, "x.sh", given) == expected


@pytest.mark.parametrize(
    "line",
    [
        "grep -q x f && A=2",
        "A=$(grep x f) && A=2",
        "! cd x && A=2",
        "[ -f x ] && B=1 && A=2",
        "cd x && [ -f x ] && A=2",
        "([ -f x ]) && A=2",
        "[ -f x ] && { A=2; }",
        "[ -f x ] && {\n A=2\n}",
        "x | A=2",
        "setup() {\n A=5\n}",
        "function setup\n{\n A=5\n}",
        "setup() { [ x ]; A=5; }",
        "((A++))",
        "((A = 5))",
        "let A+=3",
        "read -r A <f",
        "while read B A; do :; done",
        "unset A",
        "declare -i A=3+4",
        "A[1]=5",
        "for A in 1 2; do :; done",
        "for ((A=0; A<2; A++)); do :; done",
    ],
)
def test_a_variable_that_may_have_changed_is_unknown(line: str) -> None:
    script = f"A=1\n{line}\nC=3\npretrain_bert.py --a $A --c $C"
    assert command_arguments(script, "x.sh", {}) == ["--a", "$A", "--c", "3"]
    assert command_arguments(script, "x.sh", {"A": "9"}) == ["--a", "9", "--c", "3"]


@pytest.mark.parametrize(
    "line",
    [
        "mkdir -p x && cd x && . env.sh && A=2",
        "grep -q x f || exit 1; A=2",
        "((A > 5))\nA=2",
        "log() { echo; }; A=2",
        "(cd x; true) && true; A=2",
    ],
)
def test_a_variable_that_is_surely_assigned_is_known(line: str) -> None:
    assert command_arguments(f"A=1\n{line}\npretrain_bert.py $A", "x.sh", {}) == ["2"]


def test_a_script_of_many_lines_is_read_in_time() -> None:
    start = time.process_time()
    text = "cat <<END\n" * 10_000 + "pretrain_bert.py --a"
    assert command_arguments(text, "x.sh", {}) == ["--a"]
    # It takes a minute where each line looks through all that follow.
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("$((X * 2))", "give it: --variable X=VALUE$"),
        ("$((4 * $X / Y))", "give it: --variable X=VALUE --variable Y=VALUE$"),
        ("${X}", "give it: --variable X=VALUE$"),
        ("$(nproc)", "write the number in its place"),
        ("${X%%,*}", "write the number in its place"),
        ("$((4/0))", "write the number in its place"),
        ("2x", "give a number"),
    ],
)
def test_the_remedy_for_what_is_no_number_names_what_can_be_given(value: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        translate([*LARGE.split(), "--train-iters", value])


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("$((A*B))", "32"),
        ("$(( $A * ${B} + 2 - 1 ))", "33"),
        ("$(( (A + B) * -2 ))", "-24"),
        ("$((-7 / 2))x$((-7 % 2))", "-3x-1"),
        ("$(( $((A / 3)) % 2 ))", "1"),
        ("$(($2*2))", "6"),
        # What is not computed stays as it stands, with the numbers that are known.
        ("$((A*UNKNOWN))", "$((4*UNKNOWN))"),
        ("$((A/0))", "$((4/0))"),
        ("$((A**B))", "$((4**8))"),
        ("$((A<<1))", "$((4<<1))"),
        ("$((010))", "$((010))"),
        ("$((TEXT))", "$((TEXT))"),
        ("$((A", "$((A"),
        ("$(date)", "$(date)"),
    ],
)
def test_arithmetic_of_whole_numbers_is_computed(expression: str, result: str) -> None:
    values = {"A": "4", "B": "8", "2": "3", "TEXT": "__import__('os')"}
    assert with_results(expression, values.get) == result
    script = f'A=4 B=8 TEXT=x\nW="{expression}"\npretrain_bert.py --w $W'
    if "$2" not in expression and "$" not in result:
        assert command_arguments(script, "x.sh", {}) == ["--w", result]


def test_a_variable_that_the_script_has_not_is_refused() -> None:
    script = "B=$((A*2))\npretrain_bert.py --a $DATA_PATH --b $B"
    given = {"DATA_PATH": "a", "A": "2"}
    assert command_arguments(script, "x.sh", given) == ["--a", "a", "--b", "4"]
    message = (
        r"--variable DATAPATH=a: x.sh has no \$DATAPATH; it is given \$A, \$DATA_PATH; correct"
    )
    with pytest.raises(ConfigError, match=message):
        command_arguments(script, "x.sh", {"DATAPATH": "a"})
    # What the script sets itself may be given too: the value from outside counts.
    assert command_arguments("A=1\npretrain_bert.py --a $A", "x.sh", {"A": "2"}) == ["--a", "2"]


OPT = "--weight-decay 0.1 --clip-grad 0.5 --seed 77"
RUN = f"torchrun pretrain_bert.py {LARGE} --train-iters 10"


def _of_script(text: str, **variables: str) -> Translation:
    return translate(command_arguments(text, "x.sh", variables))


@pytest.mark.parametrize(
    "script",
    [
        f'OPT=( {OPT} )\nif a; then OPT+=( --swiglu ); fi\n{RUN} --bf16 "${{OPT[@]}}"',
        f'OPT="{OPT}"\nif a; then OPT="$OPT --swiglu"; fi\n{RUN} --num-workers 2 $OPT',
        f'OPT="{OPT}"\n[[ a ]] && OPT="$OPT --swiglu"\n{RUN} --num-workers=2 $OPT',
        f"{RUN} --bf16 $OPT",
        f"{RUN} --use-flash-attn ${{OPT}} --bf16",
        f'{RUN} --data-path a "${{OPT[@]}}"',
        f"{RUN} --data-path 0.5 a $OPT",
        f"{RUN} --of-a-fork $OPT",
        f"torchrun pretrain_bert.py $OPT {LARGE} --train-iters 10",
        # Before what is missing is told, as it may stand in it.
        "torchrun pretrain_bert.py --bf16 $OPT",
    ],
)
def test_arguments_in_an_unknown_variable_are_refused_with_a_remedy_that_works(
    script: str,
) -> None:
    message = r"\$.*OPT.*: what they hold .* give what the run had: --variable OPT='...', or ''"
    with pytest.raises(ConfigError, match=message):
        _of_script(script)
    complete = f"{OPT} {LARGE} --train-iters 10" if LARGE not in script else OPT
    tree = _of_script(script, OPT=complete).tree
    optimizer = tree["optimizer"]
    assert (tree["run"]["seed"], optimizer["weight_decay"], optimizer["clip_grad"]) == (
        77,
        0.1,
        0.5,
    )
    if LARGE in script:
        assert _of_script(script, OPT="").tree["run"]["seed"] == 1234


def test_all_unknown_variables_are_named_and_what_is_computed_is_to_be_written() -> None:
    script = f"{RUN} --bf16 $A $B/x --$C $(cat d) ${{E:+--swiglu}} $A"
    message = (
        r"\$A, \$B/x, --\$C, \$\(cat d\), \$\{E:\+--swiglu\}: what they hold .* --variable A='...' "
        r"--variable B='...' --variable C='...', or .*; written into the script in place of "
        r"\$\(cat d\), \$\{E:\+--swiglu\}$"
    )
    with pytest.raises(ConfigError, match=message):
        _of_script(script)


def test_an_unknown_variable_in_a_values_place_is_a_value() -> None:
    script = f"{RUN} --save $D --vocab-file ${{V}} --data-path 0.5 $A 0.5 $B"
    tree = _of_script(script).tree
    assert tree["run"]["dir"] == "$D"
    assert [corpus["prefix"] for corpus in tree["data"]["train"]] == ["$A", "$B"]


@pytest.mark.parametrize("own", ['"$@"', "$*", "${@:2}"])
def test_the_scripts_own_arguments_are_left_out_with_a_remark(own: str) -> None:
    translation = _of_script(f"{RUN} --seed 5 {own}")
    assert translation.tree["run"]["seed"] == 5
    (remark,) = translation.unknown
    assert remark.startswith(f"{own.strip(chr(34))}: stands for what the script itself")
    with pytest.raises(ConfigError, match=r"add what the run had for \$@, say$"):
        _of_script('pretrain_bert.py --num-layers 2 "$@"')


def test_an_array_that_is_given_is_split_as_a_script_would_and_may_be_empty() -> None:
    script = 'pretrain_bert.py --a "${A[@]}" "${B[@]}" "$C"'
    given = {"A": "'x y' z", "B": "", "C": ""}
    assert command_arguments(script, "x.sh", given) == ["--a", "x y", "z", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo pretrain_bert", "no command runs pretrain_bert.py"),
        ("pretrain_bert.py --a\npretrain_bert.py --b", "2 commands run"),
        ("pretrain_bert.py --a 'b", "close the quote"),
    ],
)
def test_a_script_that_says_no_arguments_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command_arguments(text, "x.sh", {})


def test_the_guides_table_is_the_tools() -> None:
    guide = (DOCS / GUIDE_FILE).read_text(encoding="utf-8")
    assert guide == render(guide), "run python -m megatron_bert.config.megatron.emit_table"
    with pytest.raises(ConfigError, match="markers"):
        render("no markers")


def test_the_table_is_written_whole_and_only_where_the_guide_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        main(["--docs", str(tmp_path)])
    (tmp_path / GUIDE_FILE).write_bytes((DOCS / GUIDE_FILE).read_bytes())
    assert main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / GUIDE_FILE).read_bytes() == (DOCS / GUIDE_FILE).read_bytes()


def test_a_family_does_not_hide_an_argument_of_its_own() -> None:
    assert find("--wandb-save-dir") is not find("--wandb-project")
    assert find("--nothing-of-the-kind") is None


@pytest.mark.parametrize(
    ("started", "told"),
    [
        (
            "D=(--nproc_per_node 8 --nnodes=$N --rdzv-id 'a b')\ntorchrun \"${D[@]}\"",
            [
                "Ranks of the script: 16 (2 nodes of 8). For as many, on each node:",
                "  torchrun --nproc_per_node 8 --nnodes=2 --rdzv-id 'a b' pretrain_bert.py "
                "--config x.yaml",
            ],
        ),
        (
            "python -m torch.distributed.launch --use_env --nproc_per_node=4",
            [
                "Ranks of the script: 4. For as many:",
                "  torchrun --nproc_per_node=4 pretrain_bert.py --config x.yaml",
            ],
        ),
        (
            "/opt/bin/torchrun --nproc-per-node $GPUS",
            [
                "Ranks of the script: 1 x $GPUS (nodes x ranks of each). For as many:",
                "  torchrun --nproc-per-node $GPUS pretrain_bert.py --config x.yaml",
            ],
        ),
        (
            "srun -n 8 python -u",
            [
                "Ranks of the script: as many as srun -n 8 python -u starts. For as many, on each "
                "node:",
                "  torchrun --nproc-per-node=GPUS pretrain_bert.py --config x.yaml",
            ],
        ),
    ],
)
def test_the_number_of_ranks_is_told_with_the_command_that_starts_them(
    started: str, told: list[str]
) -> None:
    command = read_command(f"N=2\n{started} pretrain_bert.py --a", "x.sh", {})
    assert list(ranks_remarks(command.starter, "x.yaml")) == told


def test_arguments_alone_say_nothing_of_ranks() -> None:
    assert list(ranks_remarks(read_command("--a 1", "x.sh", {}).starter, "x.yaml")) == []


def test_the_tool_writes_a_file_that_loads_and_says_what_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.sh"
    script.write_text(f"torchrun pretrain_bert.py {' '.join(EXAMPLE.split())}\n")
    output = tmp_path / "large.yaml"
    variables = ["--variable", "DATA_PATH=data/wiki", "--variable", "CHECKPOINT_PATH=runs/large"]
    tool.main([str(script), *variables, "--output", str(output)])
    told = capsys.readouterr().out
    assert "data.tokenizer: no --tokenizer-model was given" in told
    assert f"next: fill in what is listed, then python pretrain_bert.py --config {output}" in told
    ranks = f"torchrun pretrain_bert.py --config {output}\n"
    assert ranks in told
    assert f"#   {ranks}" in output.read_text()
    tree = config_dict(load_config(output))
    assert (tree["run"]["dir"], tree["data"]["train"][0]["prefix"]) == ("runs/large", "data/wiki")
    with pytest.raises(ConfigError, match="--overwrite"):
        tool.main([str(script), "--output", str(output)])
    tool.main(["--", *LARGE.split(), "--train-iters", "5"])
    assert "num_layers: 24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a script"),
        (["x.sh", "--", "--a"], "give either a script"),
        (["nowhere.sh"], "nowhere.sh: No such file"),
        (["x.sh", "--variable", "A"], "NAME=VALUE"),
        (["--variable", "A=1", "--", "--a"], "--variable A=1: is for a script; leave it out"),
    ],
)
def test_the_tool_refuses_what_it_cannot_read(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tool.main(arguments)
