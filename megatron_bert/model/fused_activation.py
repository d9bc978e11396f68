"""The gated activation by a kernel of our own.

Only its inputs, gate and up, are kept. In backward one kernel reads them and the activation's
gradient, writes the gradients of gate and up and, for the next product's weight, the activation
again, and meanwhile sums the gradients of their biases. That is why the biases are added here, not
by the product before.

Shape suffixes: N tokens of the micro-batch, F features of this rank, P = 2 F: gate's and then up's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.model import fused_activation_kernels, fused_tiles
from megatron_bert.parallel.column_sums import column_sums

Activation = Callable[[Tensor], Tensor]
# The biases of gate and of up, [F]; None where there are none.
Biases = tuple[Tensor, Tensor] | None


def is_gelu(activation: Activation) -> bool:
    """Whether the activation is gelu; otherwise it is silu."""
    assert activation in (F.silu, F.gelu)
    return activation is F.gelu


def gated_activation(gate_up_NP: Tensor, biases: Biases, activation: Activation) -> Tensor:
    """activation(gate + bias) * (up + bias).

    Args:
        gate_up_NP: [N, P], dense, without biases.
        biases: see `Biases`.
        activation: `F.silu`, or `F.gelu` (by the error function).

    Returns:
        [N, F].
    """
    # A copy of it would cost as much as the kernel.
    assert gate_up_NP.is_contiguous()
    N, size, tile = len(gate_up_NP), gate_up_NP.shape[1] // 2, fused_tiles.ROW_TILING.activation
    active_NF = gate_up_NP.new_empty(N, size)
    programs = ceil_div(N, tile.tokens) * ceil_div(size, tile.columns)
    fused_activation_kernels.fused_gated_activation_kernel[(programs,)](
        gate_up_NP, *(biases or (gate_up_NP, gate_up_NP)), active_NF, N, size,
        BIASES=biases is not None, GELU=is_gelu(activation), **tile.options(),
    )  # fmt: skip
    return active_NF


def gated_activation_gradients(
    active_grad_NF: Tensor,
    gate_up_NP: Tensor,
    biases: Biases,
    activation: Activation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Compute gradients from that of the activation, which the activation itself overwrites.

    Args:
        active_grad_NF: [N, F].
        gate_up_NP: as `gated_activation` took them, like the following.
        biases: the same.
        activation: the same.
        dtype: of the biases' gradients.

    Returns:
        The gradient of gate and up, [N, P], and those of the biases, [2, F], where there are any.
    """
    N, size, tile = len(gate_up_NP), gate_up_NP.shape[1] // 2, fused_tiles.ROW_TILING.activation
    grad_NP = torch.empty_like(gate_up_NP)
    column_tiles = ceil_div(size, tile.columns)
    programs = tile.programs(N, max(1, fused_tiles.ROW_TILING.activation_programs // column_tiles))
    sums = gate_up_NP.new_empty((programs if biases else 0, 2, size), dtype=torch.float32)
    fused_activation_kernels.fused_gated_activation_gradient_kernel[(programs * column_tiles,)](
        active_grad_NF, gate_up_NP, *(biases or (gate_up_NP, gate_up_NP)), grad_NP,
        active_grad_NF, sums, N, size, BIASES=biases is not None, GELU=is_gelu(activation),
        **tile.options(loops=True),
    )  # fmt: skip
    return grad_NP, column_sums(sums.flatten(1), dtype).view(2, size) if biases else None
