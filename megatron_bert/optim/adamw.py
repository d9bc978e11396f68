"""Fused AdamW over the shards that this rank holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_bert.config.schema import OptimizerConfig
from megatron_bert.parallel.sharding import local_part, placed_like


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) on the local shards, not on DTensors: it is pointwise.

    Clipping and skipping happen inside the fused kernel, by its `grad_scale` and `found_inf`, so
    that a step neither makes an extra pass over the gradients nor waits for the device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        """Update these of this rank's parameters, given by name."""
        self._parameters = parameters
        self._shards = {name: local_part(p).detach() for name, p in parameters.items()}
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
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for shard in self._shards.values():
            shard.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments, as `ShardedOptimizer.state_tensors` returns them."""
        return {
            f"{name}.{key}": placed_like(self._optimizer.state[self._shards[name]][key], parameter)
            for name, parameter in self._parameters.items()
            for key in ("exp_avg", "exp_avg_sq")
        }

    @property
    def updates(self) -> int:
        """Number of updates made (skipped ones not counted); waits for the device."""
        first = next(iter(self._shards.values()))
        return int(self._optimizer.state[first]["step"].item())

    @updates.setter
    def updates(self, value: int) -> None:
        for shard in self._shards.values():
            self._optimizer.state[shard]["step"].fill_(value)
