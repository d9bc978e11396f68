"""What the fused kernels compute, by PyTorch: they are tested against it and timed beside it.

Shape suffixes: T tokens, D hidden, F feed-forward, P = 2 F: gate's features and then up's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from megatron_bert.parallel.random import hash_dropout


def plain_residual_norm(
    x_TD: Tensor,
    y_TD: Tensor,
    branch_bias_D: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    dropout: float,
    draws: tuple[Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum x + dropout(y + bias), with draws as `hash_dropout` takes them, and its LayerNorm."""
    if branch_bias_D is not None:
        y_TD = y_TD + branch_bias_D
    sum_TD = x_TD + hash_dropout(y_TD, dropout, *draws)
    return sum_TD, F.layer_norm(sum_TD, weight_D.shape, weight_D, bias_D, eps)


def plain_gated_down(
    gate_up_TP: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    weight_DF: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """The product of activation(gate + bias) * (up + bias) with the down projection's weight."""
    gate_TF, up_TF = gate_up_TP.chunk(2, 1)
    if gate_bias_F is not None and up_bias_F is not None:
        gate_TF, up_TF = gate_TF + gate_bias_F, up_TF + up_bias_F
    return F.linear(activation(gate_TF) * up_TF, weight_DF)
