"""Linear layers of a block, in BF16 or FP32 and in FP8, by every implementation available.

Shape suffixes: N tokens, D features in, F features out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.benchmark.kernels.measure import Compute, Piece, made_at_first_call
from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.schema import ModelConfig
from megatron_bert.model.fp8 import fp8_linear

_EAGER_FP8 = "fp8 (ours)"
_COMPILED_FP8 = "fp8 (ours), compiled"


def linear_pieces(
    model: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Iterator[Piece]:
    """Yield the products of one block, each shape once.

    Args:
        model: determines the widths.
        tokens: of a micro-batch.
        dtype: of the tensors.
        device: of the tensors.
        compiled: whether FP8's scaling is also measured compiled.
    """
    layers: dict[tuple[int, int], list[str]] = {}
    for matrix in block_matrices(model):
        layers.setdefault((matrix.inputs, matrix.outputs), []).append(matrix.name)
    for (inputs, outputs), names in layers.items():
        x_ND = torch.randn(tokens, inputs, dtype=dtype, device=device, requires_grad=True)
        weight_FD = nn.Parameter(torch.randn(outputs, inputs, dtype=dtype, device=device))
        bias_F = None
        if model.family.biases:
            bias_F = nn.Parameter(torch.randn(outputs, dtype=dtype, device=device))
        yield _linear_piece(", ".join(names), x_ND, weight_FD, bias_F, compiled=compiled)


def _linear_piece(
    names: str,
    x_ND: Tensor,
    weight_FD: nn.Parameter,
    bias_F: nn.Parameter | None,
    *,
    compiled: bool,
) -> Piece:
    operands = (x_ND, weight_FD, bias_F)
    alternatives: dict[str, Compute] = {
        "eager": partial(F.linear, *operands),
        _EAGER_FP8: partial(fp8_linear, *operands),
    }
    absent: dict[str, str] = {}
    if compiled:
        alternatives[_COMPILED_FP8] = partial(torch.compile(fp8_linear, dynamic=False), *operands)
    else:
        absent[_COMPILED_FP8] = "compile.enabled=false"
    for name, fp8 in (("transformer engine", False), ("transformer engine, fp8", True)):
        if find_spec("transformer_engine") is None:
            absent[name] = "the package transformer_engine is not installed"
        else:
            alternatives[name] = made_at_first_call(partial(_engine_linear, *operands, fp8=fp8))
    tokens, inputs = x_ND.shape
    outputs = len(weight_FD)
    return Piece(
        f"linear ({names})",
        f"{tokens} x {inputs} x {outputs}{'' if bias_F is None else ', bias'}",
        [operand for operand in operands if operand is not None],
        alternatives,
        absent,
        products=2.0 * tokens * inputs * outputs,
    )


def _engine_linear(
    x_ND: Tensor, weight_FD: nn.Parameter, bias_F: nn.Parameter | None, *, fp8: bool
) -> Compute:
    engine = import_module("transformer_engine.pytorch")
    recipe = import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    outputs, inputs = weight_FD.shape
    module = engine.Linear(
        inputs, outputs, bias=bias_F is not None, params_dtype=x_ND.dtype, device=x_ND.device
    )
    module.weight = weight_FD
    if bias_F is not None:
        module.bias = bias_F

    def compute() -> Tensor:
        with engine.autocast(enabled=fp8, recipe=recipe):
            y_NF: Tensor = module(x_ND)
        return y_NF

    return compute
