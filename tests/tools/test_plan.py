"""`tools/plan.py`: what it prints and writes can be used, and what it cannot use it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.config.checks import check_config
from megatron_bert.config.errors import UserError
from megatron_bert.config.load import load_config
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
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--gpu", "h1000"], ["--gpu h1000: not known", "h100-80gb", "a100-40gb"]),
        (["--gpus", "0"], ["--gpus 0", "1 or more"]),
        (["--network", "wet"], ["--network wet", "ndr200x4"]),
        (["--output", "/nowhere/at/all.yaml"], ["--output /nowhere/at/all.yaml"]),
        (["model.vocab_size=null"], ["model.vocab_size"]),
    ],
)
def test_what_cannot_be_used_ends_with_code_two_and_says_why(
    changes: list[str], words: list[str]
) -> None:
    command = [sys.executable, str(CHECKOUT / "tools" / "plan.py"), *_arguments(), *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


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


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan.gif: the ending is none of .png, .svg"):
        main(_arguments("--picture", str(tmp_path / "plan.gif")))
