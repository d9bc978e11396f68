"""One cell of the grid: a model fine-tuned with one learning rate, number of epochs and seed."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from megatron_bert.errors import UserError
from megatron_bert.jglue.models import ModelSource
from megatron_bert.jglue.recipes import Recipe, Row, Scores, ValidSet
from megatron_bert.jglue.tasks import WARMUP_RATIO, Task
from megatron_bert.progress_bar import ProgressBar


@dataclass(frozen=True, order=True)
class Cell:
    """What distinguishes one training run of the grid from the others."""

    learning_rate: float
    epochs: int
    seed: int

    def __str__(self) -> str:
        """The cell in words, for display."""
        return f"learning rate {self.learning_rate:g}, {self.epochs} epoch(s), seed {self.seed}"


@dataclass(frozen=True)
class Batches:
    """How a step is computed.

    Attributes:
        size: rows of a step.
        micro_size: rows of one forward pass. Fewer take less memory and draw other dropout masks,
            so that scores differ as they do between seeds.
        precision: `fp32`, or `bf16` for products in BF16 with weights in fp32.
    """

    size: int
    micro_size: int
    precision: str

    def check(self) -> None:
        """Refuse a precision that this machine does not support.

        Raises:
            UserError: BF16 on a GPU that does not support it.
        """
        if (
            self.precision == "bf16"
            and torch.cuda.is_available()
            and not is_torch_bf16_gpu_available()
        ):
            raise UserError(
                f"--precision bf16: {torch.cuda.get_device_name()} computes no BF16; leave it out "
                "(fp32)"
            )


@dataclass(frozen=True)
class PreparedTask:
    """A task encoded for a model."""

    task: Task
    recipe: Recipe
    tokenizer: Any
    train: Sequence[Row]
    valid: ValidSet


def train_cell(
    source: ModelSource, task: PreparedTask, cell: Cell, batches: Batches
) -> dict[str, Any]:
    """Fine-tune a fresh model on all of `task.train` and score it once on `task.valid`.

    Uses AdamW without weight decay, gradients clipped to 1, and a learning rate that rises linearly
    over the warm-up and falls linearly to 0. The seed determines the head's weights, the order of
    rows and dropout.

    Returns:
        The cell's record: `learning_rate`, `epochs`, `seed`; `scores` by metric; `diverged`: the
        model gave numbers that are not finite, and every score is 0; `steps`; `seconds`, of
        training and evaluation; `micro_batch_size`; `device`; `versions`.

    Raises:
        DataError: the model cannot be loaded (see `ModelSource.load_model`).
    """
    began = time.monotonic()
    steps = math.ceil(len(task.train) / batches.size) * cell.epochs
    transformers.set_seed(cell.seed)
    model = source.load_model(task.recipe)
    with tempfile.TemporaryDirectory(prefix="jglue-") as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(folder, cell, batches, steps),
            train_dataset=list(task.train),
            data_collator=task.recipe.collator(task.tokenizer),
            callbacks=[_Progress(str(cell))],
        )
        trainer.remove_callback(PrinterCallback)
        # The heads' losses are means over rows, whatever arguments their forward passes accept.
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        logits = trainer.predict(list(task.valid.rows)).predictions
    device = trainer.args.device
    scores = _scores(task.valid, logits)
    del trainer, model
    # A trainer has reference cycles, which keep the model's memory.
    gc.collect()
    torch.cuda.empty_cache()
    return {
        **asdict(cell),
        "scores": scores or dict.fromkeys(task.task.metrics, 0.0),
        "diverged": scores is None,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "micro_batch_size": batches.micro_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _arguments(folder: str, cell: Cell, batches: Batches, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        learning_rate=cell.learning_rate,
        num_train_epochs=cell.epochs,
        # Computed here, because releases of transformers differ in how they take a ratio.
        warmup_steps=math.ceil(WARMUP_RATIO * steps),
        lr_scheduler_type="linear",
        per_device_train_batch_size=batches.micro_size,
        gradient_accumulation_steps=batches.size // batches.micro_size,
        per_device_eval_batch_size=batches.micro_size,
        # Set explicitly; otherwise BF16 on the CPU is refused.
        use_cpu=not torch.cuda.is_available(),
        bf16=batches.precision == "bf16",
        seed=cell.seed,
        data_seed=cell.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _scores(valid: ValidSet, logits: Any) -> Scores | None:
    """Scores, or None if the model has diverged."""
    arrays = logits if isinstance(logits, tuple) else (logits,)
    if not all(np.isfinite(array).all() for array in arrays):
        return None
    return valid.score(logits)


class _Progress(TrainerCallback):
    """Shows steps on standard error."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = ProgressBar(self._title, state.max_steps, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._bar is not None
        self._bar.show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._bar is not None
        self._bar.close()
