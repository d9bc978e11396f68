"""results.json: choice, means, departures, the row, and going on."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.errors import UserError
from megatron_bert.jglue.results import Results, departures, select, table
from megatron_bert.jglue.tasks import EPOCHS, LEARNING_RATES, SWAPPED_COLUMNS, TASKS, Task

MODEL = {"folder": "m", "files": {"config.json": "0"}, "random_weights": False}


def _settings(task: Task, **changes: Any) -> dict[str, Any]:
    settings = {"max_length": task.max_length, "batch_size": task.batch_size, "precision": "fp32"}
    return {**settings, "max_train": None, "max_valid": None, **changes}


def _cell(rate: float, epochs: int, seed: int, **scores: float) -> dict[str, Any]:
    return {"learning_rate": rate, "epochs": epochs, "seed": seed, "scores": scores}


def _written(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_the_best_pair_on_average_is_chosen_with_mean_and_standard_deviation() -> None:
    cells = [
        _cell(5e-5, 3, 1, acc=0.9),
        _cell(5e-5, 3, 2, acc=0.5),
        _cell(3e-5, 4, 1, acc=0.7),
        _cell(3e-5, 4, 2, acc=0.8),
    ]
    selected = select(TASKS["jnli"], cells)
    assert (selected["learning_rate"], selected["epochs"]) == (3e-5, 4)
    assert selected["seeds"] == [1, 2]
    assert selected["scores"]["acc"]["mean"] == pytest.approx(0.75)
    # Of a sample: sqrt((0.05^2 + 0.05^2) / 1).
    assert selected["scores"]["acc"]["std"] == pytest.approx(0.005**0.5)


def test_a_pair_with_fewer_seeds_does_not_decide() -> None:
    cells = [_cell(5e-5, 3, 1, acc=0.6), _cell(5e-5, 3, 2, acc=0.6), _cell(3e-5, 3, 1, acc=0.9)]
    assert select(TASKS["jnli"], cells)["learning_rate"] == 5e-5


def test_each_task_is_chosen_by_one_metric() -> None:
    jsts = [
        _cell(5e-5, 3, 1, pearson=0.9, spearman=0.7),
        _cell(3e-5, 3, 1, pearson=0.8, spearman=1),
    ]
    assert select(TASKS["jsts"], jsts)["learning_rate"] == 5e-5
    jsquad = [_cell(5e-5, 3, 1, EM=0.8, F1=0.85), _cell(3e-5, 3, 1, EM=0.7, F1=0.9)]
    selected = select(TASKS["jsquad"], jsquad)
    assert selected["learning_rate"] == 3e-5
    assert selected["scores"]["EM"] == {"mean": 0.7, "std": None}


def test_the_whole_grid_is_the_protocol_and_all_else_departs_from_it() -> None:
    task = TASKS["jnli"]
    grid = [_cell(rate, epochs, 1, acc=0.5) for rate in LEARNING_RATES for epochs in EPOCHS]
    assert len(grid) == 6
    assert departures(task, _settings(task), grid) == []
    assert departures(task, _settings(task), grid[1:]) == ["1 of the grid's 6 cells were not tried"]
    assert departures(task, _settings(task), [*grid, _cell(1e-4, 1, 1, acc=0.5)]) == [
        "learning rate 0.0001 with 1 epochs is not in JGLUE's grid"
    ]
    limited = _settings(task, max_train=9, max_valid=8, batch_size=16, max_length=64)
    told = "\n".join(departures(task, limited, grid))
    for departure in (
        "max_length = 64, where JGLUE has 128",
        "batch_size = 16, where JGLUE has 32",
        "max_train = 9",
        "max_valid = 8",
    ):
        assert departure in told


def test_the_row_has_the_cards_columns_and_grows_task_by_task(tmp_path: Path) -> None:
    for name, scores in (
        ("jsquad", {"EM": 0.8, "F1": 0.9}),
        ("jsts", {"pearson": 0.7, "spearman": 0.6}),
    ):
        results, task = Results(tmp_path, MODEL), TASKS[name]
        results.take_up(task, _settings(task))
        for seed, more in ((1, 0.0), (2, 0.02)):
            results.add(task, _cell(5e-5, 3, seed, **{k: v + more for k, v in scores.items()}))
    header, _, row = table(results, "mine").splitlines()
    assert header == (
        "| model | MARC-ja acc | JSTS pearson | JSTS spearman | JNLI acc | JSQuAD EM | JSQuAD F1 "
        "| JComQA acc |"
    )
    assert row == (
        "| mine | - | 0.710 ± 0.014 | 0.610 ± 0.014 | - | 0.810 ± 0.014 | 0.910 ± 0.014 | - |"
    )
    written = _written(tmp_path)
    assert list(written["row"]) == header.strip("| ").split(" | ")[1:]
    assert written["row"]["JNLI acc"] is None
    assert written["row"]["JSTS pearson"]["mean"] == pytest.approx(0.71)
    assert written["notes"] == [SWAPPED_COLUMNS]


def test_cells_that_stand_there_are_known(tmp_path: Path) -> None:
    task = TASKS["jnli"]
    first = Results(tmp_path, MODEL)
    first.take_up(task, _settings(task))
    first.add(task, _cell(5e-5, 3, 1, acc=0.5))
    again = Results(tmp_path, {**MODEL, "folder": "moved"})
    again.take_up(task, _settings(task))
    assert again.is_done(task, {"learning_rate": 5e-5, "epochs": 3, "seed": 1})
    for other in ({"learning_rate": 3e-5}, {"epochs": 4}, {"seed": 2}):
        assert not again.is_done(task, {"learning_rate": 5e-5, "epochs": 3, "seed": 1, **other})
    again.add(task, _cell(5e-5, 3, 2, acc=0.7))
    assert _written(tmp_path)["tasks"]["jnli"]["selected"]["seeds"] == [1, 2]


def test_results_of_another_model_or_otherwise_made_are_refused(tmp_path: Path) -> None:
    task = TASKS["jnli"]
    results = Results(tmp_path, MODEL)
    results.take_up(task, _settings(task, valid_sha256="0"))
    results.add(task, _cell(5e-5, 3, 1, acc=0.5))
    for model in ({"files": {"config.json": "1"}}, {"random_weights": True}):
        with pytest.raises(UserError, match=r"results\.json: tells of another model"):
            Results(tmp_path, {**MODEL, **model})
    for key, value in (("max_train", 5), ("precision", "bf16"), ("valid_sha256", "1")):
        changed = _settings(task, **{"valid_sha256": "0", key: value})
        with pytest.raises(UserError, match=f"JNLI was begun with {key} = "):
            Results(tmp_path, MODEL).take_up(task, changed)


def test_a_full_disk_is_told_and_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["jnli"]
    results = Results(tmp_path, MODEL)
    results.take_up(task, _settings(task))
    results.add(task, _cell(5e-5, 3, 1, acc=0.5))
    before = _written(tmp_path)

    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_bert.files.write_durably", full)
    with pytest.raises(UserError, match=r"results\.json: cannot be written \(No space left"):
        results.add(task, _cell(5e-5, 3, 2, acc=0.7))
    assert _written(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


_OF_THIS_MODEL = '{"model": {"files": {"config.json": "0"}, "random_weights": false}, "tasks": %s}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"model": 1, "tasks": {}}'),
        *(
            _OF_THIS_MODEL % tasks
            for tasks in ("[1]", '{"other": {}}', '{"jnli": {}}', '{"jnli": {"settings": 1}}')
        ),
        _OF_THIS_MODEL % '{"jnli": {"settings": {}, "cells": []}}',
    ],
)
def test_another_file_of_that_name_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json: is no results file"):
        Results(tmp_path, MODEL)
    assert (tmp_path / "results.json").read_text() == content
