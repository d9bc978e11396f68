"""Fused AdamW over the shards that this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert.config.schema import OptimizerConfig
from megatron_bert.parallel.sharding import local_part


class Update(NamedTuple):
    """What an update leaves behind, on the device.

    Attributes:
        grad_norm: the gradient's global L2 norm before clipping; fp32 scalar, alike on all ranks.
        skipped: 1.0 where the update was skipped, else 0.0; alike on all ranks.
        is_finite_here: whether this rank's share of the gradient is finite.
    """

    grad_norm: Tensor
    skipped: Tensor
    is_finite_here: Tensor


class ShardedAdamW:
    """AdamW with clipping by the global norm; a non-finite gradient or loss skips the update.

    It works on the local shards, not on DTensors: updates are pointwise, and the one quantity
    that is not, the norm, is reduced here by hand. Clipping and skipping happen inside the fused
    kernel, by its `grad_scale` and `found_inf`, so that a step neither makes an extra pass over
    the gradients nor waits for the device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        counts_here: Callable[[str, nn.Parameter], bool],
    ) -> None:
        """Update what this rank holds.

        Args:
            parameters: this rank's parameters by name.
            config: the rates of decay and the clipping.
            counts_here: whether this rank counts its shard of a parameter in the global norm;
                of the ranks that hold the same one only one does.
        """
        self._parameters = parameters
        self._shards = {name: local_part(p).detach() for name, p in parameters.items()}
        self._clip_grad = config.clip_grad
        self._counted_here = {name: counts_here(name, p) for name, p in parameters.items()}
        matrices = [s for n, s in self._shards.items() if self._parameters[n].dim() > 1]
        vectors = [s for n, s in self._shards.items() if self._parameters[n].dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                # Biases and norms are not pulled towards zero (Devlin et al. 2019's code).
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for shard in self._shards.values():
            self._optimizer.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }

    @torch.no_grad()
    def step(self, learning_rate: float, loss: Tensor | None = None) -> Update:
        """Apply the gradients that backward left on the parameters, and clear them.

        Args:
            learning_rate: of this update.
            loss: scalar on the device, the same on all ranks; where it is not finite, the update
                is skipped too.
        """
        for name, parameter in self._parameters.items():
            self._shards[name].grad = None if parameter.grad is None else local_part(parameter.grad)
        norm, is_finite_here = self._global_norm()
        is_finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        skipped = (~is_finite).float()
        # The kernel divides gradients by grad_scale: at most `clip_grad` remains of the norm.
        scale = (norm / self._clip_grad).clamp(min=1.0) if self._clip_grad else norm.new_ones(())
        self._optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._shards[name].grad = None
        return Update(norm, skipped, is_finite_here)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter name, sharded as the parameters are.

        The tensors share their storage with the optimizer: loading into them restores it. The
        count of steps is one number for all parameters.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[self._shards[name]]
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{key}"] = _like_parameter(state[key], parameter)
        return tensors

    @property
    def updates(self) -> int:
        """Number of updates made (skipped ones not counted); waits for the device."""
        first = next(iter(self._shards.values()))
        return int(self._optimizer.state[first]["step"].item())

    @updates.setter
    def updates(self, value: int) -> None:
        for shard in self._shards.values():
            self._optimizer.state[shard]["step"].fill_(value)

    def _global_norm(self) -> tuple[Tensor, Tensor]:
        """L2 norm over all parameters of all ranks, each counted once; whether ours is finite."""
        gradients = [
            shard.grad
            for name, shard in self._shards.items()
            if shard.grad is not None and self._counted_here[name]
        ]
        device = next(iter(self._shards.values())).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2.0))
            total = norms.double().square().sum()
        is_finite_here = total.isfinite()
        dist.all_reduce(total)
        return total.sqrt().float(), is_finite_here


def _like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
