"""A block whose products are PyTorch's, and what stands between them is fused kernels'.

Forward and backward are written out, in two functions around attention: an operator that autograd
records costs the host as much time as a small micro-batch's product costs the GPU.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D hidden,
F features of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.model.attention import PackedLayout
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.model.fused_feed_forward import (
    Branch,
    FeedForwardParameters,
    FeedForwardPasses,
    Kept,
    Parameter,
    left_or_computed,
    remakes,
)
from megatron_bert.model.fused_norm import BranchMask, add_branch, norm_again, norm_gradients
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.deferred import gradient_dtype
from megatron_bert.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    gathered_tokens,
    joined_gradients,
    summed_over_ranks,
)
from megatron_bert.parallel.sharding import local_part


def fused_block(
    block: Block,
    x_TD: Tensor,
    layout: PackedLayout,
    dropout: BlockDropout,
    *,
    passes: FeedForwardPasses,
) -> Tensor:
    """[T, D] -> [T, D], what the block computes without them.

    Args:
        block: as `BlockKernel` takes it, like the following.
        x_TD: the same.
        layout: the same.
        dropout: the same.
        passes: what computes the feed-forward network.
    """
    attention, parameters = block.attention, _AttentionInputs.parameters(block)
    biases = [bias for bias in parameters[-3:] if bias is not None]
    joined = attention.mixes_joined(layout)
    if joined:
        # Their gradients come from attention.
        parameters[-3:] = [None if bias is None else bias.detach() for bias in parameters[-3:]]
    x_TD, qkv_NF = _AttentionInputs.apply(x_TD, block, *parameters)  # type: ignore[no-untyped-call]
    if joined:
        mixed_NF = attention.mix_joined(qkv_NF, biases, layout, dropout.attention_weights_B)
    else:
        queries = attention.local_heads * attention.head_dim
        keys = (qkv_NF.shape[1] - queries) // 2
        q, k, v = torch.split(qkv_NF, [queries, keys, keys], 1)
        mixed_NF = attention.mix(q, k, v, layout, dropout.attention_weights_B)
    end_TD: Tensor = _AfterAttention.apply(  # type: ignore[no-untyped-call]
        x_TD, mixed_NF, block, dropout, passes, *_AfterAttention.parameters(block)
    )
    return end_TD


def _weight(layer: ColumnParallelLinear | RowParallelLinear) -> Tensor:
    """A layer's weight; without a gradient where its product is left for later."""
    # `kernels: fused` is refused beside what computes products by itself.
    assert layer.product is None
    weight = local_part(layer.weight)
    return weight if layer.deferred is None else weight.detach()


def _bias(layer: ColumnParallelLinear | RowParallelLinear) -> Parameter:
    return None if layer.bias is None else local_part(layer.bias)


def _norm(module: nn.Module) -> LayerNorm | None:
    """A block's norm; None in place of the first one, where the embeddings' serves."""
    return module if isinstance(module, LayerNorm) else None


class _AttentionInputs(torch.autograd.Function):
    """The block's first norm, and queries, keys and values by one product of it.

    The input is returned too, so that both its gradients come back to one place.
    """

    @staticmethod
    def layers(block: Block) -> tuple[ColumnParallelLinear, ...]:
        """Those of the product."""
        attention = block.attention
        return attention.query, attention.key, attention.value

    @staticmethod
    def parameters(block: Block) -> list[Parameter]:
        """The norm's weight and bias, if it has them; weights and biases of the layers."""
        norm, layers = _norm(block.attention_norm), _AttentionInputs.layers(block)
        pair = (None, None) if norm is None else (norm.weight, norm.bias)
        return [*pair, *map(_weight, layers), *map(_bias, layers)]

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *parameters: Any) -> tuple[Tensor, Tensor]:
        norm_weight, norm_bias, *others = parameters
        weights, biases = others[:3], others[3:]
        # Kernels take dense rows, backward too.
        x = x.contiguous()
        normed = mean = rstd = x
        norm = _norm(block.attention_norm)
        if norm is not None:
            made_by = (norm_weight, norm_bias, norm.eps)
            _, normed, mean, rstd = add_branch(x, None, None, None, made_by)
        kept = None if remakes(block) else normed
        ctx.block, ctx.parameters = block, parameters
        ctx.save_for_backward(x, mean, rstd, kept, norm_weight, norm_bias, *weights)
        bias = None if biases[0] is None else torch.cat(biases)
        normed = gathered_tokens(normed, block.attention.tp)
        return x.view_as(x), F.linear(normed, torch.cat(weights), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Parameter, ...]:
        x_grad, qkv_grad = grads
        x, mean, rstd, normed, norm_weight, norm_bias, *weights = ctx.saved_tensors
        has_norm = norm_weight is not None
        if normed is None:
            normed = norm_again(x, mean, rstd, norm_weight, norm_bias) if has_norm else x
        bias_grads: Sequence[Parameter] = (None, None, None)
        if any(ctx.needs_input_grad[-len(weights) :]):
            # Attention did not give them.
            sums = column_sums(qkv_grad, gradient_dtype(ctx.parameters[-1]))
            bias_grads = torch.split(sums, [len(weight) for weight in weights])
        normed_grad, weight_grads = joined_gradients(
            qkv_grad,
            normed,
            weights,
            _AttentionInputs.layers(ctx.block),
            ctx.block.attention.tp,
            ctx.parameters[2],
        )
        if not has_norm:
            return x_grad + normed_grad, None, None, None, *weight_grads, *bias_grads
        x_grad, _, norm_grads = norm_gradients(
            normed_grad, x_grad, x, mean, rstd, norm_weight, None,
            has_bias=norm_bias is not None, dtype=gradient_dtype(ctx.parameters[0]),
        )  # fmt: skip
        return x_grad, None, *_pair(norm_grads), *weight_grads, *bias_grads


class _AfterAttention(torch.autograd.Function):
    """From attention's output to the block's."""

    @staticmethod
    def parameters(block: Block) -> list[Parameter]:
        """Weight and bias of attention's output, the network's, and the down projection's bias."""
        norm, network = _norm(block.feed_forward_norm), block.feed_forward
        assert norm is not None
        layers = (network.gate, network.up, network.down)
        weights = [_weight(layer) for layer in layers]
        biases = [_bias(layer) for layer in layers]
        output = block.attention.output
        return [_weight(output), _bias(output), norm.weight, norm.bias, *weights, *biases]

    @staticmethod
    def masks(block: Block, dropout: BlockDropout) -> tuple[BranchMask, BranchMask]:
        """Of attention's branch and of the feed-forward network's."""
        probability, channels = block.dropout if block.training else 0.0, dropout.channels_D
        biases = (block.attention.output.bias, block.feed_forward.down.bias)
        draws = (dropout.attention_T, dropout.feed_forward_T)
        first, second = (
            BranchMask(probability, draws_T, channels, bias is not None)
            for draws_T, bias in zip(draws, biases, strict=True)
        )
        return first, second

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mixed: Tensor,
        block: Block,
        dropout: BlockDropout,
        passes: FeedForwardPasses,
        *parameters: Any,
    ) -> Tensor:
        output, output_bias, *network, down_bias = parameters
        masks = _AfterAttention.masks(block, dropout)
        y = summed_over_ranks(F.linear(mixed, output), block.attention.tp)
        y, kept = passes.forward(
            block, x, Branch(masks[0], y, output_bias), FeedForwardParameters(*network)
        )
        end = add_branch(kept.x, masks[1], y, down_bias, None)[0]
        ctx.block, ctx.masks, ctx.passes, ctx.parameters = block, masks, passes, parameters
        ctx.save_for_backward(mixed, *kept[:3], *parameters, *kept.others)
        return end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Parameter, ...]:
        mixed, x, mean, rstd, *others = ctx.saved_tensors
        count = len(ctx.parameters)
        output, _, *network, _ = others[:count]
        parameters = FeedForwardParameters(*network)
        known = FeedForwardParameters(*ctx.parameters[2:-1])
        kept = Kept(x, mean, rstd, tuple(others[count:]))
        attention, mask = ctx.block.attention, ctx.masks[0]
        gradients = ctx.passes.backward(ctx.block, grads[0], ctx.masks[1], kept, parameters, known)
        x_grad, y_grad, norm_grads = norm_gradients(
            gradients.normed, grads[0], x, mean, rstd, parameters.norm_weight, mask,
            has_bias=parameters.norm_bias is not None, dtype=gradient_dtype(known.norm_weight),
        )  # fmt: skip
        y_grad = gathered_tokens(y_grad, attention.tp)
        output_grad = left_or_computed(attention.output, y_grad, mixed, ctx.parameters[0])
        output_bias = norm_grads.pop() if mask.has_bias else None
        return (
            x_grad,
            y_grad @ output,
            None,
            None,
            None,
            output_grad,
            output_bias,
            *_pair(norm_grads),
            *gradients.weights,
            *gradients.biases,
        )


def _pair(norm_grads: Sequence[Tensor]) -> tuple[Parameter, Parameter]:
    """Of a norm's weight and bias; the bias's may be missing."""
    return norm_grads[0], norm_grads[1] if len(norm_grads) > 1 else None
