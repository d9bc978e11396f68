"""`pretrain_bert.py` as people start it."""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.errors import UserError
from megatron_bert.run.directory import RunDirectory
from megatron_bert.run.metrics import read
from megatron_bert.training.main import main
from tests.deadlines import DEADLINE_SECONDS
from tests.training.runs import steps_of

CHECKOUT = Path(__file__).resolve().parents[2]
RETRIEVABERT = CHECKOUT / "examples" / "retrievabert_1.3b.yaml"
EXAMPLE = str(CHECKOUT / "examples" / "quickstart.yaml")
DRY_RUN = [sys.executable, str(CHECKOUT / "pretrain_bert.py"), "--config", EXAMPLE, "--dry-run"]

# interface.md of the project promises these to scripts.
TRAINING_KEYS = {
    "step", "stage", "seq_length", "loss", "lr", "grad_norm", "consumed_rows", "batch_hash",
    "tokens", "tokens_per_second", "step_seconds",
}  # fmt: skip


@pytest.fixture
def config_file(tiny_run: Callable[..., Config], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_run()))
    return path


def _command(config: Path, *arguments: str, ranks: int | None = None) -> list[str]:
    start = [sys.executable]
    if ranks is not None:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, str(CHECKOUT / "pretrain_bert.py"), "--config", str(config), *arguments]


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start it in a process group of its own, all of which is killed in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _run(command: Sequence[str]) -> tuple[int, str]:
    with _started(command) as process:
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        return process.returncode, output


def _read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came:\n{''.join(seen)}")


def test_the_dry_run_of_retrievabert_prints_its_size_and_what_is_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=r"tokenizer.*"):
        main(["--config", str(RETRIEVABERT), "--dry-run"])
    assert "1,301,388,032" in caplog.text
    assert "454,000" in caplog.text
    assert "187.3 B" in caplog.text


def test_a_dry_run_with_all_data_describes_it_and_trains_nothing(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert main(["--config", str(config_file), "--dry-run"]) == 0
    assert "60 documents" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("look", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    "key", ["batch.global_size=99999999999", "curriculum.0.steps=999999999999"]
)
def test_a_size_with_some_zeros_too_many_is_refused_and_leaves_no_run_directory(
    config_file: Path, tmp_path: Path, key: str, look: list[str]
) -> None:
    with pytest.raises(UserError, match=f"{key.replace('=', ' = ')}: .* use at most"):
        main(["--config", str(config_file), key, *look])
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_a_run_directory_as_training_would_and_writes_nothing(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config", str(config_file), "--dry-run"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir .* cannot be used: .*file is no folder\. Use"):
        main([*command, f"run.dir={tmp_path / 'file' / 'run'}"])
    with RunDirectory(tmp_path / "run"):
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=rf"in use by a live run \(.*process {os.getpid()}, "):
            main(command)
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to write"):
        main(command)


def test_a_dry_run_plans_for_as_many_ranks_as_the_layout_takes(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.replicate=2"]
    assert main(["--config", str(config_file), "--dry-run", *layout]) == 0
    assert "ranks       8, the fewest that the layout takes (WORLD_SIZE=N plans for" in caplog.text
    # A number of ranks that was given is taken at its word.
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"layouts of 1 rank that work: .*parallel\.pipeline=1"):
        main(["--config", str(config_file), "--dry-run", *layout])


def test_print_config_prints_what_can_be_given_again(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file), "--print-config", "optimizer.lr=3e-3"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert "lr: 0.003" in printed.read_text()
    assert main(["--config", str(printed), "--print-config"]) == 0
    assert capsys.readouterr().out == printed.read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1e-3", ["optimizer.learning_rate", "optimizer has name, lr"]),
        ("curriculum.0.seq_length=128", ["curriculum.0.seq_length", "128", "64"]),
        ("data.tokenizer=missing.model", ["missing.model"]),
        ("data.train.0.prefix=missing", ["missing", "preprocess_data.py"]),
        ("data.valid.0.prefix=missing", ["missing", "preprocess_data.py"]),
        ("model.vocab_size=256", ["model.vocab_size", "256", "512"]),
        ("parallel.tensor=3", ["parallel.tensor = 3", "use 1, 2 or 4"]),
    ],
)
def test_what_cannot_be_used_is_refused_by_the_dry_run(
    config_file: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        main(["--config", str(config_file), "--dry-run", override])
    for word in words:
        assert word in str(caught.value)


def test_ranks_that_do_not_divide_the_tokenizers_vocabulary_are_refused_by_the_dry_run(
    config_file: Path,
) -> None:
    keys = (
        "model.vocab_size=null", "model.num_attention_heads=3", "model.num_query_groups=3",
        "model.hidden_size=48", "model.ffn_hidden_size=96", "parallel.tensor=3",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        main(["--config", str(config_file), "--dry-run", *keys])
    assert (
        "parallel.tensor = 3: does not divide model.vocab_size = 512; use 1, 2, 4, 8 or 16, or "
        "start the run with model.vocab_size=768"
    ) in str(caught.value)
    assert "layouts of 3 ranks that work: parallel.tensor=1 parallel.pipeline=1" in str(
        caught.value
    )


def test_a_misspelt_key_ends_the_command_with_code_two_and_one_line(config_file: Path) -> None:
    code, output = _run(_command(config_file, "optimizer.lrr=1"))
    assert code == 2
    assert output.startswith("error: ")
    assert "optimizer.lrr" in output
    assert "optimizer.lr" in output
    assert "Traceback" not in output


def test_a_run_by_plain_python_finishes_and_leaves_what_scripts_rely_on(
    config_file: Path, tmp_path: Path
) -> None:
    code, output = _run(_command(config_file, "log.interval=4"))
    assert code == 0, output
    assert "step 12/12 · stage 2/2 (64)" in output
    run = tmp_path / "run"
    assert json.loads((run / "FINISHED").read_text())["step"] == 12
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    lines = steps_of(read(run / "metrics.jsonl"))
    assert list(lines) == list(range(1, 13))
    assert set(lines[1]) >= TRAINING_KEYS
    assert lines[12]["consumed_rows"] == 12 * 12
    assert lines[12]["tokens"] == 12 * (7 * 32 + 5 * 64)

    inspect = str(CHECKOUT / "tools" / "inspect_data.py")
    code, output = _run([sys.executable, inspect, "--config", str(config_file), "--steps", "6:9"])
    assert code == 0, output
    shown = [line.split() for line in output.splitlines() if line.startswith("step")]
    assert [(int(words[1]), words[5]) for words in shown] == [
        (step, lines[step]["batch_hash"]) for step in range(6, 10)
    ]


def test_a_second_live_run_is_refused_naming_the_first(config_file: Path) -> None:
    endless = [f"curriculum.1.steps={10**6}", "log.interval=1"]
    with _started(_command(config_file, *endless)) as first:
        _read_until(first, "step 2/")
        code, output = _run(_command(config_file))
        assert code == 2, output
        assert f"process {first.pid}" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_with_a_checkpoint_and_code_zero(
    config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    endless = [f"curriculum.1.steps={10**6}", "log.interval=1"]
    with _started(_command(config_file, *endless)) as process:
        _read_until(process, "step 9/")
        process.send_signal(number)
        process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0
    stopped = json.loads((tmp_path / "run" / "STOPPED").read_text())
    assert stopped["reason"] == f"signal {number.name}"
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step_{stopped['step']:08d}"
    assert max(steps_of(read(tmp_path / "run" / "metrics.jsonl"))) == stopped["step"]


def test_a_second_interrupt_ends_the_run_with_one_line_and_without_a_traceback(
    config_file: Path, tmp_path: Path
) -> None:
    # A step of a thousand micro-batches: both signals come within it.
    slow = ["batch.global_size=8192", "batch.micro_size=8"]
    with _started(_command(config_file, *slow)) as job:
        assert job.stdout is not None
        _read_until(job, "token slots")
        job.send_signal(signal.SIGINT)
        _read_until(job, "SIGINT: asked to stop and save after this step")
        job.send_signal(signal.SIGINT)
        rest = job.stdout.read()
        assert job.wait(DEADLINE_SECONDS) == 1
    assert rest.splitlines()[-1].startswith("error: interrupted before the step was saved")
    assert "Traceback" not in rest
    failed = json.loads((tmp_path / "run" / "FAILED").read_text())
    assert failed["error"] == "KeyboardInterrupt"
    assert "goes on from the last checkpoint" in failed["reason"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--help"], 0, "usage: pretrain_bert.py"),
        (["--config", EXAMPLE, "--print-config"], 0, "num_layers: "),
        (["--config", EXAMPLE, "foo.bar=3"], 2, "error: foo.bar = 3"),
    ],
)
def test_help_and_refusals_do_not_wait_for_torch(
    arguments: list[str], code: int, told: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is loaded')\n")
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "pretrain_bert.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr


def test_an_interrupt_while_torch_is_loaded_is_one_line_too(tmp_path: Path) -> None:
    # Where these tests run in a shell's background, interrupts are ignored from the start.
    (tmp_path / "torch.py").write_text(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    left = subprocess.run(
        DRY_RUN,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert (left.returncode, left.stdout, left.stderr) == (1, "", "error: interrupted\n")


def test_the_time_counts_what_loading_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron_bert.training.main")
    times: list[float] = []

    def load(name: str) -> Callable[..., None]:
        if name != "main":
            raise AttributeError(name)
        times.append(time.monotonic())
        return lambda _arguments, *, began: times.append(began)

    module.__dict__["__getattr__"] = load
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    with pytest.raises(SystemExit):
        runpy.run_path(str(CHECKOUT / "pretrain_bert.py"), run_name="__main__")
    loaded, began = times
    assert began < loaded


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "30"}, "30"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_openmp_is_told_before_torch_is_loaded_not_to_spin_for_long_unless_the_user_has(
    given: dict[str, str], spin_count: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(
        "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nraise SystemExit(0)\n"
    )
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run(
        DRY_RUN,
        env={**own, **given, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"{spin_count}\n"


def _exact(run: Path) -> list[tuple[Any, ...]]:
    lines = steps_of(read(run / "metrics.jsonl")).values()
    return [(line["step"], line["loss"], line["batch_hash"], line["grad_norm"]) for line in lines]


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_fails_the_job_and_the_next_job_has_the_same_bits(
    config_file: Path, tmp_path: Path
) -> None:
    uncut = tmp_path / "uncut"
    code, output = _run(_command(config_file, f"run.dir={uncut}", ranks=2))
    assert code == 0, output
    assert "all-reduce  4 MiB over 2 ranks" in output
    with _started(_command(config_file, "log.interval=1", ranks=2)) as job:
        _read_until(job, "step 8/")
        children = subprocess.run(
            ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        job.communicate(timeout=DEADLINE_SECONDS)
        assert job.returncode == 1
    assert not (tmp_path / "run" / "FINISHED").exists()
    code, output = _run(_command(config_file, ranks=2))
    assert code == 0, output
    assert "resumed from" in output
    assert _exact(tmp_path / "run") == _exact(uncut)


@pytest.mark.slow
def test_bad_data_under_torchrun_ends_all_ranks_and_names_the_reason_in_the_run_directory(
    config_file: Path, tmp_path: Path
) -> None:
    code, output = _run(_command(config_file, "data.train.0.prefix=missing", ranks=2))
    assert code == 1
    assert "error: " in output
    failed = json.loads((tmp_path / "run" / "FAILED").read_text())
    assert "missing" in failed["reason"]
