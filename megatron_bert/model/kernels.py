"""Kernels other than PyTorch's plain ones on the model's own parameters.

Parameters stay where they are, under their names: code that shards, saves, initialises or converts
them is unaware of this. A package's module serves as a function of the parameters that it is called
with; it has none of its own and is not part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_bert.config.kernels import KERNEL_CAPABILITY
from megatron_bert.config.schema import KernelsName
from megatron_bert.errors import ConfigError
from megatron_bert.model.block import Block
from megatron_bert.model.fp8 import fp8_linear
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_bert.parallel.sharding import local_part

_FP8_CAPABILITY = (8, 9)


def use_kernels(
    model: nn.Module, kernels: KernelsName, device: torch.device, dtype: torch.dtype, *, fp8: bool
) -> None:
    """Have these kernels compute linear layers (`te`, FP8), norms (`apex`) or blocks (`fused`).

    Transformer Engine's norm reads its own weight a second time, in backward, when the module no
    longer has the one that it was called with: norms stay PyTorch's there. So do those without a
    bias under `apex`.

    Args:
        model: changed in place, before it is sharded.
        kernels: whose kernels.
        device: where the model will compute.
        dtype: what it computes in.
        fp8: whether products are in FP8, by Transformer Engine (`te`) or PyTorch.

    Raises:
        ConfigError: the package, or FP8, cannot be used here.
    """
    if fp8:
        _check_fp8(device)
    if kernels != "torch":
        _check_device(kernels, device)
    if kernels == "fused":
        _use_fused(model, fp8=fp8)
    if kernels == "apex":
        norm = _imported(kernels, "apex.normalization.fused_layer_norm").fused_layer_norm_affine
        for layer in _norms(model):
            layer.kernel = _ApexNorm(norm)
    if kernels == "te":
        engine = _imported(kernels, "transformer_engine.pytorch")
        autocast = _fp8_autocast(engine) if fp8 else nullcontext
        for linear in _linears(model):
            linear.product = _EngineLinear(engine, linear, dtype, autocast)
    elif fp8 and kernels != "fused":
        for linear in _linears(model):
            linear.product = fp8_linear


def _use_fused(model: nn.Module, *, fp8: bool) -> None:
    # Imported here: Triton comes with PyTorch for CUDA only.
    _imported("fused", "triton")
    from megatron_bert.model.fp8_feed_forward import Fp8FeedForward
    from megatron_bert.model.fused_block import fused_block
    from megatron_bert.model.fused_feed_forward import PlainFeedForward

    passes = Fp8FeedForward() if fp8 else PlainFeedForward()
    for block in model.modules():
        if isinstance(block, Block):
            block.kernel = partial(fused_block, passes=passes)


def _check_device(kernels: KernelsName, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            f"kernels = {kernels}: it computes on CUDA only, and this machine shows PyTorch no "
            "CUDA device; use torch or auto"
        )
    capability = torch.cuda.get_device_capability(device)
    needed = ".".join(map(str, KERNEL_CAPABILITY))
    if kernels == "fused" and capability < KERNEL_CAPABILITY:
        raise ConfigError(
            f"kernels = fused: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and {needed} is needed; use torch or auto"
        )


def _check_fp8(device: torch.device) -> None:
    """Refuse a GPU without FP8 products; a CPU has them by way of others: slowly, for trials."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"precision.fp8 = current: {torch.cuda.get_device_name(device)} has no FP8 products "
            f"(compute capability {capability[0]}.{capability[1]}, 8.9 is needed); use "
            "precision.fp8=none"
        )


def _imported(kernels: KernelsName, name: str) -> ModuleType:
    # A package that was built for another PyTorch or CUDA does not always raise an ImportError.
    try:
        return import_module(name)
    except Exception as error:
        raise ConfigError(
            f"kernels = {kernels}: {name} cannot be imported ({type(error).__name__}: {error}); "
            "install one built for this PyTorch and CUDA, or use kernels=torch"
        ) from error


def _linears(model: nn.Module) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield module


def _norms(model: nn.Module) -> list[LayerNorm]:
    norms = (module for module in model.modules() if isinstance(module, LayerNorm))
    return [norm for norm in norms if norm.bias is not None]


def _fp8_autocast(engine: ModuleType) -> Callable[[], AbstractContextManager[Any]]:
    """Scale each operand by its own largest number: there is no history to keep."""
    recipe = _imported("te", "transformer_engine.common.recipe").Float8CurrentScaling()
    if hasattr(engine, "autocast"):
        return lambda: engine.autocast(enabled=True, recipe=recipe)
    # Its name until version 2.8.
    return lambda: engine.fp8_autocast(enabled=True, fp8_recipe=recipe)


class _ApexNorm:
    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        return self._function(x, weight_D, bias_D, weight_D.shape, eps)


class _EngineLinear:
    """`LinearProduct` of a layer: x W^T + b, or x W^T where the layer adds the bias itself.

    The module keeps for backward what it was called with, and does not read its own state again.
    """

    def __init__(
        self,
        engine: ModuleType,
        layer: ColumnParallelLinear | RowParallelLinear,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        outputs, inputs = local_part(layer.weight).shape
        adds_bias = isinstance(layer, RowParallelLinear) and layer.group.size() > 1
        has_bias = layer.bias is not None and not adds_bias
        self._module = engine.Linear(
            inputs, outputs, bias=has_bias, params_dtype=dtype, device="meta"
        )
        self._autocast = autocast

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        parameters = {"weight": weight_FD}
        if bias_F is not None:
            parameters["bias"] = bias_F
        with self._autocast():
            y_NF: Tensor = functional_call(self._module, parameters, (x_ND,))
        return y_NF
