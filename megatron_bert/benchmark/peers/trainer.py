"""Training steps of transformers' Trainer, on the model that our exports load as."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_bert.benchmark.peers.step_rows import StepRows
from megatron_bert.benchmark.synthetic import CLS, MASK, PAD, SEP
from megatron_bert.checkpoint.huggingface_config import huggingface_config
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_work import wait_for_device


def time_trainer(
    config: Config,
    vocab_size: int,
    pieces: list[NDArray[np.int32]],
    step: StepRows,
    warm_up: int,
    device: torch.device,
) -> float:
    """Train for one epoch of pieces, padded by its own collator to the longest of each batch.

    Uses SDPA, the compute dtype by autocast, and the Trainer's default optimizer (fused AdamW).

    Args:
        config: its model, masking and precision are used.
        vocab_size: padded vocabulary.
        pieces: tokens of the rows; their number divides evenly into steps.
        step: the rows of a step.
        warm_up: number of steps that are not timed.
        device: where it trains; one GPU or the CPU.

    Returns:
        Seconds of a step, averaged over those after the warm-up.
    """
    # Imported here: nothing else in this package needs transformers.
    from transformers import (
        DataCollatorForLanguageModeling,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    examples = [{"input_ids": [CLS, *map(int, piece), SEP]} for piece in pieces]
    with tempfile.TemporaryDirectory(prefix="megatron_bert_trainer_") as folder:
        tokenizer = _tokenizer(vocab_size)
        collator = DataCollatorForLanguageModeling(
            tokenizer=tokenizer, mlm_probability=config.mlm.probability
        )
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=step.micro_rows,
            gradient_accumulation_steps=step.micro_batches,
            num_train_epochs=1,
            bf16=config.precision.compute == "bf16",
            use_cpu=device.type == "cpu",
            learning_rate=1e-5,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            # This filter would wait for the device in each step.
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            # Batches are made in parallel with the steps, if there are cores for it.
            dataloader_num_workers=4 if device.type == "cuda" else 0,
        )
        # With more GPUs it would split each batch over them.
        arguments._n_gpu = min(1, arguments.n_gpu)
        clock = _clock(warm_up, device)
        with device:
            model = trainer_model(config, vocab_size)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collator,
            callbacks=[clock],
        )
        # This callback would print its own figures on standard output.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return float(clock.seconds_a_step)


def trainer_model(config: Config, vocab_size: int) -> torch.nn.Module:
    """The model as its export loads in transformers, with random weights."""
    ids = dict.fromkeys(
        [f"{role}_token_id" for role in ("pad", "bos", "eos", "cls", "sep", "unk", "mask")]
    )
    content = huggingface_config(config.model, vocab_size, "fp32", {**ids, "pad_token_id": PAD})
    for key in ("auto_map", "torch_dtype"):
        content.pop(key, None)
    model: torch.nn.Module
    if config.model.architecture == "retrievabert":
        from megatron_bert.huggingface.configuration_retrieva_bert import RetrievaBertConfig
        from megatron_bert.huggingface.modeling_retrieva_bert import RetrievaBertForMaskedLM

        model = RetrievaBertForMaskedLM(RetrievaBertConfig(**content, attn_implementation="sdpa"))
    else:
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        model = ModernBertForMaskedLM(ModernBertConfig(**content, attn_implementation="sdpa"))
    return model


def _tokenizer(vocab_size: int) -> Any:
    """A tokenizer with a vocabulary of this size, whose tokens are numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = {number: str(number) for number in range(vocab_size)}
    words = {name: number for number, name in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=names[0])),
        unk_token=names[0],
        pad_token=names[PAD],
        cls_token=names[CLS],
        sep_token=names[SEP],
        mask_token=names[MASK],
    )


def _clock(warm_up: int, device: torch.device) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Records the time at the end of the warm-up and at the end of training."""

        began = seconds_a_step = 0.0

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step in (warm_up, state.max_steps):
                wait_for_device(device)
            if state.global_step == warm_up:
                self.began = time.perf_counter()
            elif state.global_step == state.max_steps:
                steps = state.max_steps - warm_up
                self.seconds_a_step = (time.perf_counter() - self.began) / steps

    return Clock()
