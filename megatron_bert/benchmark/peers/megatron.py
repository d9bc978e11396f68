"""Training steps of Megatron-core's own BERT, at a configuration's shapes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from megatron_bert.benchmark.peers.padded import IGNORED, PaddedRows
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_work import wait_for_device

_LEARNING_RATE = 1e-5


def time_megatron(
    config: Config,
    vocab_size: int,
    batches: list[PaddedRows],
    micro_batches: int,
    warm_up: int,
    device: torch.device,
) -> float:
    """Train on padded rows; the process group has been started, with one rank.

    Uses Megatron-core's layer specification without Transformer Engine, its vocabulary-parallel
    cross-entropy, and PyTorch's fused AdamW on the weights as they are. In BF16, weights and
    moments are BF16, and so are the gradients summed over several micro-batches: less work than
    Megatron's optimizer has with its fp32 copies and sums.

    Args:
        config: its model and precision are used.
        vocab_size: padded vocabulary.
        batches: micro-batches.
        micro_batches: per step.
        warm_up: number of steps that are not timed.
        device: where it trains.

    Returns:
        Seconds of a step, averaged over those after the warm-up.
    """
    inputs = [
        [torch.from_numpy(array) for array in (rows.tokens_BS, rows.mask_BS, rows.labels_BS)]
        for rows in batches
    ]
    with warnings.catch_warnings(), _on(device):
        # Megatron-core warns about absent optional parts.
        warnings.simplefilter("ignore")
        model = megatron_model(config, vocab_size).to(device)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE, fused=True
        )
        began, steps = 0.0, len(inputs) // micro_batches
        for number, tensors in enumerate(inputs):
            if number == warm_up * micro_batches:
                wait_for_device(device)
                began = time.perf_counter()
            tokens, mask, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
            chosen = labels != IGNORED
            losses, _ = model(tokens, mask, lm_labels=torch.where(chosen, labels, 0))
            loss = (losses.float() * chosen).sum() / chosen.sum()
            (loss / micro_batches).backward()
            if (number + 1) % micro_batches:
                continue
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        wait_for_device(device)
    return (time.perf_counter() - began) / (steps - warm_up)


def megatron_model(config: Config, vocab_size: int) -> Any:
    """Megatron-core's BERT with the configuration's shapes and compute dtype.

    Query, key and value are one product there, as are gate and up.
    """
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(0)
    shape, in_bf16 = config.model, config.precision.compute == "bf16"
    transformer = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
        bf16=in_bf16,
        params_dtype=torch.bfloat16 if in_bf16 else torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_dropout_fusion=True,
        bias_activation_fusion=True,
        # This kernel belongs to Megatron-LM or Apex, not to this package.
        masked_softmax_fusion=find_spec("scaled_masked_softmax_cuda") is not None,
    )
    model = BertModel(
        config=transformer,
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        add_binary_head=False,
        share_embeddings_and_output_weights=True,
    )
    # `params_dtype` applies only to the parallel layers; convert norms and positions here.
    return model.bfloat16() if in_bf16 else model


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """On a CPU, answer what Megatron-core asks CUDA for: the device's number and generators."""
    if device.type == "cuda":
        yield
        return
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with (
        mock.patch.object(torch.cuda, "current_device", return_value=device),
        mock.patch.object(CudaRNGStatesTracker, "fork", return_value=contextlib.nullcontext()),
    ):
        yield
