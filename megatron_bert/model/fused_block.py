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
from megatron_bert.model.fused_activation import gated_activation, gated_activation_gradients
from megatron_bert.model.fused_norm import (
    BranchMask,
    add_branch,
    branch_gradients,
    norm_again,
    norm_gradients,
)
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.deferred import (
    DeferringLayer,
    WeightProducts,
    gradient_dtype,
    weight_gradient,
)
from megatron_bert.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    gathered_tokens,
    joined_gradients,
    summed_over_ranks,
)
from megatron_bert.parallel.sharding import local_part

# A weight or bias that a rank computes with, or its gradient; None where there is none.
Parameter = Tensor | None


def fused_block(block: Block, x_TD: Tensor, layout: PackedLayout, dropout: BlockDropout) -> Tensor:
    """[T, D] -> [T, D], what the block computes without them."""
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
        x_TD, mixed_NF, block, dropout, *_AfterAttention.parameters(block)
    )
    return end_TD


def _remakes(block: Block) -> bool:
    """Whether norms' outputs are made again backward, and not kept.

    Recomputation in full keeps nothing of a block but its input, and has them by then.
    """
    return not (block.recompute and block.training)


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
        kept = None if _remakes(block) else normed
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
        """The norm's weight and bias; weights and biases of output, gate, up and down."""
        norm, wide = _norm(block.feed_forward_norm), block.feed_forward
        assert norm is not None
        layers: tuple[ColumnParallelLinear | RowParallelLinear, ...] = (
            block.attention.output,
            wide.gate,
            wide.up,
            wide.down,
        )
        return [norm.weight, norm.bias, *map(_weight, layers), *map(_bias, layers)]

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
        ctx: Any, x: Tensor, mixed: Tensor, block: Block, dropout: BlockDropout, *parameters: Any
    ) -> Tensor:
        norm_weight, norm_bias, output, gate, up, down, *biases = parameters
        output_bias, gate_bias, up_bias, down_bias = biases
        tp, activation = block.attention.tp, block.feed_forward.activation
        masks = _AfterAttention.masks(block, dropout)

        y = summed_over_ranks(F.linear(mixed, output), tp)
        norm = _norm(block.feed_forward_norm)
        assert norm is not None
        made_by = (norm_weight, norm_bias, norm.eps)
        x, normed, mean, rstd = add_branch(x, masks[0], y, output_bias, made_by)
        kept = None if _remakes(block) else normed
        gate_up = F.linear(gathered_tokens(normed, tp), torch.cat((gate, up)))
        wide_biases = None if gate_bias is None else (gate_bias, up_bias)
        active = gated_activation(gate_up, wide_biases, activation)
        y = summed_over_ranks(F.linear(active, down), tp)
        del active
        end = add_branch(x, masks[1], y, down_bias, None)[0]

        ctx.block, ctx.masks, ctx.parameters = block, masks, parameters
        ctx.save_for_backward(mixed, x, mean, rstd, kept, gate_up, *parameters)
        return end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Parameter, ...]:
        mixed, x, mean, rstd, normed, gate_up, *parameters = ctx.saved_tensors
        norm_weight, norm_bias, output, gate, up, down, *biases = parameters
        block, dtype = ctx.block, gradient_dtype(ctx.parameters[0])
        tp, wide = block.attention.tp, block.feed_forward
        wide_biases = None if biases[1] is None else (biases[1], biases[2])

        y_grad, down_bias_grad = branch_gradients(grads[0], ctx.masks[1], dtype)
        y_grad = gathered_tokens(y_grad, tp)
        # The activation itself, once its gradient is used up.
        active = y_grad @ down
        gate_up_grad, wide_bias_grads = gated_activation_gradients(
            active, gate_up, wide_biases, wide.activation, dtype
        )
        down_grad = _weight_gradient(wide.down, y_grad, active, ctx.parameters[5])
        # Wide ones go once they are used up: other layers' activations still stand.
        del active, y_grad
        if normed is None:
            normed = norm_again(x, mean, rstd, norm_weight, norm_bias)
        normed_grad, wide_grads = joined_gradients(
            gate_up_grad, normed, (gate, up), (wide.gate, wide.up), tp, ctx.parameters[3]
        )
        del gate_up_grad, normed
        x_grad, y_grad, norm_grads = norm_gradients(
            normed_grad, grads[0], x, mean, rstd, norm_weight, ctx.masks[0],
            has_bias=norm_bias is not None, dtype=dtype,
        )  # fmt: skip
        y_grad = gathered_tokens(y_grad, tp)
        output_grad = _weight_gradient(block.attention.output, y_grad, mixed, ctx.parameters[2])
        output_bias_grad = norm_grads.pop() if ctx.masks[0].has_bias else None
        return (
            x_grad,
            y_grad @ output,
            None,
            None,
            *_pair(norm_grads),
            output_grad,
            *wide_grads,
            down_grad,
            output_bias_grad,
            *((None, None) if wide_bias_grads is None else wide_bias_grads),
            down_bias_grad,
        )


def _pair(norm_grads: Sequence[Tensor]) -> tuple[Parameter, Parameter]:
    """Of a norm's weight and bias; the bias's may be missing."""
    return norm_grads[0], norm_grads[1] if len(norm_grads) > 1 else None


def _weight_gradient(
    layer: DeferringLayer, y_grad_ND: Tensor, x_NF: Tensor, parameter: Tensor
) -> Parameter:
    """`weight_gradient`; None where the product is left for later."""
    if layer.deferred is None:
        return weight_gradient(y_grad_ND, x_NF, parameter)
    layer.deferred.append(WeightProducts([layer], x_NF, [y_grad_ND], unrounded=True))
    return None
