"""`results.json`: a model's scores in the tasks, cell by cell, and its row in the card's table.

    {"model": {"folder", "files": {NAME: SHA-256}, "random_weights"},
     "tasks": {TASK: {"settings": {...}, "departures": [...], "cells": [...], "selected": {...}}},
     "row": {COLUMN: {"mean", "std"} or null},
     "notes": [...]}

The file is rewritten after each cell, so that a killed grid continues where it was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from megatron_bert.errors import UserError
from megatron_bert.files import write_atomically
from megatron_bert.jglue.tasks import EPOCHS, LEARNING_RATES, SWAPPED_COLUMNS, TASKS, Task

FILE_NAME = "results.json"

Record: TypeAlias = dict[str, Any]


class Results:
    """The results of one model, in a folder."""

    def __init__(self, folder: Path, model: Record) -> None:
        """Read the results that are in the folder, if any.

        Args:
            folder: for `results.json`; it need not exist.
            model: `folder`, `files` and `random_weights`.

        Raises:
            UserError: the file there is damaged, or is about another model.
        """
        self.path = folder / FILE_NAME
        self._model = model
        self._tasks: dict[str, Record] = {}
        if self.path.exists():
            self._tasks = self._read()

    def take_up(self, task: Task, settings: Record) -> None:
        """Begin a task, or continue it.

        Raises:
            UserError: the existing results were made with other settings.
        """
        known = self._tasks.setdefault(task.name, {"settings": settings, "cells": []})
        for key, value in settings.items():
            if known["settings"].get(key) != value:
                raise UserError(
                    f"{self.path}: {task.title} was begun with {key} = "
                    f"{json.dumps(known['settings'].get(key))}, and this is {json.dumps(value)}; "
                    "give the same, or another --output"
                )

    def is_done(self, task: Task, cell: Mapping[str, Any]) -> bool:
        """Say whether there is a result for a cell (`learning_rate`, `epochs`, `seed`)."""
        return any(cell.items() <= record.items() for record in self._cells(task))

    def add(self, task: Task, record: Record) -> None:
        """Add a finished cell and write the file.

        Raises:
            UserError: the file cannot be written; it is unchanged.
        """
        entry = self._tasks[task.name]
        entry["cells"].append(record)
        entry["selected"] = select(task, entry["cells"])
        entry["departures"] = departures(task, entry["settings"], entry["cells"])
        content = {
            "model": self._model,
            "tasks": self._tasks,
            "row": self.row(),
            "notes": self.notes(),
        }
        text = json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False)
        try:
            write_atomically(self.path, text + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}), and the last training is "
                "lost; free space, and give the same command again"
            ) from error

    def selected(self, task: Task) -> Record:
        """Return the chosen learning rate and epochs, and the scores with them."""
        selected: Record = self._tasks[task.name]["selected"]
        return selected

    def departures(self) -> list[str]:
        """Return how the row departs from JGLUE's protocol, a sentence each."""
        return [
            f"{TASKS[name].title}: {departure}"
            for name, entry in self._tasks.items()
            for departure in entry["departures"]
        ]

    def row(self) -> dict[str, Record | None]:
        """Return mean and standard deviation by column of the card; None if there are no cells."""
        return {
            f"{task.title} {metric}": self._tasks[task.name]["selected"]["scores"][metric]
            if self._cells(task)
            else None
            for task in TASKS.values()
            for metric in task.metrics
        }

    def notes(self) -> list[str]:
        """Return what to know when comparing the row with the card."""
        return [SWAPPED_COLUMNS] if self._cells(TASKS["jsquad"]) else []

    def _cells(self, task: Task) -> Sequence[Record]:
        cells: Sequence[Record] = self._tasks.get(task.name, {}).get("cells", ())
        return cells

    def _read(self) -> dict[str, Record]:
        try:
            content = json.loads(self.path.read_bytes())
            model, tasks = content["model"], dict(content["tasks"])
            same = [model[key] == self._model[key] for key in ("files", "random_weights")]
            for name, entry in tasks.items():
                # Everything that is read of a task later, so that damage shows now.
                entry["settings"].items()
                entry["departures"] = departures(TASKS[name], entry["settings"], entry["cells"])
                entry["selected"] = select(TASKS[name], entry["cells"])
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"{self.path}: is no results file of this tool ({type(error).__name__}: {error}); "
                "move it away, or give another --output"
            ) from error
        if not all(same):
            raise UserError(
                f"{self.path}: tells of another model ({model.get('folder')}, or its files have "
                "changed since); give another --output"
            )
        return tasks


def select(task: Task, cells: Sequence[Record]) -> Record:
    """Choose learning rate and epochs by the mean over seeds of `task.selected_by`.

    Only pairs with the most seeds are considered, so that neither a partly finished grid nor a pair
    tried with one lucky seed decides. `std` is the sample standard deviation, None for one seed.

    Raises:
        ValueError: there are no cells.
    """
    pairs: dict[tuple[float, int], list[Record]] = defaultdict(list)
    for cell in cells:
        pairs[cell["learning_rate"], cell["epochs"]].append(cell)
    most = max(map(len, pairs.values()))
    (rate, epochs), chosen = max(
        (pair for pair in pairs.items() if len(pair[1]) == most),
        key=lambda pair: fmean(cell["scores"][task.selected_by] for cell in pair[1]),
    )
    return {
        "learning_rate": rate,
        "epochs": epochs,
        "seeds": [cell["seed"] for cell in chosen],
        "by": f"mean {task.selected_by} on valid",
        "scores": {
            metric: _spread([cell["scores"][metric] for cell in chosen]) for metric in task.metrics
        },
    }


def departures(task: Task, settings: Mapping[str, Any], cells: Iterable[Record]) -> list[str]:
    """Return how results depart from JGLUE's protocol, a sentence each."""
    found = [
        f"{key} = {settings[key]}, where JGLUE has {protocol}"
        for key, protocol in (("max_length", task.max_length), ("batch_size", task.batch_size))
        if settings[key] != protocol
    ]
    found += [
        f"{key} = {settings[key]}: only the first rows were used"
        for key in ("max_train", "max_valid")
        if settings[key] is not None
    ]
    grid = {(rate, epochs) for rate in LEARNING_RATES for epochs in EPOCHS}
    tried = {(cell["learning_rate"], cell["epochs"]) for cell in cells}
    if missing := grid - tried:
        found.append(f"{len(missing)} of the grid's {len(grid)} cells were not tried")
    found += [
        f"learning rate {rate:g} with {epochs} epochs is not in JGLUE's grid"
        for rate, epochs in sorted(tried - grid)
    ]
    return found


def table(results: Results, name: str) -> str:
    """Return the model card's table with one row, in Markdown."""
    columns = results.row()
    cells = [_shown(score) for score in columns.values()]
    return "".join(
        f"| {' | '.join(line)} |\n"
        for line in (["model", *columns], ["---"] * (len(columns) + 1), [name, *cells])
    )


def _spread(scores: Sequence[float]) -> Record:
    return {"mean": fmean(scores), "std": stdev(scores) if len(scores) > 1 else None}


def _shown(score: Record | None) -> str:
    if score is None:
        return "-"
    spread = "" if score["std"] is None else f" ± {score['std']:.3f}"
    return f"{score['mean']:.3f}{spread}"
