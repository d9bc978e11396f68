"""What a real run's metrics tell beside the loss, and that the report draws it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.config.schema import Config
from megatron_bert.data.token_kinds import TOKEN_KINDS, token_kinds
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.report.curves import charts_of
from megatron_bert.report.page import page_of
from megatron_bert.report.records import RunRecords
from megatron_bert.run.journal import SAVE, read_journal
from megatron_bert.training.held_out import HeldOutRows, Measure
from tests.distributed_harness import run_ranks
from tests.training.runs import run_config, steps_of, train

PARTS = ("data_seconds", "model_seconds", "optimizer_seconds")


def _train(config: Config) -> list[dict[str, Any]]:
    return train(config)


@pytest.fixture(scope="module")
def config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    # A vocabulary with padding; slots that are left unused; saves in the way of training.
    return run_config(
        tiny_data,
        tmp_path_factory.mktemp("measured") / "run",
        model={"vocab_size": 640},
        curriculum=[{"seq_length": 32, "steps": 4}],
        eval={"interval": 2, "batches": 3, "fixed_seq_length": 64},
        optimizer={"lr": 3e-2},
        checkpoint={"interval": 3, "async": False},
    )


@pytest.fixture(scope="module")
def lines(config: Config) -> list[dict[str, Any]]:
    """The metrics of that run, once for all tests."""
    (found,) = run_ranks(1, _train, config)
    return list(found)


def _counts(config: Config, measure: Measure) -> tuple[Counter[str], Counter[str]]:
    """Masked tokens of the held-out text by what stands in their place, and by kind."""
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    (source,) = HeldOutRows.plan(config, tokenizer).sources[measure]
    rows = source.batch(np.arange(source.num_rows), 0)
    used = rows.weights_BM.bool()
    labels = rows.labels_BM[used].tolist()
    seen = rows.tokens_BS.gather(1, rows.masked_BM.long())[used].tolist()
    kinds = token_kinds(tokenizer)
    replacements = (
        "masked" if new == tokenizer.mask_id else "kept" if new == label else "random"
        for new, label in zip(seen, labels, strict=True)
    )
    return Counter(replacements), Counter(TOKEN_KINDS[kinds[label]] for label in labels)


def test_accuracies_by_kind_weighted_by_their_tokens_are_the_whole(
    config: Config, lines: list[dict[str, Any]]
) -> None:
    *_, line = (line for line in lines if "valid_loss" in line)
    scores = line["valid"]["valid"]
    assert 0 < line["valid_accuracy"] == scores["accuracy"] < 1
    by_replacement, by_characters = _counts(config, Measure(32, 0.15))
    assert set(by_replacement) == {"masked", "random", "kept"}
    assert {"han", "latin_start"} < set(by_characters) < set(TOKEN_KINDS)
    for counts, name in (
        (by_replacement, "accuracy_by_replacement"),
        (by_characters, "accuracy_by_characters"),
    ):
        # Kinds that the text lacks are left out.
        assert set(scores[name]) == set(counts), name
        right = sum(scores[name][kind] * count for kind, count in counts.items())
        assert right / counts.total() == pytest.approx(scores["accuracy"]), name
        assert len(set(scores[name].values())) > 1, name


def test_a_steps_parts_are_measured_and_are_no_more_than_the_step(
    lines: list[dict[str, Any]],
) -> None:
    for step, line in steps_of(lines).items():
        parts = [line[part] for part in PARTS]
        assert min(parts) > 0, step
        # What is left is agreement, recording, waiting for other ranks.
        assert sum(parts) <= line["step_seconds"] + 1e-6, step


def test_saves_and_evaluations_are_measured_where_they_occur(
    config: Config, lines: list[dict[str, Any]]
) -> None:
    journal = read_journal(config.run.paths.journal)
    saves = {line["step"]: line["blocked_seconds"] for line in journal if line["event"] == SAVE}
    assert min(saves.values()) > 0
    evaluated = {line["step"]: line["evaluation_seconds"] for line in lines if "valid" in line}
    assert set(evaluated) == {2, 4}
    assert min(evaluated.values()) > 0


def test_the_report_draws_the_parts_and_the_kinds_of_a_real_run(
    config: Config, lines: list[dict[str, Any]]
) -> None:
    run = RunRecords.read(config.run.directory)
    names = {chart.title: set(chart.names()) for chart in charts_of([run])}
    assert names["Time of steps, evaluations and saves"] == {
        "Step", "Data", "Model", "Optimizer", "Save", "Evaluation",
    }  # fmt: skip
    scores = next(line for line in lines if "valid" in line)["valid"]["valid"]
    for kinds in ("replacement", "characters"):
        title = f"Masked accuracy by {kinds}: valid"
        assert names[title] == set(scores[f"accuracy_by_{kinds}"])
        assert f"<b>{title}</b>" in page_of([run])
