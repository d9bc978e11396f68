"""A block whose products are PyTorch's, and what stands between them is fused kernels'.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D hidden,
F features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.attention import PackedLayout
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.model.fused_activation import gated_down
from megatron_bert.model.fused_norm import Branch, Normed, add_branch, residual_norm
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.linear import ColumnParallelLinear, column_parallel
from megatron_bert.parallel.sharding import local_part


def fused_block(block: Block, x_TD: Tensor, layout: PackedLayout, dropout: BlockDropout) -> Tensor:
    """[T, D] -> [T, D], what the block computes without them."""
    probability = block.dropout if block.training else 0.0
    attention, feed_forward, tp = block.attention, block.feed_forward, block.attention.tp
    # Recomputation in full keeps nothing of a block but its input, and would keep this.
    remakes = not (block.recompute and block.training)

    inputs = (attention.query, attention.key, attention.value)
    x_TD, normed = _first_norm(block, x_TD, len(inputs) if tp.size == 1 else 1)
    q, k, v = _products(normed, inputs, tp, remakes=remakes)
    mixed_NF = attention.mix(q, k, v, layout, dropout.attention_weights_B)
    y_TD = attention.output.without_bias(mixed_NF)
    draws = (dropout.attention_T, dropout.channels_D)
    branch = Branch(y_TD, attention.output.bias, probability, *draws)

    norm, wide = block.feed_forward_norm, (feed_forward.gate, feed_forward.up)
    assert isinstance(norm, LayerNorm)
    x_TD, normed = residual_norm(
        x_TD, branch, norm.weight, norm.bias, norm.eps, len(wide) if tp.size == 1 else 1
    )
    gate, up = _products(normed, wide, tp, remakes=remakes, with_biases=False)
    gate_bias, up_bias = (None if w.bias is None else local_part(w.bias) for w in wide)
    y_ND = gated_down(gate, up, gate_bias, up_bias, feed_forward.down, feed_forward.activation)
    y_TD = feed_forward.down.sum_over_ranks(y_ND)
    draws = (dropout.feed_forward_T, dropout.channels_D)
    return add_branch(x_TD, Branch(y_TD, feed_forward.down.bias, probability, *draws))


def _first_norm(block: Block, x_TD: Tensor, copies: int) -> tuple[Tensor, Normed]:
    norm = block.attention_norm
    if isinstance(norm, LayerNorm):
        return residual_norm(x_TD, None, norm.weight, norm.bias, norm.eps, copies)
    # The embeddings' norm serves: what the products keep is the residual stream itself.
    return x_TD, Normed((x_TD,) * copies, x_TD.detach)


def _products(
    normed: Normed,
    layers: Sequence[ColumnParallelLinear],
    tp: TensorParallelGroup,
    *,
    remakes: bool,
    with_biases: bool = True,
) -> tuple[Tensor, ...]:
    """Column-parallel layers of a norm, which they do not keep; one tensor [N, F] a layer."""
    # Several layers of one copy are those that sum its gradient over the ranks together.
    layers = tuple(layers)
    groups = [(layer,) for layer in layers] if len(normed.copies) > 1 else [layers]
    saved = _MadeAgain(normed)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
    with hooks if remakes else nullcontext():
        return tuple(
            y_NF
            for copy_TD, group in zip(normed.copies, groups, strict=True)
            for y_NF in column_parallel(copy_TD, group, tp, with_biases=with_biases)
        )


class _MadeAgain:
    """Stands for a norm's output where autograd keeps it: backward it is made, once for all."""

    def __init__(self, normed: Normed) -> None:
        # No reference, which would keep it.
        self._address = normed.copies[0].data_ptr()
        self._make = normed.again
        self._uses = self._left = 0
        self._made: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | None:
        """What is kept of a tensor; None of the norm's output."""
        if tensor.data_ptr() != self._address:
            return tensor
        self._uses += 1
        return None

    def unpack(self, kept: Tensor | None) -> Tensor:
        """What was packed; the norm's output is held until all have had it."""
        if kept is not None:
            return kept
        if self._made is None:
            self._made, self._left = self._make(), self._uses
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made
