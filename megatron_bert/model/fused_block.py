"""A block whose products are PyTorch's, and what stands between them is fused kernels'.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D hidden,
F features out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.attention import PackedLayout, SelfAttention
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.model.fused_activation import gated_down
from megatron_bert.model.fused_norm import Branch, Normed, add_branch, residual_norm
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.linear import ColumnParallelLinear, joined_column_parallel
from megatron_bert.parallel.sharding import local_part


def fused_block(block: Block, x_TD: Tensor, layout: PackedLayout, dropout: BlockDropout) -> Tensor:
    """[T, D] -> [T, D], what the block computes without them."""
    probability = block.dropout if block.training else 0.0
    attention, feed_forward, tp = block.attention, block.feed_forward, block.attention.tp
    # Recomputation in full keeps nothing of a block but its input, and would keep this.
    remakes = not (block.recompute and block.training)

    x_TD, normed = _first_norm(block, x_TD)
    mixed_NF = _mixed(attention, normed, layout, dropout.attention_weights_B, remakes=remakes)
    y_TD = attention.output.without_bias(mixed_NF)
    draws = (dropout.attention_T, dropout.channels_D)
    branch = Branch(y_TD, attention.output.bias, probability, *draws)

    norm, wide = block.feed_forward_norm, (feed_forward.gate, feed_forward.up)
    assert isinstance(norm, LayerNorm)
    x_TD, normed = residual_norm(x_TD, branch, norm.weight, norm.bias, norm.eps)
    gate_up_NF = _product(normed, wide, tp, remakes=remakes, with_biases=False)
    gate_bias, up_bias = (None if w.bias is None else local_part(w.bias) for w in wide)
    y_ND = gated_down(gate_up_NF, gate_bias, up_bias, feed_forward.down, feed_forward.activation)
    y_TD = feed_forward.down.sum_over_ranks(y_ND)
    draws = (dropout.feed_forward_T, dropout.channels_D)
    return add_branch(x_TD, Branch(y_TD, feed_forward.down.bias, probability, *draws))


def _first_norm(block: Block, x_TD: Tensor) -> tuple[Tensor, Normed]:
    norm = block.attention_norm
    if isinstance(norm, LayerNorm):
        return residual_norm(x_TD, None, norm.weight, norm.bias, norm.eps)
    # The embeddings' norm serves: what the product keeps is the residual stream itself.
    return x_TD, Normed(x_TD, x_TD.detach)


def _mixed(
    attention: SelfAttention,
    normed: Normed,
    layout: PackedLayout,
    dropout_keys_B: Tensor,
    *,
    remakes: bool,
) -> Tensor:
    """Attention before its output projection, [N, H x K]."""
    inputs = (attention.query, attention.key, attention.value)
    if attention.mixes_joined(layout):
        qkv_NF = _product(normed, inputs, attention.tp, remakes=remakes, bias_gradients=False)
        biases = [layer.local_parameters()[1] for layer in inputs]
        there = [bias for bias in biases if bias is not None]
        return attention.mix_joined(qkv_NF, there, layout, dropout_keys_B)
    qkv_NF = _product(normed, inputs, attention.tp, remakes=remakes)
    queries = attention.local_heads * attention.head_dim
    keys = (qkv_NF.shape[1] - queries) // 2
    q, k, v = torch.split(qkv_NF, [queries, keys, keys], 1)
    return attention.mix(q, k, v, layout, dropout_keys_B)


def _product(
    normed: Normed,
    layers: tuple[ColumnParallelLinear, ...],
    tp: TensorParallelGroup,
    *,
    remakes: bool,
    **biases: bool,
) -> Tensor:
    """`joined_column_parallel` of a norm, which is not kept."""
    hooks = _made_again(normed) if remakes else nullcontext()
    with hooks:
        return joined_column_parallel(normed.output_TD, layers, tp, **biases)


def _made_again(normed: Normed) -> AbstractContextManager[None]:
    """Where autograd would keep a norm's output it keeps nothing: backward it is made again."""
    # No reference to the output, which would keep it.
    address, again = normed.output_TD.data_ptr(), normed.again

    def pack(tensor: Tensor) -> Tensor | None:
        return None if tensor.data_ptr() == address else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        return again() if kept is None else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
