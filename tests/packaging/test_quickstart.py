"""The first of the README's two commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.deadlines import DEADLINE_SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]
SHORT = (
    "--json-key=body",
    *("--on-error", "skip"),
    *(f"curriculum.{stage}.steps=1" for stage in range(4)),
    "batch.global_size=2",
    "model.hidden_size=32",
)
# A new network namespace has the loopback interface, but down; then runs what its arguments say.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
request = struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING)
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, request)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def quickstart(
    *arguments: str | Path,
    cwd: Path = CHECKOUT,
    through: Sequence[str] = (),
    shell: str = "bash",
) -> subprocess.CompletedProcess[str]:
    """Run the script to its end; `through` is a command that runs it."""
    return subprocess.run(
        [*through, shell, CHECKOUT / "examples" / "quickstart.sh", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_it_explains_itself_in_whatever_shell(shell: str) -> None:
    result = quickstart("--help", shell=shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: bash examples/quickstart.sh" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--gpu"], "unknown flag --gpu"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([".", "nowhere.jsonl"], ".: a folder; name the .jsonl or .txt files in it"),
        (["table.csv"], "table.csv: unknown kind of text file; give .jsonl or .txt"),
        (["--json-key"], "--json-key: give a value behind it"),
        (["--on-error=ask"], "--on-error ask: give fail or skip"),
        (["run.dir=elsewhere"], "run.dir=elsewhere: run.dir and data are set by this script"),
        (["data={}"], "data={}: run.dir and data are set by this script"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_installed(
    arguments: list[str], error: str, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    result = quickstart(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"error: {error}" in result.stderr


@pytest.fixture
def corpus(tiny_texts: list[str], tmp_path: Path) -> Iterator[Path]:
    """Own text in a folder whose name has blanks and kanji; what is made of it is removed.

    The text stands under another key than `text`, and one line is broken.
    """
    if sys.prefix == sys.base_prefix:
        pytest.skip("no virtual environment is active: the script would make one")
    folder = tmp_path / "作業 場所"
    folder.mkdir()
    path = folder / "my text.jsonl"
    lines = [json.dumps({"body": text}) for text in tiny_texts]
    path.write_text("".join(f"{line}\n" for line in [*lines, "{broken"]))
    before = set((CHECKOUT / "runs").glob("quickstart-*"))
    yield path
    for made in set((CHECKOUT / "runs").glob("quickstart-*")) - before:
        shutil.rmtree(made)


def place_of(stdout: str) -> Path:
    """The folder that everything lands in."""
    (place,) = (line.split()[-1] for line in stdout.splitlines() if "lands in" in line)
    return CHECKOUT / place


def test_a_misspelt_key_is_refused_before_the_text_is_read(corpus: Path) -> None:
    result = quickstart(corpus, "curiculum.0.steps=2")
    assert result.returncode == 2
    assert "error: curiculum" in result.stderr
    assert "did you mean curriculum" in result.stderr
    assert "2/8" not in result.stdout


@pytest.mark.slow
def test_a_refused_text_names_options_that_the_script_takes(corpus: Path) -> None:
    keyless = quickstart(corpus)
    assert keyless.returncode == 2
    assert "with --json-key" in keyless.stderr
    assert "The same call, with the same input and options, goes on from there" in keyless.stderr
    broken = quickstart("--json-key", "body", corpus)
    assert broken.returncode == 2
    assert "--on-error skip" in broken.stderr
    assert place_of(keyless.stdout) != place_of(broken.stdout)


def without_network() -> tuple[str, ...]:
    """A command that runs another without a network; none where it cannot be had."""
    command = ("unshare", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK_UP)
    try:
        subprocess.run(
            [*command, "true"], check=True, capture_output=True, timeout=DEADLINE_SECONDS
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ()
    return command


@pytest.mark.slow
def test_own_text_becomes_a_model_without_a_network_and_a_second_call_reuses_it(
    corpus: Path,
) -> None:
    through = without_network()
    first = quickstart(corpus.name, *SHORT, cwd=corpus.parent, through=through)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "the right word was among the first 5 in" in first.stdout
    for name in ("loss.png", "report.html", "huggingface/model.safetensors", "run/FINISHED"):
        assert (place_of(first.stdout) / name).is_file(), name
    _, suggestions = first.stdout.split("as it stands:\n")
    for line in suggestions.splitlines():
        pasted = subprocess.run(
            [*through, "bash", "-c", line],
            cwd=corpus.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )
        assert pasted.returncode == 0, line + pasted.stderr
    assert len(suggestions.splitlines()) == 3
    again = quickstart(corpus.name, *SHORT, cwd=corpus.parent, through=through)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("stands already") == 6
    assert "token slots  " not in again.stdout.split("6/8")[0]
    if not through:
        pytest.skip("no network namespace can be made here: all held, but with a network")


@pytest.mark.faults
def test_killed_in_mid_training_it_goes_on_from_the_last_checkpoint(corpus: Path) -> None:
    keys = (*SHORT, "curriculum.0.steps=300", "checkpoint.interval=100")
    command = ["bash", CHECKOUT / "examples" / "quickstart.sh", corpus.name, *keys]
    with subprocess.Popen(
        command,
        cwd=corpus.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    ) as killed:
        deadline = threading.Timer(240, os.killpg, (killed.pid, signal.SIGKILL))
        deadline.start()
        assert killed.stdout is not None
        output = ""
        # Ends with the script's death, which is this kill or the deadline's.
        for line in killed.stdout:
            output += line
            if "saved" in line and "step_00000100" in line:
                os.killpg(killed.pid, signal.SIGKILL)
        deadline.cancel()
    assert killed.returncode == -signal.SIGKILL, output

    result = quickstart(corpus.name, *keys, cwd=corpus.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("stands already") == 4
    metrics = place_of(result.stdout) / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 304))
    assert "step_00000100" in result.stdout.split("5/8")[1].split("6/8")[0]
