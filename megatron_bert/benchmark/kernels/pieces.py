"""The pieces of a step other than attention, by every implementation available.

Shape suffixes: N tokens, M masked ones, D hidden, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.benchmark.kernels.attention import attention_piece
from megatron_bert.benchmark.kernels.fused import activation_product_piece, residual_norm_piece
from megatron_bert.benchmark.kernels.linear import linear_pieces
from megatron_bert.benchmark.kernels.measure import Compute, Piece, made_at_first_call
from megatron_bert.benchmark.kernels.work import (
    KernelWork,
    add_fused,
    hidden_draws,
    with_compiled,
)
from megatron_bert.benchmark.rows import make_batches
from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.kernels import has_nvidias_apex
from megatron_bert.config.schema import ModelConfig, OptimizerConfig
from megatron_bert.model.feed_forward import ACTIVATIONS
from megatron_bert.optim.update_rules import ApexRule, TorchRule, UpdateRule
from megatron_bert.parallel.random import hash_dropout
from megatron_bert.parallel.vocabulary import vocab_parallel_cross_entropy


def make_pieces(work: KernelWork) -> Iterator[Piece]:
    """Yield each piece at the shapes that its cost depends on."""
    model = work.config.model
    for tokens in work.micro_tokens:
        for length in work.seq_lengths:
            rows = max(1, tokens // length)
            mlm = work.config.mlm
            (batch,) = make_batches(
                work.corpora, mlm, length, rows, range(1), 1, pinned=work.device.type == "cuda"
            )
            for given in work.dropouts:
                dropout = model.attention_dropout if given is None else given
                yield attention_piece(model, batch, dropout, work.dtype, work.device)
        yield from linear_pieces(
            model, tokens, work.dtype, work.device, compiled=work.config.compile.enabled
        )
        yield _norm_piece(work, tokens)
        yield _activation_piece(work, tokens)
        yield activation_product_piece(work, tokens)
        for given in work.dropouts:
            dropout = model.hidden_dropout if given is None else given
            yield _residual_piece(work, tokens, dropout)
            yield residual_norm_piece(work, tokens, dropout)
        length = max(work.seq_lengths)
        slots = masked_slots(mlm.probability, mlm.unit, length)
        yield _loss_piece(work, max(1, tokens // length) * slots)
    yield _optimizer_piece(work)


def _norm_piece(work: KernelWork, tokens: int) -> Piece:
    model = work.config.model
    hidden, eps, biases = model.hidden_size, model.norm_eps, model.family.biases
    x_ND, weight_D = work.random(tokens, hidden), nn.Parameter(work.random(hidden).detach())
    bias_D = nn.Parameter(work.random(hidden).detach()) if biases else None
    inputs = [x_ND, weight_D] + ([] if bias_D is None else [bias_D])
    plain = partial(F.layer_norm, x_ND, (hidden,), weight_D, bias_D, eps)
    alternatives, absent = with_compiled(
        work, lambda x, w, b: F.layer_norm(x, (hidden,), w, b, eps), (x_ND, weight_D, bias_D), plain
    )
    for name, make in (("transformer engine", _engine_norm), ("apex", _apex_norm)):
        reason = "has none without a bias" if bias_D is None else _missing(name)
        if reason is None:
            assert bias_D is not None
            made = partial(make, x_ND, weight_D, bias_D, eps)
            alternatives[name] = made_at_first_call(made)
        else:
            absent[name] = reason
    size = x_ND.numel() * x_ND.element_size()
    # Forward reads x and writes y; backward reads x and y's gradient and writes x's.
    return Piece(
        "norm",
        f"{tokens} x {hidden}",
        inputs,
        alternatives,
        absent,
        moved=(2.0 * size, 5.0 * size),
    )


def _engine_norm(x_ND: Tensor, weight_D: nn.Parameter, bias_D: nn.Parameter, eps: float) -> Compute:
    module = import_module("transformer_engine.pytorch").LayerNorm(
        x_ND.shape[1], eps=eps, device=x_ND.device, dtype=x_ND.dtype
    )
    # Replaced permanently: the module reads its weight again in the backward pass.
    module.weight, module.bias = weight_D, bias_D
    return lambda: module(x_ND)


def _apex_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Compute:
    norm = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return lambda: norm(x_ND, weight_D, bias_D, (x_ND.shape[1],), eps)


def _activation_piece(work: KernelWork, tokens: int) -> Piece:
    model = work.config.model
    activation, ffn = ACTIVATIONS[model.family.activation], model.ffn_hidden_size
    inputs = [work.random(tokens, ffn) for _ in range(2)]
    if model.family.biases:
        inputs += [work.random(ffn) for _ in range(2)]

    def gated(gate: Tensor, up: Tensor, *biases: Tensor) -> Tensor:
        if biases:
            gate, up = gate + biases[0], up + biases[1]
        return activation(gate) * up

    alternatives, absent = with_compiled(work, gated, inputs, partial(gated, *inputs))
    size = inputs[0].numel() * inputs[0].element_size()
    # Forward reads two tensors and writes one; backward reads these two and one gradient, and
    # writes two.
    return Piece(
        "activation",
        f"{model.family.activation}, 2 x {tokens} x {ffn}{', biases' * model.family.biases}",
        inputs,
        alternatives,
        absent,
        moved=(3.0 * size, 8.0 * size),
    )


def _residual_piece(work: KernelWork, tokens: int, dropout: float) -> Piece:
    hidden = work.config.model.hidden_size
    x_ND, y_ND = (work.random(tokens, hidden) for _ in range(2))
    biases = [work.random(hidden)] if work.config.model.family.biases else []
    draws = hidden_draws(work, tokens)

    def hashed(x: Tensor, y: Tensor, *biases: Tensor) -> Tensor:
        return x + hash_dropout(y + biases[0] if biases else y, dropout, *draws)

    def fused() -> Tensor:
        # Here: Triton comes with PyTorch for CUDA only.
        from megatron_bert.benchmark.kernels.fused_functions import added
        from megatron_bert.model.fused_norm import BranchMask

        mask = BranchMask(dropout, *draws, bool(biases))
        return added(x_ND, y_ND, biases[0] if biases else None, mask)

    def generated(x: Tensor, y: Tensor, *biases: Tensor) -> Tensor:
        return x + F.dropout(y + biases[0] if biases else y, dropout)

    inputs = (x_ND, y_ND, *biases)
    alternatives, absent = with_compiled(work, hashed, inputs, partial(hashed, *inputs))
    add_fused(work, fused, alternatives, absent)
    alternatives["by a generator"] = partial(generated, *inputs)
    size = x_ND.numel() * x_ND.element_size()
    # The residual's gradient is the output's. With dropout, backward reads it, writes y's gradient
    # and sums the bias's meanwhile; without, y's is the output's too, read only for the bias's.
    backward = 2.0 if dropout else len(biases)
    return Piece(
        "bias, dropout, residual" if biases else "dropout, residual",
        f"{tokens} x {hidden}, dropout {dropout:g}",
        inputs,
        alternatives,
        absent,
        moved=(3.0 * size, (3.0 + backward) * size),
        is_random=dropout > 0.0,
    )


def _loss_piece(work: KernelWork, masked: int) -> Piece:
    hidden, vocab = work.config.model.hidden_size, work.vocab_size
    inputs = (work.random(masked, hidden), work.random(vocab, hidden), work.random(vocab))
    labels_M = torch.randint(vocab, (masked,), device=work.device)
    weights_M = torch.ones(masked, device=work.device)
    group = dist.group.WORLD
    assert group is not None

    def chunked() -> Tensor:
        return vocab_parallel_cross_entropy(*inputs, labels_M, weights_M, group)[0]

    def plain() -> Tensor:
        logits_MV = F.linear(*inputs).float()
        return F.cross_entropy(logits_MV, labels_M, reduction="sum")

    return Piece(
        "projection and cross-entropy",
        f"{masked} x {hidden} x {vocab}",
        inputs,
        {"in chunks (ours)": chunked, "plain": plain},
        {},
        products=2.0 * masked * hidden * vocab,
    )


def _optimizer_piece(work: KernelWork) -> Piece:
    shapes = _block_shapes(work.config.model)
    shards = [torch.randn(shape, device=work.device) for shape in shapes]
    for shard in shards:
        shard.grad = torch.randn_like(shard)
    config = work.config.optimizer
    alternatives = {"fused (ours)": _updating(TorchRule, shards, config)}
    absent = {}
    reason = _missing("apex")
    if reason is None:
        alternatives["apex"] = made_at_first_call(partial(_updating, ApexRule, shards, config))
    else:
        absent["apex"] = reason
    count = sum(shard.numel() for shard in shards)
    # Weight, gradient and two moments are read and written, in fp32: the gradient as divided.
    moved = 8.0 * 4 * count
    return Piece(
        "AdamW",
        f"{count:,} parameters of a block",
        (),
        alternatives,
        absent,
        moved=(moved, moved),
        # Each alternative starts from the weights that the previous one left.
        is_random=True,
    )


def _block_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    matrices = block_matrices(model)
    shapes: list[tuple[int, ...]] = [(matrix.outputs, matrix.inputs) for matrix in matrices]
    if model.family.biases:
        shapes += [(matrix.outputs,) for matrix in matrices]
    norms = 2 * (2 if model.family.biases else 1)
    return shapes + [(model.hidden_size,)] * norms


def _updating(make: type[UpdateRule], shards: list[Tensor], config: OptimizerConfig) -> Compute:
    """The update as in training: with a divisor of the gradients, and a flag to skip it."""
    device = shards[0].device
    matrices, vectors = (
        [s for s in shards if (s.dim() > 1) == is_matrix] for is_matrix in (True, False)
    )
    rule = make(matrices, vectors, config, device)
    for shard in shards:
        moments = {name: torch.zeros_like(shard) for name in ("exp_avg", "exp_avg_sq")}
        rule.keep_moments(shard, moments)
    divisor, skipped = torch.ones((), device=device), torch.zeros((), device=device)

    def update() -> Tensor:
        rule.apply(config.lr, divisor, skipped)
        return shards[0]

    return update


def _missing(name: str) -> str | None:
    """Why NVIDIA's optional package cannot be used; None if it can."""
    if name == "transformer engine":
        there = find_spec("transformer_engine") is not None
        return None if there else "the package transformer_engine is not installed"
    if has_nvidias_apex():
        return None
    return "NVIDIA's apex is not installed (the registry's package of that name is another's)"
