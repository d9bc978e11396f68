"""The tool from end to end, on a few rows and models of two layers."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from megatron_bert.jglue import grid
from megatron_bert.jglue.cell import Batches, Cell, PreparedTask, train_cell
from megatron_bert.jglue.models import ModelSource
from megatron_bert.jglue.recipes import RECIPES, ValidSet
from megatron_bert.jglue.task_files import read_task_file
from megatron_bert.jglue.tasks import TASKS
from megatron_bert.locks import lock_file
from tests.jglue.conftest import row, write_split, write_task
from tests.safety.support import error_of
from tools.finetune_jglue import main

CHECKOUT = Path(__file__).resolve().parents[2]
# What the tiny models need; each is a departure from the protocol.
SHORT = ("--max-length", "64", "--batch-size", "8", "--epochs", "1")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tool sets the variables for its process; tiny models are slower on several threads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(*arguments: object) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main([str(argument) for argument in arguments])
    return output.getvalue()


def _results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", ["exported", pytest.param("bert", marks=pytest.mark.slow)])
def test_all_five_tasks_make_one_row(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    output = tmp_path / "output"
    for task in TASKS:
        data = write_task(task, tmp_path / task)
        told = _run(
            *("--model", models[name], "--task", task, "--data", data, "--output", output),
            *SHORT,
        )
    assert "RetrievaBERT's model card prints 0.916 as JSQuAD's EM" in told
    assert f"wrote {output / 'results.json'}" in told
    results = _results(output)
    assert list(results["tasks"]) == list(TASKS)
    assert all(score["std"] is None for score in results["row"].values())
    assert 0 <= results["row"]["JSQuAD EM"]["mean"] <= results["row"]["JSQuAD F1"]["mean"] <= 1
    for task, entry in results["tasks"].items():
        (cell,) = entry["cells"]
        assert (cell["seed"], cell["steps"]) == (42, 2)
        assert set(cell["scores"]) == set(TASKS[task].metrics)
        assert any("max_length = 64" in departure for departure in entry["departures"]) == (
            TASKS[task].max_length != 64
        )
    assert [path.name for path in output.iterdir()] == ["results.json"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that were trained; the training itself is left out."""
    cells: list[Cell] = []

    def stand_in(source: Any, task: PreparedTask, cell: Cell, batches: Any) -> dict[str, Any]:
        cells.append(cell)
        score = cell.learning_rate * 1e4 + cell.epochs / 100 + cell.seed / 1000
        scores = dict.fromkeys(task.task.metrics, score)
        about = {"steps": 1, "seconds": 0.0, "diverged": False}
        return {**vars(cell), "scores": scores, **about}

    monkeypatch.setattr(grid, "train_cell", stand_in)
    return cells


@pytest.fixture
def command(models: dict[str, Path], tmp_path: Path) -> list[object]:
    data = write_task("jsts", tmp_path / "data")
    given = {"--model": models["exported"], "--task": "jsts", "--data": data}
    given |= {"--output": tmp_path / "output", "--max-length": 64}
    return [part for pair in given.items() for part in pair]


def test_the_grid_is_jglues(command: list[object], tmp_path: Path, trained: list[Cell]) -> None:
    told = _run(*command, "--grid", "--seeds", 1, 2)
    assert {(cell.learning_rate, cell.epochs) for cell in trained} == {
        (rate, epochs) for rate in (5e-5, 3e-5, 2e-5) for epochs in (3, 4)
    }
    assert len(trained) == 12
    assert "JSTS: learning rate 5e-05 and 4 epoch(s), by mean pearson on valid over 2" in told
    entry = _results(tmp_path / "output")["tasks"]["jsts"]
    assert entry["departures"] == ["max_length = 64, where JGLUE has 128"]
    assert entry["selected"]["scores"]["pearson"]["mean"] == pytest.approx(0.5415)


def test_a_grid_that_was_cut_goes_on_where_it_was(
    command: list[object], tmp_path: Path, trained: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = grid.train_cell, iter(range(4))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(grid, "train_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(*command, "--grid")
    assert len(_results(tmp_path / "output")["tasks"]["jsts"]["cells"]) == 2
    monkeypatch.setattr(grid, "train_cell", train)
    told = _run(*command, "--grid")
    assert told.count("is done already") == 2
    assert len(trained) == len(set(trained)) == 6
    # Nothing is left to do, and more may be added.
    _run(*command, "--grid")
    assert len(trained) == 6
    _run(*command, "--learning-rate", "1e-4", "--seeds", 7)
    assert trained[6:] == [Cell(1e-4, 3, 7)]


def test_what_is_limited_is_told(
    command: list[object], tmp_path: Path, trained: list[Cell]
) -> None:
    told = _run(*command, "--max-train", 5, "--max-valid", 4, "--batch-size", 2)
    entry = _results(tmp_path / "output")["tasks"]["jsts"]
    assert entry["settings"]["train_examples"] == 5
    assert entry["settings"]["valid_examples"] == 4
    for departure in ("max_train = 5", "max_valid = 4", "batch_size = 2", "5 of the grid's 6"):
        assert departure in told
        assert any(departure in known for known in entry["departures"])


def test_what_was_otherwise_made_is_not_mixed(
    command: list[object], tmp_path: Path, trained: list[Cell]
) -> None:
    _run(*command, "--max-train", 5)
    before = (tmp_path / "output" / "results.json").read_bytes()
    told = error_of("tools.finetune_jglue", *command)
    assert "JSTS was begun with train_examples = 5, and this is 12" in told
    told = error_of("tools.finetune_jglue", *command, "--max-train", 5, "--random-weights")
    assert "tells of another model" in told
    assert (tmp_path / "output" / "results.json").read_bytes() == before
    assert len(trained) == 1


def test_results_may_lie_beside_the_model(
    command: list[object], models: dict[str, Path], tmp_path: Path, trained: list[Cell]
) -> None:
    model = shutil.copytree(models["exported"], tmp_path / "model")
    for seed in (1, 2):
        _run(*command, "--model", model, "--output", model, "--seeds", seed)
    assert [cell["seed"] for cell in _results(model)["tasks"]["jsts"]["cells"]] == [1, 2]


def test_two_processes_do_not_write_the_same_results(
    command: list[object], tmp_path: Path, trained: list[Cell]
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with lock_file(output / "results.json.lock"):
        assert "another process writes there" in error_of("tools.finetune_jglue", *command)
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "."], "--model .: holds no config.json"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--max-length", "65"], "max_position_embeddings = 64"),
        (["--max-length", "15"], "--max-length 15: give at least 16"),
        (["--max-train", "0"], "--max-train 0: give at least 1"),
        (["--epochs", "0"], "--epochs 0: give whole numbers above 0"),
        (["--learning-rate", "0"], "--learning-rate 0.0: give numbers above 0"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--seeds", "1", "1"], "--seeds 1 1: give whole numbers from 0 to 4294967295, each once"),
        (["--micro-batch-size", "5"], "--micro-batch-size 5: give a divisor of 32"),
    ],
)
def test_a_mistake_costs_no_training_and_leaves_nothing(
    command: list[object],
    tmp_path: Path,
    trained: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in error_of("tools.finetune_jglue", *command, *arguments)
    assert trained == []
    assert not (tmp_path / "output").exists()


def test_a_damaged_row_leaves_nothing(command: list[object], tmp_path: Path) -> None:
    rows = [row("jsts", 0), {"sentence1": "猫", "label": 1.0}]
    write_split("jsts", tmp_path / "data" / "valid-v1.3.json", rows)
    told = error_of("tools.finetune_jglue", *command)
    assert "valid-v1.3.json, line 2: the field 'sentence2' is missing" in told
    assert not (tmp_path / "output").exists()


def test_weights_that_cannot_be_loaded_leave_nothing(
    command: list[object], models: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in models["exported"].iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    told = error_of("tools.finetune_jglue", *command, "--model", model)
    assert f"--model {model}: its model cannot be loaded" in told
    assert not (tmp_path / "output").exists()


def test_a_jsquad_file_whose_answers_are_all_misplaced_is_refused(
    command: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_task("jsquad", tmp_path / "jsquad")
    wrong = [row("jsquad", n) | {"answers": [{"text": "猫", "answer_start": 9}]} for n in range(3)]
    write_split("jsquad", data / "train-v1.3.json", wrong)
    told = error_of("tools.finetune_jglue", *command, "--task", "jsquad", "--data", data)
    assert "train-v1.3.json: no answer stands where its answer_start says" in told
    assert "3 of 3 training questions are left out" in caplog.text


def test_bf16_on_a_gpu_that_lacks_it_is_refused(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    monkeypatch.setattr("megatron_bert.jglue.cell.is_torch_bf16_gpu_available", lambda: False)
    told = error_of("tools.finetune_jglue", *command, "--precision", "bf16")
    assert "--precision bf16: an old card computes no BF16" in told
    assert not (tmp_path / "output").exists()


def test_several_ranks_are_refused(command: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not with torchrun" in error_of("tools.finetune_jglue", *command)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.finetune_jglue._LIBRARIES", ("accelerate", "no_such_library"))
    told = error_of("tools.finetune_jglue", *command)
    assert "no_such_library cannot be imported; the extra jglue brings" in told


def _prepared(task: str, folder: Path, source: ModelSource, rows: int = 24) -> PreparedTask:
    source.check()
    data, recipe = write_task(task, folder, train=rows, valid=20), RECIPES[task]
    tokenizer = source.load_tokenizer(recipe, 64)
    train, valid = (read_task_file(task, data, split).examples for split in ("train", "valid"))
    return PreparedTask(
        TASKS[task],
        recipe,
        tokenizer,
        recipe.train_rows(train, tokenizer, 64),
        recipe.valid_set(valid, tokenizer, 64),
    )


@pytest.mark.parametrize("task", TASKS)
def test_what_can_be_learned_is_learned(models: dict[str, Path], tmp_path: Path, task: str) -> None:
    source = ModelSource(models["exported"])
    prepared = _prepared(task, tmp_path / "data", source)
    record = train_cell(source, prepared, Cell(5e-3, 15, 1), Batches(8, 8, "fp32"))
    assert record["scores"][prepared.task.selected_by] > 0.9
    assert not record["diverged"]
    assert record["steps"] == 3 * 15


def test_a_cell_comes_out_the_same_again_and_in_smaller_batches_too(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(models["exported"])
    prepared = _prepared("jsts", tmp_path / "data", source)
    seen: list[Any] = []

    def keep(logits: Any) -> dict[str, float]:
        seen.append(logits)
        return {"pearson": 0.0, "spearman": 0.0}

    kept = PreparedTask(
        prepared.task,
        prepared.recipe,
        prepared.tokenizer,
        prepared.train,
        ValidSet(prepared.valid.rows, keep),
    )
    for seed, micro in ((1, 8), (1, 8), (1, 2), (2, 8)):
        train_cell(source, kept, Cell(1e-3, 2, seed), Batches(8, micro, "fp32"))
    first, again, smaller, other = seen
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, smaller, rtol=1e-3, atol=1e-4)
    assert not np.allclose(first, other, rtol=1e-3, atol=1e-2)


class _Recorded(Trainer):
    """Keeps the learning rate of every step and the loss of every forward pass."""

    rates: list[float]
    losses: list[float]

    def training_step(self, *arguments: Any, **more: Any) -> Any:
        loss = super().training_step(*arguments, **more)
        self.losses.append(float(loss))
        self.rates.append(self.lr_scheduler.get_last_lr()[0])
        return loss


def test_a_steps_loss_is_the_mean_of_its_rows_and_a_tenth_of_the_steps_warms_up(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its forward pass takes a number of rows for its loss, and does nothing with it.
    source = ModelSource(models["bert"])
    prepared = _prepared("jnli", tmp_path / "data", source)
    monkeypatch.setattr("megatron_bert.jglue.cell.Trainer", _Recorded)
    first = {}
    for micro in (8, 2):
        _Recorded.rates, _Recorded.losses = [], []
        train_cell(source, prepared, Cell(1e-3, 7, 1), Batches(8, micro, "fp32"))
        first[micro] = sum(_Recorded.losses[: 8 // micro])
        rates = _Recorded.rates[:: 8 // micro]
        assert len(rates) == 21
        # Up in three steps, down to nothing in the eighteen after them.
        up, down = np.arange(3) / 3, 1 - np.arange(18) / 18
        np.testing.assert_allclose(rates, 1e-3 * np.concatenate([up, down]), rtol=1e-6)
    assert first[2] == pytest.approx(first[8], rel=1e-4)


def test_bf16_computes_in_bf16(models: dict[str, Path], tmp_path: Path) -> None:
    source = ModelSource(models["exported"])
    prepared = _prepared("jnli", tmp_path / "data", source)
    record = train_cell(source, prepared, Cell(5e-3, 15, 1), Batches(8, 8, "bf16"))
    assert record["scores"]["acc"] > 0.9


def test_a_model_that_diverges_scores_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    source = ModelSource(models["bert"])
    prepared = _prepared("jnli", tmp_path / "data", source)
    record = train_cell(source, prepared, Cell(1e38, 2, 1), Batches(8, 8, "fp32"))
    assert record["diverged"]
    assert record["scores"] == {"acc": 0.0}


@pytest.fixture
def process(command: list[object], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The tool on the command line, in a grid that would take long."""
    arguments = [*command, "--seeds", *range(1000), *SHORT]
    with subprocess.Popen(
        [sys.executable, CHECKOUT / "tools" / "finetune_jglue.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        yield started
        started.kill()


@pytest.mark.slow
def test_a_killed_process_leaves_whole_cells_and_the_next_goes_on(
    process: subprocess.Popen[str], command: list[object], tmp_path: Path
) -> None:
    assert process.stdout is not None
    for _ in range(3):
        assert "pearson" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    done = len(_results(tmp_path / "output")["tasks"]["jsts"]["cells"])
    assert done >= 3
    told = _run(*command, "--seeds", *range(done + 1), *SHORT)
    assert told.count("is done already") == done
    assert len(_results(tmp_path / "output")["tasks"]["jsts"]["cells"]) == done + 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["jsts", "jcommonsenseqa", "jnli", "jsquad"])
def test_real_rows_go_through(
    jglue: Path, models: dict[str, Path], tmp_path: Path, task: str
) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        # Of two tasks only the evaluation's part is at hand.
        found = [*(jglue / task).glob(f"{split}-*.json"), jglue / task / "valid-v1.3.json"][0]
        (tmp_path / "data" / f"{split}-v1.3.json").symlink_to(found)
    told = _run(
        *("--model", models["exported"], "--task", task, "--data", tmp_path / "data"),
        *("--output", tmp_path / "output", "--max-train", 50, "--max-valid", 50, *SHORT),
    )
    assert TASKS[task].title in told
    assert (tmp_path / "output" / "results.json").exists()
