"""The feed-forward half of a fused block: from attention's branch to the network's output.

Forward and backward are written out. With `precision.fp8`, `fp8_feed_forward` computes this half
instead.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D hidden,
F features of this rank, P = 2 F: gate's and then up's.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional as F

from megatron_bert.model.block import Block
from megatron_bert.model.fused_activation import (
    Biases,
    gated_activation,
    gated_activation_gradients,
)
from megatron_bert.model.fused_norm import BranchMask, add_branch, branch_gradients, norm_again
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.deferred import DeferringLayer, WeightProducts
from megatron_bert.parallel.gradient_sums import gradient_dtype, weight_gradients
from megatron_bert.parallel.joined import joined_rows
from megatron_bert.parallel.linear import gathered_tokens, joined_gradients, summed_over_ranks

# A weight or bias that a rank computes with, or a gradient; None where there is none.
OptionalTensor = Tensor | None


class FeedForwardParameters(NamedTuple):
    """Parameters of the norm and of the network that a rank computes with."""

    norm_weight: Tensor
    norm_bias: OptionalTensor
    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: OptionalTensor
    up_bias: OptionalTensor

    @property
    def wide_biases(self) -> Biases:
        """The biases of gate and up, which the activation adds."""
        if self.gate_bias is None or self.up_bias is None:
            return None
        return self.gate_bias, self.up_bias


class Branch(NamedTuple):
    """What is added to the residual stream before the norm: attention's output.

    Attributes:
        mask: the dropout of its elements.
        y: [T, D].
        bias: [D], added to y before dropout.
    """

    mask: BranchMask
    y: Tensor
    bias: OptionalTensor


class Kept(NamedTuple):
    """What the forward pass leaves for backward.

    Attributes:
        x: the residual stream after attention, [T, D].
        mean: of its norm, fp32 [T].
        rstd: the same.
        others: what else this implementation needs.
    """

    x: Tensor
    mean: Tensor
    rstd: Tensor
    others: tuple[Any, ...]


class FeedForwardGradients(NamedTuple):
    """The gradients that the backward pass returns.

    Attributes:
        normed: gradient of the norm's output, [T, D].
        weights: gradients of gate, up and down; None where products are deferred, or were added to
            existing sums (`weight_gradients`).
        biases: gradients of the same layers' biases; None where there is none.
    """

    normed: Tensor
    weights: tuple[OptionalTensor, OptionalTensor, OptionalTensor]
    biases: tuple[OptionalTensor, OptionalTensor, OptionalTensor]


class FeedForwardPasses(Protocol):
    """Computes the network, forward and backward."""

    def forward(
        self, block: Block, x: Tensor, branch: Branch, parameters: FeedForwardParameters
    ) -> tuple[Tensor, Kept]:
        """From the residual stream before attention's branch to the output, without its bias."""
        ...

    def backward(
        self,
        block: Block,
        end_grad: Tensor,
        mask: BranchMask,
        kept: Kept,
        parameters: FeedForwardParameters,
        known: FeedForwardParameters,
    ) -> FeedForwardGradients:
        """From the gradient of the block's output, [T, D].

        Args:
            block: as in `forward`, like `parameters`.
            end_grad: that gradient.
            mask: the dropout of the network's output.
            kept: what the forward pass left.
            parameters: the same.
            known: the same as autograd knows them, for the types of their gradients.
        """
        ...


def made_by(
    block: Block, parameters: FeedForwardParameters
) -> tuple[Tensor, OptionalTensor, float]:
    """The network's norm, as `add_branch` takes it."""
    assert isinstance(block.feed_forward_norm, LayerNorm)
    return parameters.norm_weight, parameters.norm_bias, block.feed_forward_norm.eps


def remakes(block: Block) -> bool:
    """Whether norms' outputs are computed again in backward instead of being kept.

    Full recomputation keeps nothing of a block but its input, and has these outputs by then.
    """
    return not (block.recompute and block.training)


def left_or_computed(
    layer: DeferringLayer, y_grad_ND: Tensor, x_NF: Tensor, known: Tensor
) -> OptionalTensor:
    """A weight's gradient as `weight_gradients` gives it; None where its product is deferred."""
    if layer.deferred is None:
        return weight_gradients(y_grad_ND, x_NF, [known])[0]
    layer.deferred.append(WeightProducts([layer], x_NF, [y_grad_ND], joined=True))
    return None


class PlainFeedForward:
    """Products are in the dtype of their factors."""

    def forward(
        self, block: Block, x: Tensor, branch: Branch, parameters: FeedForwardParameters
    ) -> tuple[Tensor, Kept]:
        """See `FeedForwardPasses`."""
        network, tp = block.feed_forward, block.feed_forward.tp
        x, normed, mean, rstd = add_branch(x, *branch, made_by(block, parameters))
        kept_normed = None if remakes(block) else normed
        wide = joined_rows((parameters.gate, parameters.up))
        gate_up = F.linear(gathered_tokens(normed, tp), wide)
        active = gated_activation(gate_up, parameters.wide_biases, network.activation)
        y = summed_over_ranks(F.linear(active, parameters.down), tp)
        return y, Kept(x, mean, rstd, (kept_normed, gate_up))

    def backward(
        self,
        block: Block,
        end_grad: Tensor,
        mask: BranchMask,
        kept: Kept,
        parameters: FeedForwardParameters,
        known: FeedForwardParameters,
    ) -> FeedForwardGradients:
        """See `FeedForwardPasses`."""
        network, tp = block.feed_forward, block.feed_forward.tp
        normed, gate_up = kept.others
        dtype = gradient_dtype(known.norm_weight)
        y_grad, down_bias = branch_gradients(end_grad, mask, dtype)
        y_grad = gathered_tokens(y_grad, tp)
        # The activation's gradient, which the next call overwrites with the activation itself.
        active = y_grad @ parameters.down
        gate_up_grad, wide_biases = gated_activation_gradients(
            active, gate_up, parameters.wide_biases, network.activation, dtype
        )
        down = left_or_computed(network.down, y_grad, active, known.down)
        # Wide tensors are freed once used up: other layers' activations are still in memory.
        del active, y_grad
        if normed is None:
            normed = norm_again(kept.x, kept.mean, kept.rstd, *parameters[:2])
        normed_grad, (gate, up) = joined_gradients(
            gate_up_grad, normed, parameters[2:4], (network.gate, network.up), tp, known[2:4]
        )
        gate_bias, up_bias = (None, None) if wide_biases is None else wide_biases
        return FeedForwardGradients(normed_grad, (gate, up, down), (gate_bias, up_bias, down_bias))
