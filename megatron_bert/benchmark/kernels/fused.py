"""The work between a block's products, in the pieces in which `kernels: fused` computes it.

Shape suffixes: T tokens, D hidden, F feed-forward, P = 2 F: gate's features and then up's.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from megatron_bert.benchmark.kernels.measure import Piece
from megatron_bert.benchmark.kernels.work import KernelWork, add_fused, hidden_draws, with_compiled
from megatron_bert.model.feed_forward import ACTIVATIONS
from megatron_bert.model.fused_reference import plain_gated_down, plain_residual_norm


def residual_norm_piece(work: KernelWork, tokens: int, dropout: float) -> Piece:
    """A sub-layer's end and the next one's norm; both outputs are used.

    Args:
        work: the model, the dtype and the device.
        tokens: of a micro-batch.
        dropout: of hidden states.
    """
    model = work.config.model
    hidden, eps, biases = model.hidden_size, model.norm_eps, model.family.biases
    x_TD, y_TD = (work.random(tokens, hidden) for _ in range(2))
    weight_D = work.random(hidden)
    bias_D, norm_bias_D = (work.random(hidden) if biases else None for _ in range(2))
    draws = hidden_draws(work, tokens)

    def fused() -> tuple[Tensor, Tensor]:
        # Here: Triton comes with PyTorch for CUDA only.
        from megatron_bert.benchmark.kernels.fused_functions import residual_norm
        from megatron_bert.model.fused_norm import BranchMask

        mask = BranchMask(dropout, *draws, bias_D is not None)
        return residual_norm(x_TD, y_TD, bias_D, mask, weight_D, norm_bias_D, eps)

    inputs = (x_TD, y_TD, bias_D, weight_D, norm_bias_D)
    plain = partial(plain_residual_norm, dropout=dropout, draws=draws, eps=eps)
    alternatives, absent = with_compiled(work, plain, inputs, partial(plain, *inputs))
    add_fused(work, fused, alternatives, absent)
    size = x_TD.numel() * x_TD.element_size()
    # Forward reads two tensors and writes two; backward reads their two gradients and the sum, and
    # writes one gradient, or two with dropout.
    backward = 5.0 if dropout else 4.0
    return Piece(
        "dropout, residual, norm",
        f"{tokens} x {hidden}, dropout {dropout:g}{', biases' * biases}",
        [x for x in inputs if x is not None],
        alternatives,
        absent,
        moved=(4.0 * size, (4.0 + backward) * size),
    )


def activation_product_piece(work: KernelWork, tokens: int) -> Piece:
    """The gated activation and the product that reads it.

    Args:
        work: the model, the dtype and the device.
        tokens: of a micro-batch.
    """
    model = work.config.model
    hidden, ffn, activation = (
        model.hidden_size,
        model.ffn_hidden_size,
        ACTIVATIONS[model.family.activation],
    )
    gate_up_TP = work.random(tokens, 2 * ffn)
    gate_bias_F, up_bias_F = (work.random(ffn) if model.family.biases else None for _ in range(2))
    weight_DF = work.random(hidden, ffn)

    def fused() -> Tensor:
        # Here: Triton comes with PyTorch for CUDA only.
        from megatron_bert.benchmark.kernels.fused_functions import gated_down

        return gated_down(gate_up_TP, gate_bias_F, up_bias_F, weight_DF, activation)

    inputs = (gate_up_TP, gate_bias_F, up_bias_F, weight_DF)
    plain = partial(plain_gated_down, activation=activation)
    alternatives, absent = with_compiled(work, plain, inputs, partial(plain, *inputs))
    add_fused(work, fused, alternatives, absent)
    return Piece(
        "activation and projection",
        f"{model.family.activation}, {tokens} x {ffn} x {hidden}{', biases' * model.family.biases}",
        [x for x in inputs if x is not None],
        alternatives,
        absent,
        products=2.0 * tokens * ffn * hidden,
    )
