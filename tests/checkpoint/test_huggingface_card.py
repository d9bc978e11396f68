"""The model card: what it tells, what it leaves out, and that its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bert.checkpoint.huggingface_card import TESTED_RELEASES, model_card
from megatron_bert.checkpoint.huggingface_card_training import training_sections
from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.run_state import RunState
from megatron_bert.checkpoint.store import find_checkpoint
from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.run.figures import run_figures
from tests.checkpoint.huggingface_run import make_run
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.huggingface.releases import installed_release, older_release
from tests.small_model import small_config
from tests.training.runs import run_config, train


def _train_until(config: Config, last_step: int) -> list[dict[str, Any]]:
    return train(config, stop_after=last_step)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that stopped in its second stage, after an evaluation."""
    folder = tmp_path_factory.mktemp("card")
    run_ranks(1, _train_until, run_config(tiny_data, folder / "run"), 9)
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    checkpoint = find_checkpoint(trained / "run")
    output = trained / "exported"
    figures = run_figures(checkpoint, 9)
    export_checkpoint(
        checkpoint, output, figures=figures, license_id="cc-by-sa-4.0", languages=["ja", "no"]
    )
    return output


def _rows(card: str) -> dict[str, str]:
    """The tables with two columns."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))


def test_the_cards_figures_are_the_runs_own(trained: Path, exported: Path) -> None:
    rows = _rows((exported / "README.md").read_text("utf-8"))
    from megatron_bert.run.metrics import read

    lines = read(trained / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line][-1]
    assert rows["optimizer steps"] == "9"
    assert rows["rows"] == str(9 * 12)
    assert rows["token slots"] == f"{7 * 12 * 32 + 2 * 12 * 64:,}"
    assert rows["tokens predicted"] == f"{sum(line['masked_tokens'] for line in steps):,}"
    mean = sum(line["loss"] for line in steps) / 9
    assert rows["training loss"] == f"{mean:.4f} nats, mean of the last 9 steps"
    assert rows["held-out loss"].startswith(f"{valid['valid_loss']:.4f} nats, accuracy ")
    assert rows["held-out loss"].endswith("after step 8")
    assert rows["optimizer"].startswith("AdamW, beta1 0.9, beta2 0.999, epsilon 0.0001")
    assert rows["precision"] == "fp32, weights and moments fp32"
    assert rows["hidden size"] == "32"
    assert rows["training corpora"] == "`train`"


def test_the_card_has_the_curriculum(exported: Path) -> None:
    card = (exported / "README.md").read_text("utf-8")
    assert "| 32 | 7 | 12 | 0.15 | 1.0 |\n| 64 | 5 | 12 | 0.15 | 1.0 |\n" in card


def test_the_card_names_muon_and_the_types_of_products_and_of_reduced_gradients() -> None:
    config = small_config(
        optimizer={"name": "muon", "momentum": 0.9},
        precision={"compute": "bf16", "reduce": "bf16", "fp8": "current"},
    )
    state = {
        "step": 3,
        "consumed_rows": 24,
        "topology": {"data": 2},
        "config": config_dict(config),
    }
    rows = _rows("\n".join(training_sections(RunState(Path("step_3"), state), None)))
    assert rows["optimizer"].startswith(
        "Muon (momentum 0.9) for the blocks' matrices, AdamW for the rest, beta1 0.9"
    )
    assert rows["precision"] == (
        "bf16, weights and moments fp32, products of blocks in FP8 (current "
        "scaling), gradients reduced in bf16"
    )


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"warmup_steps": 30, "warmup_fraction": None}, "warm-up 30 steps"),
        ({"warmup_steps": None, "warmup_fraction": 0.05}, "warm-up share 0.05"),
        ({"warmup_steps": None, "warmup_fraction": None}, "warm-up share 0.01"),
        ({"warmup_fraction": 0.05}, "warm-up share 0.05"),
        ({}, "warm-up unknown"),
    ],
)
def test_the_card_tells_the_warm_up_as_far_as_the_configuration_does(
    schedule: dict[str, Any], told: str
) -> None:
    config = config_dict(small_config()) | {"schedule": schedule}
    state = {"step": 3, "consumed_rows": 24, "topology": {"data": 1}, "config": config}
    rows = _rows("\n".join(training_sections(RunState(Path("step_3"), state), None)))
    assert rows["learning rate"].endswith(f" decay, {told}")


def test_the_cards_metadata_are_yaml_with_the_licence(exported: Path) -> None:
    _, metadata, _ = (exported / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "cc-by-sa-4.0",
        "language": ["ja", "no"],
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "mask_token": "<MASK>",
    }


def test_the_card_names_the_tested_releases_the_codes_licence_and_the_type(exported: Path) -> None:
    assert sorted(TESTED_RELEASES) == sorted({older_release(), installed_release()})
    card = (exported / "README.md").read_text("utf-8")
    assert f"- Tested with transformers {' and '.join(TESTED_RELEASES)}.\n" in card
    assert "code (`*.py`) is licensed under Apache-2.0, whatever" in card
    for code in exported.glob("*.py"):
        assert code.read_text("utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert "weights are float32, as they were trained" in card


@pytest.mark.parametrize(
    ("pieces", "told"), [(512, "512 rows, tied"), (500, "512 rows (500 pieces and 12 spare")]
)
def test_the_card_tells_spare_rows_and_bf16(pieces: int, told: str) -> None:
    config = small_config()
    card = model_card(
        config.model,
        512,
        "bf16",
        num_pieces=pieces,
        num_parameters=1,
        mask_token="<MASK>",
        state=RunState(
            Path("step_3"),
            {"step": 3, "consumed_rows": 1, "topology": {}, "config": config_dict(config)},
        ),
        figures=None,
        license_id="other",
    )
    assert f"| vocabulary | {told}" in card
    assert "weights are bfloat16, rounded from the float32" in card
    assert "language:" not in card


_WARNING = "**Rows of training had at most "


def _card(config: Config, step: int, languages: Sequence[str] = ()) -> str:
    """The card of a checkpoint of which only configuration and step are known."""
    state = {"step": step, "consumed_rows": 1, "topology": {}, "config": config_dict(config)}
    return model_card(
        config.model,
        512,
        "fp32",
        num_pieces=512,
        num_parameters=1,
        mask_token="<MASK>",
        state=RunState(Path(f"step_{step}"), state),
        figures=None,
        license_id="other",
        languages=languages,
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ("32 tokens**, of 64 positions", "`model_max_length` is 32")),
        ({"checkpoint": {"resume": "/runs/other/step_7"}}, ("32 tokens**, of 64", "`step_7`")),
        (
            {"model": {"architecture": "modernbert", "num_query_groups": 4}},
            ("32 tokens**, of 64 that", "max_length=32"),
        ),
        ({"model": {"max_position_embeddings": 32}}, ()),
        # The second stage's first step; the stages before it are over.
        ({"curriculum": [{"seq_length": n, "steps": 9} for n in (32, 64)]}, ()),
        ({"curriculum": [{"seq_length": n, "steps": 10} for n in (32, 64)]}, ("32 tokens**",)),
    ],
)
def test_the_card_warns_of_positions_that_no_row_has_reached(
    changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    config = small_config(**changes)
    card = _card(config, step=10)
    assert (_WARNING in card) == bool(told)
    for words in told:
        assert words in card


@pytest.mark.parametrize(
    ("languages", "told"),
    [
        (["en"], "London is the <MASK> of England."),
        (["ja", "en"], "東京は日本の<MASK>です。"),
        (["no", "en"], "London is the <MASK> of England."),
        (["no"], "1, 2, 3, <MASK>, 5"),
        ([], "1, 2, 3, <MASK>, 5"),
    ],
)
def test_the_cards_sample_texts_are_in_the_models_language(languages: list[str], told: str) -> None:
    card = _card(small_config(), step=3, languages=languages)
    assert f'fill("{told}", top_k=3)' in card
    assert ("吾輩は猫である" in card) == ("ja" in languages)


def test_no_file_of_an_export_names_a_place_on_this_machine(exported: Path) -> None:
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(exported.parent).encode() not in content, path.name
        assert str(Path.home()).encode() + b"/" not in content, path.name


def test_the_cards_code_runs_where_nothing_of_this_project_is_installed(
    exported: Path, tmp_path: Path
) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (exported / "README.md").read_text("utf-8"), re.DOTALL | re.M
    )
    code += "\nassert vectors.shape[0] == 2 and vectors.shape[2] == 32, vectors.shape\n"
    # Isolated, so that the package is not importable, and offline.
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=exported,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == 3


def test_figures_of_another_course_of_the_run_are_not_taken(trained: Path) -> None:
    checkpoint = find_checkpoint(trained / "run")
    assert run_figures(checkpoint, 10) is None
    earlier = run_figures(checkpoint, 6)
    assert earlier is not None
    assert earlier.tokens == 6 * 12 * 32
    assert earlier.valid_step == 4


def test_without_metrics_figures_are_unknown(tiny_tokenizer_path: Path, tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path, tiny_tokenizer_path)
    assert run_figures(checkpoint, 10) is None
    export_checkpoint(checkpoint, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text("utf-8")
    rows = _rows(card)
    assert {rows["token slots"], rows["training loss"], rows["held-out loss"]} == {"unknown"}
    assert rows["optimizer steps"] == "10"
    assert "license: unknown" in card
    assert "`metrics.jsonl`, which was not at hand" in card
    import_model(tmp_path / "exported", tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "again")
    again = (tmp_path / "again" / "README.md").read_text("utf-8")
    assert "converted twice; how they were trained is unknown here.\n" in again
    assert "optimizer" not in again
