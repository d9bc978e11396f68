"""`tools/plan.py`: what it prints and writes can be used, and what it cannot use it refuses."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert import files
from megatron_bert.config.checks import check_config
from megatron_bert.config.load import load_config
from megatron_bert.errors import UserError
from tests.deadlines import DEADLINE_SECONDS
from tools import plan as tool
from tools.plan import main

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLE = CHECKOUT / "examples" / "retrievabert_1.3b.yaml"


def _arguments(*more: str) -> list[str]:
    return ["--config", str(EXAMPLE), "--gpus", "8", "--gpu", "h100-80gb", *more]


def test_the_written_configuration_is_the_run_with_the_best_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.yaml"
    main(_arguments("--output", str(output), "--json"))
    best = json.loads(capsys.readouterr().out)["best"][0]
    planned, given = load_config(output), load_config(EXAMPLE)
    check_config(planned, world_size=8)
    assert planned.batch.micro_tokens == best["keys"]["batch.micro_tokens"]
    assert planned.parallel.tensor == best["keys"]["parallel.tensor"]
    assert planned.parallel.layout == "manual"
    same = {"parallel", "batch", "recompute"}
    assert planned.model_dump(exclude=same) == given.model_dump(exclude=same)


def test_the_printed_keys_are_overrides_of_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(_arguments())
    out = capsys.readouterr().out
    keys = [line.strip() for line in out.split("keys to set\n")[1].splitlines() if line]
    check_config(load_config(EXAMPLE, keys), world_size=8)
    assert "8 x h100-80gb on 1 nodes of 8" in out
    assert "why not another" in out
    assert "parallel.tensor=2" in out


def test_a_plan_loads_no_torch() -> None:
    code = (
        "import sys; from tools.plan import main; "
        f"main({_arguments()!r}); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--gpu", "h1000"], ["--gpu h1000: not known", "h100-80gb", "a100-40gb"]),
        (["--gpus", "0"], ["--gpus 0", "1 or more"]),
        (["--calibrate", "here"], ["would have no effect", "plan without --calibrate here"]),
        (["--network", "wet"], ["network wet of --network", "ndr200x4"]),
        (
            ["--output", "/dev/null/at/all.yaml"],
            ["cannot write /dev/null/at/all.yaml: cannot make"],
        ),
        (["--gpus", "32", "--nodes-of", "3"], ["10 nodes of 3 and 2 GPUs more", "--gpus 30 or 33"]),
        (
            ["--gpu", "h100-94gb", "--gpus", "7"],
            ["--gpus 7: 1 node of 4 and 3 GPUs more", "--gpus 4 or 8, or --nodes-of 1 or 7"],
        ),
    ],
)
def test_what_cannot_be_used_ends_with_code_two_and_says_why(
    changes: list[str], words: list[str]
) -> None:
    command = [sys.executable, str(CHECKOUT / "tools" / "plan.py"), *_arguments(), *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--machines", "{file}"], "{file}: File exists; name another folder by --machines"),
        (["--calibrate", "h200"], "--calibrate h200: give a name of letters"),
        (["--network", "wet"], "network wet of --network is not known; give"),
    ],
)
def test_a_calibration_that_could_not_be_stored_is_refused_before_anything_is_measured(
    changes: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setattr(
        "megatron_bert.benchmark.calibration.calibrate", lambda *_: pytest.fail("measured")
    )
    with pytest.raises(UserError) as refused:
        main(["--calibrate", "here", *(change.format(file=file) for change in changes)])
    assert str(refused.value).startswith(told.format(file=file))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "x.yaml"], "--config x.yaml"),
        (["--gpus", "8"], "--gpus 8"),
        (["--output", "plan.yaml"], "--output plan.yaml"),
        (["--picture", "plan.svg"], "--picture plan.svg"),
        (["--json"], "--json"),
        (["--keep", "3"], "--keep 3"),
        (["run.seed=1"], "run.seed=1"),
    ],
)
def test_what_a_calibration_does_not_use_is_refused(arguments: list[str], told: str) -> None:
    message = f"{told}: would have no effect; plan without --calibrate here"
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--calibrate", "here", *arguments])


def test_a_plan_of_an_automatic_layout_is_one_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.yaml"
    given = ["parallel.layout=auto", "batch.micro_size=4", "batch.micro_tokens=null"]
    main(_arguments("--output", str(output), *given))
    assert load_config(output).parallel.layout == "manual"
    out = capsys.readouterr().out
    keys = [line.strip() for line in out.split("keys to set\n")[1].splitlines()]
    assert {"parallel.layout=manual", "batch.micro_size=null"} <= set(keys)


def test_a_vocabulary_is_the_tokenizers_or_said_to_be_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer_path: Path
) -> None:
    output = tmp_path / "plan.yaml"
    main(_arguments("--json", "--output", str(output), "model.vocab_size=null"))
    plan = json.loads(capsys.readouterr().out)
    assert plan["vocab_size"] == 99_584
    assert "99,584 is assumed" in plan["remarks"][0]
    assert load_config(output).model.vocab_size is None
    main(_arguments("--json", "model.vocab_size=null", f"data.tokenizer={tiny_tokenizer_path}"))
    plan = json.loads(capsys.readouterr().out)
    assert plan["vocab_size"] < 99_584
    assert plan["remarks"] == []


def test_fp8_is_said_to_be_planned_as_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    main(_arguments("precision.fp8=current", "kernels=te"))
    assert "precision.fp8 = current is planned as BF16" in capsys.readouterr().out


def test_only_a_plan_is_replaced(tmp_path: Path) -> None:
    config, other = tmp_path / "run.yaml", tmp_path / "other.yaml"
    config.write_text(EXAMPLE.read_text())
    other.write_text("kept")
    arguments = ["--config", str(config), "--gpus", "8", "--gpu", "h100-80gb", "--output"]
    with pytest.raises(UserError, match="is --config itself"):
        main([*arguments, str(config)])
    with pytest.raises(UserError, match="no plan wrote it"):
        main([*arguments, str(other)])
    assert other.read_text() == "kept"
    plan = str(tmp_path / "plan.yaml")
    main([*arguments, plan])
    main([*arguments, plan])


def test_a_small_run_is_shown_in_units_that_leave_its_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = str(CHECKOUT / "examples" / "small_cpu.yaml")
    main(["--config", small, "--gpus", "4", "--gpu", "h100-80gb"])
    out = capsys.readouterr().out
    assert " seconds  GPU hours" in out
    assert "its passes are counted as recorded ones" in out
    assert "e-05" not in out
    assert "why this one: the quickest that fits" in out
    first = next(line for line in out.splitlines() if line.startswith("  1 "))
    assert "tensor 1, data 4" in first
    assert all(float(number) > 0 for number in first.split()[1:4])


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture_shows_layouts_memory_and_the_pipeline(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"plan.{ending}"
    main(_arguments("--picture", str(picture)))
    assert f"wrote {picture}" in capsys.readouterr().out
    content = picture.read_bytes()
    if ending == "png":
        assert content.startswith(b"\x89PNG")
        return
    for words in (b"days of the whole curriculum", b"GiB of the fullest GPU", b"pipeline rank"):
        assert words in content
    assert b">best: " in content
    # Keys stand there as they are set, and colours only where they are drawn.
    assert b"=true" in content
    assert not re.search(rb"=(True|False)", content)
    assert (b"olive" in content) == (b"zero_bubble" in content)


def test_a_picture_of_another_kind_is_refused_before_anything_is_planned_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "make_plan", None)
    given = ("--output", str(tmp_path / "plan.yaml"), "--picture", str(tmp_path / "plan.gif"))
    with pytest.raises(UserError, match=r"plan.gif: give a name that ends in .svg or .png"):
        main(_arguments(*given))
    assert not list(tmp_path.iterdir())


def test_an_earlier_plan_is_kept_where_a_picture_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, picture = tmp_path / "plan.yaml", tmp_path / "plan.svg"
    main(_arguments("--output", str(output)))
    before = output.read_bytes()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = ("--output", str(output), "--picture", str(picture), "run.seed=7")
    with pytest.raises(UserError, match=f"cannot be imported by {sys.executable}; install"):
        main(_arguments(*given))
    assert output.read_bytes() == before


def test_plan_and_picture_are_kept_whole_where_writing_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def break_off(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output, picture = tmp_path / "plan.yaml", tmp_path / "plan.svg"
    main(_arguments("--output", str(output), "--picture", str(picture)))
    before = {path: path.read_bytes() for path in (output, picture)}
    monkeypatch.setattr(files, "sync_to_disk", break_off)
    for given in (("--output", str(output)), ("--picture", str(picture))):
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            main(_arguments(*given, "run.seed=7"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
