"""The gated activation and the product behind it, by a kernel of our own.

What is kept is what the activation is made from. Backward one kernel reads that and the gradient of
the activation, writes those of gate and up and, for the weight's gradient, the activation again,
and sums those of their biases meanwhile: hence these are added here, not by the products before.

Shape suffixes: N tokens of the micro-batch, D hidden, F features of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton import cdiv

from megatron_bert.model import fused_kernels, fused_tiles
from megatron_bert.parallel.deferred import DeferringLayer, WeightProducts
from megatron_bert.parallel.sharding import local_part

Activation = Callable[[Tensor], Tensor]


def gated_down(
    gate_NF: Tensor,
    up_NF: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    down: DeferringLayer,
    activation: Activation,
) -> Tensor:
    """The gated activation's product with the down projection's weight, of this rank's features.

    What is kept is what the activation is made from.

    Args:
        gate_NF: [N, F], without its bias.
        up_NF: [N, F], without its bias.
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
        gate_NF, up_NF, gate_bias_F, up_bias_F, weight_DF, down, _is_gelu(activation)
    )
    return y_ND


def _is_gelu(activation: Activation) -> bool:
    assert activation in (F.silu, F.gelu)
    return activation is F.gelu


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        weight: Tensor,
        down: DeferringLayer,
        gelu: bool,
    ) -> Tensor:
        ctx.down, ctx.gelu = down, gelu
        ctx.save_for_backward(gate, up, gate_bias, up_bias, weight)
        (N, size), tile = gate.shape, fused_tiles.TILING.activation
        gate, up, active = gate.contiguous(), up.contiguous(), torch.empty_like(gate)
        has_biases = gate_bias is not None
        grid = (cdiv(N, tile.tokens) * cdiv(size, tile.columns),)
        fused_kernels.fused_gated_activation_kernel[grid](
            gate, up, *((gate_bias, up_bias) if has_biases else (gate, gate)), active, N, size,
            BIASES=has_biases, GELU=gelu, **tile.options(),
        )  # fmt: skip
        return F.linear(active, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, gate_bias, up_bias, weight = ctx.saved_tensors
        y_grad, has_biases = grads[0], gate_bias is not None
        (N, size), tile = gate.shape, fused_tiles.TILING.activation
        # Where its gradient was, the activation is put.
        active = y_grad @ weight
        gate_grad, up_grad = torch.empty_like(active), torch.empty_like(active)
        column_tiles = cdiv(size, tile.columns)
        programs = tile.programs(N, max(1, fused_tiles.TILING.activation_programs // column_tiles))
        sums = gate.new_empty((programs if has_biases else 0, 2, size), dtype=torch.float32)
        fused_kernels.fused_gated_activation_gradient_kernel[(programs * column_tiles,)](
            active, gate.contiguous(), up.contiguous(),
            *((gate_bias, up_bias) if has_biases else (gate, gate)), gate_grad, up_grad, active,
            sums, N, size, BIASES=has_biases, GELU=ctx.gelu, **tile.options(loops=True),
        )  # fmt: skip
        bias_grads = sums.sum(0).to(gate.dtype) if has_biases else (None, None)
        weight_grad = None
        if ctx.down.deferred is None:
            weight_grad = y_grad.T @ active
        else:
            ctx.down.deferred.append(WeightProducts([ctx.down], active, [y_grad]))
        return gate_grad, up_grad, *bias_grads, weight_grad, None, None
