"""A block that computes products by PyTorch, and everything between them by fused kernels.

Forward and backward are written out, in two functions around attention: an operator that autograd
records costs the host as much time as a small micro-batch's product costs the GPU.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D hidden,
F features of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_bert.model.attention import PackedLayout
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.model.fused_feed_forward import (
    Branch,
    FeedForwardParameters,
    FeedForwardPasses,
    Kept,
    OptionalTensor,
    left_or_computed,
    remakes,
)
from megatron_bert.model.fused_norm import BranchMask, add_branch, norm_again, norm_gradients
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.gradient_sums import added_to_sums, gradient_dtype
from megatron_bert.parallel.joined import joined_rows
from megatron_bert.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    gathered_tokens,
    joined_gradients,
    summed_over_ranks,
)
from megatron_bert.parallel.sharding import local_part

Linear = ColumnParallelLinear | RowParallelLinear


def fused_block(
    block: Block,
    x_TD: Tensor,
    layout: PackedLayout,
    dropout: BlockDropout,
    *,
    passes: FeedForwardPasses,
) -> Tensor:
    """[T, D] -> [T, D], what the block computes without fused kernels.

    Args:
        block: the block whose parameters and sizes are used, as in `BlockKernel`.
        x_TD: the residual stream.
        layout: which slots see each other.
        dropout: what is dropped in this block.
        passes: what computes the feed-forward network.
    """
    attention, parameters = block.attention, InputParameters.of(block)
    joined = attention.mixes_joined(layout)
    biases = [bias for bias in parameters.biases if bias is not None]
    if joined:
        # The biases' gradients come from attention.
        parameters = parameters.without_bias_gradients()
    x_TD, qkv_NF = _AttentionInputs.apply(x_TD, block, *parameters)  # type: ignore[no-untyped-call]
    if joined:
        mixed_NF = attention.mix_joined(qkv_NF, biases, layout, dropout.attention_weights_B)
    else:
        queries = attention.local_heads * attention.head_dim
        keys = (qkv_NF.shape[1] - queries) // 2
        q, k, v = torch.split(qkv_NF, [queries, keys, keys], 1)
        mixed_NF = attention.mix(q, k, v, layout, dropout.attention_weights_B)
    end_TD: Tensor = _AfterAttention.apply(  # type: ignore[no-untyped-call]
        x_TD, mixed_NF, block, dropout, passes, *OutputParameters.of(block)
    )
    return end_TD


class InputParameters(NamedTuple):
    """Parameters before attention that a rank computes with, or their gradients."""

    norm_weight: OptionalTensor
    norm_bias: OptionalTensor
    query: OptionalTensor
    key: OptionalTensor
    value: OptionalTensor
    query_bias: OptionalTensor
    key_bias: OptionalTensor
    value_bias: OptionalTensor

    @classmethod
    def of(cls, block: Block) -> InputParameters:
        """A block's; its first norm's are missing where the embeddings' norm takes its place."""
        norm, layers = block.attention_norm, _input_layers(block)
        pair = (norm.weight, norm.bias) if isinstance(norm, LayerNorm) else (None, None)
        return cls(*pair, *map(_weight, layers), *map(_bias, layers))

    @property
    def weights(self) -> list[Tensor]:
        """The weights of queries, keys and values."""
        return [x for x in (self.query, self.key, self.value) if x is not None]

    @property
    def biases(self) -> tuple[OptionalTensor, OptionalTensor, OptionalTensor]:
        """The biases of queries, keys and values."""
        return self.query_bias, self.key_bias, self.value_bias

    def without_bias_gradients(self) -> InputParameters:
        """The same parameters, but with the layers' biases detached from autograd."""
        biases = (None if bias is None else bias.detach() for bias in self.biases)
        return InputParameters(*self[:5], *biases)


class OutputParameters(NamedTuple):
    """Parameters after attention that a rank computes with, or their gradients."""

    output: OptionalTensor
    output_bias: OptionalTensor
    norm_weight: OptionalTensor
    norm_bias: OptionalTensor
    gate: OptionalTensor
    up: OptionalTensor
    down: OptionalTensor
    gate_bias: OptionalTensor
    up_bias: OptionalTensor
    down_bias: OptionalTensor

    @classmethod
    def of(cls, block: Block) -> OutputParameters:
        """A block's."""
        norm, network, output = block.feed_forward_norm, block.feed_forward, block.attention.output
        assert isinstance(norm, LayerNorm)
        layers: tuple[Linear, ...] = (network.gate, network.up, network.down)
        of_norm = (norm.weight, norm.bias)
        return cls(
            _weight(output), _bias(output), *of_norm, *map(_weight, layers), *map(_bias, layers)
        )

    @property
    def network(self) -> FeedForwardParameters:
        """The parameters that the feed-forward passes take."""
        found = {name: getattr(self, name) for name in FeedForwardParameters._fields}
        return FeedForwardParameters(**found)


def _input_layers(block: Block) -> tuple[ColumnParallelLinear, ...]:
    """The layers that one product of the first norm's output computes."""
    attention = block.attention
    return attention.query, attention.key, attention.value


def _weight(layer: Linear) -> Tensor:
    """A layer's weight; detached where its product is deferred."""
    # `kernels: fused` is refused together with anything that computes products by itself.
    assert layer.product is None
    weight = local_part(layer.weight)
    return weight if layer.deferred is None else weight.detach()


def _bias(layer: Linear) -> OptionalTensor:
    return None if layer.bias is None else local_part(layer.bias)


class _AttentionInputs(torch.autograd.Function):
    """The block's first norm, and queries, keys and values by one product of it.

    The input is returned too, so that both its gradients come back to one place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *tensors: Any) -> tuple[Tensor, Tensor]:
        parameters = InputParameters(*tensors)
        # Kernels take dense rows, backward too.
        x = x.contiguous()
        normed = mean = rstd = x
        norm = block.attention_norm
        if parameters.norm_weight is not None:
            assert isinstance(norm, LayerNorm)
            made_by = (parameters.norm_weight, parameters.norm_bias, norm.eps)
            _, normed, mean, rstd = add_branch(x, None, None, None, made_by)
        kept = None if remakes(block) else normed
        ctx.block, ctx.known = block, parameters
        ctx.save_for_backward(x, mean, rstd, kept, *parameters)
        biases = [bias for bias in parameters.biases if bias is not None]
        normed = gathered_tokens(normed, block.attention.tp)
        weight = joined_rows(parameters.weights)
        return x.view_as(x), F.linear(normed, weight, joined_rows(biases) if biases else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[OptionalTensor, ...]:
        x_grad, qkv_grad = grads
        x, mean, rstd, normed, *tensors = ctx.saved_tensors
        parameters, known = InputParameters(*tensors), ctx.known
        norm_weight, norm_bias = tensors[:2]
        if normed is None:
            has_norm = norm_weight is not None
            normed = norm_again(x, mean, rstd, norm_weight, norm_bias) if has_norm else x
        bias_grads: tuple[OptionalTensor, ...] = (None, None, None)
        if known.query_bias is not None and known.query_bias.requires_grad:
            # Attention did not compute them.
            sums = column_sums(qkv_grad, gradient_dtype(known.query_bias))
            bias_grads = torch.split(sums, [len(weight) for weight in parameters.weights])
        normed_grad, weight_grads = joined_gradients(
            qkv_grad,
            normed,
            parameters.weights,
            _input_layers(ctx.block),
            ctx.block.attention.tp,
            known.weights,
        )
        norm_grads: tuple[OptionalTensor, OptionalTensor] = (None, None)
        if norm_weight is None:
            x_grad = x_grad + normed_grad
        else:
            x_grad, _, sums_of_norm = norm_gradients(
                normed_grad, x_grad, x, mean, rstd, norm_weight, None,
                has_bias=norm_bias is not None, dtype=gradient_dtype(known.norm_weight),
            )  # fmt: skip
            norm_grads = _pair(sums_of_norm)
        gradients = InputParameters(*norm_grads, *weight_grads, *bias_grads)
        return x_grad, None, *added_to_sums(known, gradients)


class _AfterAttention(torch.autograd.Function):
    """From attention's output to the block's."""

    @staticmethod
    def masks(block: Block, dropout: BlockDropout) -> tuple[BranchMask, BranchMask]:
        """The masks of attention's branch and of the feed-forward network's."""
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
        *tensors: Any,
    ) -> Tensor:
        parameters = OutputParameters(*tensors)
        assert parameters.output is not None
        masks = _AfterAttention.masks(block, dropout)
        y = summed_over_ranks(F.linear(mixed, parameters.output), block.attention.tp)
        branch = Branch(masks[0], y, parameters.output_bias)
        y, kept = passes.forward(block, x, branch, parameters.network)
        end = add_branch(kept.x, masks[1], y, parameters.down_bias, None)[0]
        ctx.block, ctx.masks, ctx.passes, ctx.known = block, masks, passes, parameters
        ctx.save_for_backward(mixed, kept.x, kept.mean, kept.rstd, *parameters, *kept.others)
        return end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[OptionalTensor, ...]:
        block, known = ctx.block, ctx.known
        mixed, x, mean, rstd, *others = ctx.saved_tensors
        parameters, kept = OutputParameters(*others[: len(known)]), others[len(known) :]
        network, mask = parameters.network, ctx.masks[0]
        gradients = ctx.passes.backward(
            block,
            grads[0],
            ctx.masks[1],
            Kept(x, mean, rstd, tuple(kept)),
            network,
            known.network,
        )
        x_grad, y_grad, sums_of_norm = norm_gradients(
            gradients.normed, grads[0], x, mean, rstd, network.norm_weight, mask,
            has_bias=network.norm_bias is not None, dtype=gradient_dtype(known.norm_weight),
        )  # fmt: skip
        output_bias = sums_of_norm.pop() if mask.has_bias else None
        y_grad = gathered_tokens(y_grad, block.attention.tp)
        output = left_or_computed(block.attention.output, y_grad, mixed, known.output)
        given = OutputParameters(
            output, output_bias, *_pair(sums_of_norm), *gradients.weights, *gradients.biases
        )
        assert parameters.output is not None
        mixed_grad = y_grad @ parameters.output
        return x_grad, mixed_grad, None, None, None, *added_to_sums(known, given)


def _pair(norm_grads: list[Tensor]) -> tuple[OptionalTensor, OptionalTensor]:
    """The gradients of a norm's weight and bias; the bias's may be missing."""
    return norm_grads[0], norm_grads[1] if len(norm_grads) > 1 else None
