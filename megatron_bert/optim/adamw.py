"""Fused AdamW over the shards that this rank holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_bert.config.schema import KernelsName, OptimizerConfig
from megatron_bert.optim.update_rules import ApexRule, TorchRule, UpdateRule
from megatron_bert.parallel.sharding import local_part, placed_like

_RULES: Mapping[KernelsName, type[UpdateRule]] = {
    "torch": TorchRule,
    "fused": TorchRule,
    "te": TorchRule,
    "apex": ApexRule,
}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) on the local shards, not on DTensors: it is pointwise.

    Clipping and skipping happen inside the fused kernel (`megatron_bert.optim.update_rules`), so
    that a step neither makes an extra pass over the gradients nor waits for the device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        device: torch.device,
        kernels: KernelsName = "torch",
    ) -> None:
        """Update some of this rank's parameters.

        Args:
            parameters: the parameters to update, by name.
            config: learning rate, epsilon and rates of decay.
            device: where they are.
            kernels: with `apex`, NVIDIA's kernel computes the update; otherwise PyTorch's.
        """
        self._parameters = parameters
        self._shards = {name: local_part(p).detach() for name, p in parameters.items()}
        matrices = [s for n, s in self._shards.items() if self._parameters[n].dim() > 1]
        vectors = [s for n, s in self._shards.items() if self._parameters[n].dim() == 1]
        self._rule: UpdateRule = _RULES[kernels](matrices, vectors, config, device)
        self._moments = {
            name: {key: torch.zeros_like(shard) for key in _MOMENTS}
            for name, shard in self._shards.items()
        }
        for name, shard in self._shards.items():
            self._rule.keep_moments(shard, self._moments[name])

    def step(
        self,
        gradients: Mapping[str, Tensor],
        learning_rate: float,
        divisor: Tensor,
        skipped: Tensor,
    ) -> None:
        """Update the weights and moments in place.

        Args:
            gradients: local shards by name.
            learning_rate: of this update.
            divisor: scalar on the device, what gradients are divided by first.
            skipped: scalar on the device; where it is 1.0 nothing changes.
        """
        for name, shard in self._shards.items():
            shard.grad = gradients.get(name)
        self._rule.apply(learning_rate, divisor, skipped)
        for shard in self._shards.values():
            shard.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments, as `ShardedOptimizer.state_tensors` returns them."""
        return {
            f"{name}.{key}": placed_like(self._moments[name][key], parameter)
            for name, parameter in self._parameters.items()
            for key in _MOMENTS
        }

    @property
    def updates(self) -> int:
        """Number of updates made (skipped ones not counted); waits for the device."""
        return int(self._rule.updates.item())

    @updates.setter
    def updates(self, value: int) -> None:
        self._rule.set_updates(value)
