"""A model's grid on one task: prepared once, then trained and recorded cell by cell."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bert.errors import DataError, UserError
from megatron_bert.jglue.cell import Batches, Cell, PreparedTask, train_cell
from megatron_bert.jglue.models import ModelSource
from megatron_bert.jglue.recipes import RECIPES
from megatron_bert.jglue.results import Record, Results
from megatron_bert.jglue.task_files import TaskFile, read_task_file
from megatron_bert.jglue.tasks import Task
from megatron_bert.locks import FileInUseError, lock_file, remove_lock


@dataclass(frozen=True)
class GridOptions:
    """What to train and evaluate.

    Attributes:
        learning_rates, epochs, seeds: every combination is a cell.
        max_length: maximum tokens of an input.
        max_train, max_valid: use only that many rows, from the first; None for all.
    """

    source: ModelSource
    task: Task
    data: Path
    output: Path
    learning_rates: Sequence[float]
    epochs: Sequence[int]
    seeds: Sequence[int]
    batches: Batches
    max_length: int
    max_train: int | None = None
    max_valid: int | None = None

    def cells(self) -> list[Cell]:
        """Return the cells, one seed after the other."""
        return [
            Cell(rate, epochs, seed)
            for seed, rate, epochs in itertools.product(
                self.seeds, self.learning_rates, self.epochs
            )
        ]


def run_grid(options: GridOptions) -> Results:
    """Train and evaluate every cell that is not yet in `results.json`.

    Everything that can be checked without training is checked before the output folder is made.

    Raises:
        UserError: the model, the data, the precision or the output folder cannot be used.
    """
    options.batches.check()
    options.source.check()
    files = {
        split: read_task_file(options.task.name, options.data, split, limit)
        for split, limit in (("train", options.max_train), ("valid", options.max_valid))
    }
    prepared = _prepare(options, files["train"], files["valid"])
    model = {
        "folder": str(options.source.folder),
        "files": options.source.fingerprint(),
        "random_weights": options.source.random_weights,
    }
    with _locked(options.output):
        results = Results(options.output, model)
        results.take_up(options.task, _settings(options, files))
        _train_cells(options, prepared, results)
    return results


def _prepare(options: GridOptions, train: TaskFile, valid: TaskFile) -> PreparedTask:
    recipe = RECIPES[options.task.name]
    tokenizer = options.source.load_tokenizer(recipe, options.max_length)
    prepared = PreparedTask(
        options.task,
        recipe,
        tokenizer,
        recipe.train_rows(train.examples, tokenizer, options.max_length),
        recipe.valid_set(valid.examples, tokenizer, options.max_length),
    )
    if not prepared.train:
        raise DataError(
            f"{train.path}: no answer stands where its answer_start says; copy it again"
        )
    return prepared


def _settings(options: GridOptions, files: dict[str, TaskFile]) -> Record:
    """Everything that results depend on besides the model and the cell.

    The rows of one forward pass are left out: they change scores no more than a seed does, and a
    grid that ran out of memory has to continue with fewer.
    """
    return {
        **{f"{split}_sha256": file.sha256 for split, file in files.items()},
        **{f"{split}_examples": len(file.examples) for split, file in files.items()},
        "max_train": options.max_train,
        "max_valid": options.max_valid,
        "max_length": options.max_length,
        "batch_size": options.batches.size,
        "precision": options.batches.precision,
    }


def _train_cells(options: GridOptions, prepared: PreparedTask, results: Results) -> None:
    cells = options.cells()
    for number, cell in enumerate(cells, start=1):
        place = f"{options.task.title} {number}/{len(cells)}: {cell}"
        if results.is_done(options.task, asdict(cell)):
            told = "is done already"
        else:
            record = train_cell(options.source, prepared, cell, options.batches)
            results.add(options.task, record)
            told = _told(record)
        sys.stdout.write(f"{place}: {told}\n")
        sys.stdout.flush()


def _told(record: Record) -> str:
    scores = ", ".join(f"{metric} {score:.4f}" for metric, score in record["scores"].items())
    diverged = "; it diverged" if record["diverged"] else ""
    return f"{scores} ({record['steps']} steps, {record['seconds']:.0f} s){diverged}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the output folder; if it was created here and stays empty, remove it at the end."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json.lock"
        stream = lock_file(path)
    except FileInUseError as error:
        raise UserError(
            f"--output {folder}: another process writes there ({error}); wait for its end, or "
            "name another"
        ) from error
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror}); name another"
        ) from error
    try:
        yield
    finally:
        remove_lock(path, stream)
        if made:
            with suppress(OSError):
                folder.rmdir()
