"""A small model under an optimizer, and gradients that are the same whatever the layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert.config.schema import KernelsName
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.training.optimizer import build_optimizer
from tests.small_model import cpu_topology, small_config, small_model

RATE = 0.05


def whole(tensor: Tensor) -> Tensor:
    """The whole of which every rank has a part; all ranks call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def set_gradients(model: nn.Module, scale: float) -> None:
    """Give every parameter a gradient that depends on its name alone, whatever the layout."""
    for number, (_, parameter) in enumerate(model.named_parameters()):
        random = torch.Generator().manual_seed(number)
        gradient = scale * torch.randn(parameter.shape, generator=random)
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            gradient = DTensor.from_local(
                _part(gradient, parameter).reshape(local.shape),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = gradient


def _part(whole: Tensor, parameter: DTensor) -> Tensor:
    """What this rank holds of `whole`: along `tp` first, then along `dp`."""
    names = parameter.device_mesh.mesh_dim_names or ()
    for name, placement in sorted(zip(names, parameter.placements, strict=True), reverse=True):
        axis = parameter.device_mesh[name]
        parts = whole.chunk(axis.size(), placement.dim)
        rank = axis.get_local_rank()
        whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole.contiguous()


def set_whole_gradients(wholes: Iterable[nn.Parameter], scale: float) -> None:
    """The same gradients for the parameters of a model that is not split, in its order."""
    for number, whole in enumerate(wholes):
        random = torch.Generator().manual_seed(number)
        whole.grad = scale * torch.randn(whole.shape, generator=random)


def built(
    tensor: int,
    precision: str = "fp32",
    kernels: KernelsName = "torch",
    sizes: Mapping[str, int] | None = None,
    **optimizer: Any,
) -> tuple[BertForPretraining, ShardedOptimizer]:
    """The model over all ranks, `tensor` of them sharing its layers, and its optimizer.

    `kernels` are the optimizer's; the model's are PyTorch's. `sizes` are the model's.
    """
    config = small_config(
        model={**(sizes or {})},
        optimizer={"weight_decay": 0.1, **optimizer},
        precision={"compute": precision},
    )
    model = small_model(config, cpu_topology(tensor=tensor))
    config = config.model_copy(update={"kernels": kernels})
    return model.chunks[0], build_optimizer(config, model)
