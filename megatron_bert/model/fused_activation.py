"""The gated activation and the product behind it, by a kernel of our own.

What is kept is what the activation is made from. Backward one kernel reads that and the gradient of
the activation, writes that of gate and up and, for the weight's gradient, the activation again,
and sums those of their biases meanwhile: hence these are added here, not by the products before.

Shape suffixes: N tokens of the micro-batch, D hidden, F features of this rank, P = 2 F: gate's and
then up's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton import cdiv

from megatron_bert.model import fused_kernels, fused_tiles
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.deferred import (
    DeferringLayer,
    WeightProducts,
    gradient_dtype,
    weight_gradient,
)
from megatron_bert.parallel.sharding import local_part

Activation = Callable[[Tensor], Tensor]


def gated_down(
    gate_up_NP: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    down: DeferringLayer,
    activation: Activation,
) -> Tensor:
    """The gated activation's product with the down projection's weight, of this rank's features.

    What is kept is what the activation is made from.

    Args:
        gate_up_NP: [N, P], dense, without biases.
        gate_bias_F: [F]; None where there are no biases.
        up_bias_F: [F], or None like the other.
        down: the layer of the product, of which but the weight is used: the bias is not added,
            nor are ranks summed over.
        activation: `F.silu`, or `F.gelu` (by the error function).

    Returns:
        [N, D].
    """
    weight_DF = local_part(down.weight)
    if down.deferred is not None:
        # Its gradient does not come by way of this function.
        weight_DF = weight_DF.detach()
    y_ND: Tensor = _GatedDown.apply(  # type: ignore[no-untyped-call]
        gate_up_NP, gate_bias_F, up_bias_F, weight_DF, down, _is_gelu(activation)
    )
    return y_ND


def _is_gelu(activation: Activation) -> bool:
    assert activation in (F.silu, F.gelu)
    return activation is F.gelu


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        weight: Tensor,
        down: DeferringLayer,
        gelu: bool,
    ) -> Tensor:
        # A copy of it would cost as much as the kernel.
        assert gate_up.is_contiguous()
        ctx.down, ctx.gelu, ctx.parameters = down, gelu, (weight, gate_bias)
        ctx.save_for_backward(gate_up, gate_bias, up_bias, weight)
        N, size, tile = len(gate_up), weight.shape[1], fused_tiles.TILING.activation
        active = gate_up.new_empty(N, size)
        has_biases = gate_bias is not None
        grid = (cdiv(N, tile.tokens) * cdiv(size, tile.columns),)
        fused_kernels.fused_gated_activation_kernel[grid](
            gate_up, *((gate_bias, up_bias) if has_biases else (gate_up, gate_up)), active, N,
            size, BIASES=has_biases, GELU=gelu, **tile.options(),
        )  # fmt: skip
        return F.linear(active, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, gate_bias, up_bias, weight = ctx.saved_tensors
        y_grad, has_biases = grads[0], gate_bias is not None
        N, size, tile = len(gate_up), weight.shape[1], fused_tiles.TILING.activation
        # Where its gradient was, the activation is put.
        active = y_grad @ weight
        gate_up_grad = torch.empty_like(gate_up)
        column_tiles = cdiv(size, tile.columns)
        programs = tile.programs(N, max(1, fused_tiles.TILING.activation_programs // column_tiles))
        sums = gate_up.new_empty((programs if has_biases else 0, 2, size), dtype=torch.float32)
        fused_kernels.fused_gated_activation_gradient_kernel[(programs * column_tiles,)](
            active, gate_up, *((gate_bias, up_bias) if has_biases else (gate_up, gate_up)),
            gate_up_grad, active, sums, N, size, BIASES=has_biases, GELU=ctx.gelu,
            **tile.options(loops=True),
        )  # fmt: skip
        bias_grads: tuple[Tensor | None, ...] = (None, None)
        if has_biases:
            bias_grads = tuple(
                column_sums(sums.flatten(1), gradient_dtype(ctx.parameters[1])).view(2, size)
            )
        weight_grad = None
        if ctx.down.deferred is None:
            weight_grad = weight_gradient(y_grad, active, ctx.parameters[0])
        else:
            ctx.down.deferred.append(WeightProducts([ctx.down], active, [y_grad]))
        return gate_up_grad, *bias_grads, weight_grad, None, None
