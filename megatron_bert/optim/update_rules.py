"""AdamW's update by a fused kernel, which also divides the gradients and skips updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_bert.config.schema import OptimizerConfig
from megatron_bert.errors import ConfigError


class UpdateRule(ABC):
    """Updates matrices, with weight decay, and vectors, without.

    Biases and norms are not pulled towards zero (Devlin et al. 2019's code).

    Attributes:
        updates: number of updates made (skipped ones not counted), int32 scalar on the device.
    """

    @abstractmethod
    def __init__(
        self,
        matrices: Sequence[Tensor],
        vectors: Sequence[Tensor],
        config: OptimizerConfig,
        device: torch.device,
    ) -> None:
        """Update these tensors; a rank may hold no element of any.

        Args:
            matrices: fp32 tensors that are updated in place by their `grad`.
            vectors: the same.
            config: learning rate, epsilon and rates of decay.
            device: where they are.
        """
        self.updates = torch.zeros((), dtype=torch.int32, device=device)

    @abstractmethod
    def keep_moments(self, shard: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Use these tensors, `exp_avg` and `exp_avg_sq`, as a tensor's moments."""

    def apply(self, learning_rate: float, divisor: Tensor, skipped: Tensor) -> None:
        """Update what has a gradient, without waiting for the device.

        Args:
            learning_rate: of this update.
            divisor: fp32 scalar by which gradients are divided first.
            skipped: fp32 scalar; 1 leaves everything as it is.
        """
        self._apply(learning_rate, divisor, skipped)
        self.updates += 1 - skipped.int()

    @abstractmethod
    def _apply(self, learning_rate: float, divisor: Tensor, skipped: Tensor) -> None: ...

    def set_updates(self, value: int) -> None:
        """Set the number of updates made."""
        self.updates.fill_(value)


class TorchRule(UpdateRule):
    """PyTorch's fused AdamW."""

    def __init__(
        self,
        matrices: Sequence[Tensor],
        vectors: Sequence[Tensor],
        config: OptimizerConfig,
        device: torch.device,
    ) -> None:
        super().__init__(matrices, vectors, config, device)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(matrices), "weight_decay": config.weight_decay},
                {"params": list(vectors), "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def keep_moments(self, shard: Tensor, moments: Mapping[str, Tensor]) -> None:
        """See `UpdateRule`."""
        step = torch.zeros((), dtype=torch.float32, device=shard.device)
        self._optimizer.state[shard] = {"step": step, **moments}

    def _apply(self, learning_rate: float, divisor: Tensor, skipped: Tensor) -> None:
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def set_updates(self, value: int) -> None:
        """See `UpdateRule`."""
        super().set_updates(value)
        for state in self._optimizer.state.values():
            state["step"].fill_(value)


@dataclass
class _Scaling:
    """Stands in for the gradient scaler of Apex, which divides gradients by the scale."""

    divisor: Tensor
    skipped: Tensor

    def _check_inf_per_device(self, _: object) -> dict[torch.device, Tensor]:
        return {self.skipped.device: self.skipped}

    def _get_scale_async(self) -> Tensor:
        return self.divisor


class ApexRule(UpdateRule):
    """NVIDIA Apex's FusedAdam in the form that CUDA graphs can capture: nothing is read back.

    Apex raises its count of updates by 1 before each update, unless the previous one was skipped.
    It is therefore given the count anew each time, 1 higher if it will not raise it.

    Its kernels get no empty shards, which small models have on many ranks: they launch the tensors
    they have gathered only after the elements of a tensor, so that updates are lost if the last
    tensor is empty, and an empty tensor beyond the number that fits is written out of bounds.

    Raises:
        ConfigError: Apex was built without its CUDA extensions.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        vectors: Sequence[Tensor],
        config: OptimizerConfig,
        device: torch.device,
    ) -> None:
        super().__init__(matrices, vectors, config, device)
        groups = [
            ([shard for shard in shards if shard.numel() > 0], decay)
            for shards, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        ]
        try:
            fused_adam = import_module("apex.optimizers").FusedAdam
            # One per group: in a shared one, the second group would count by this update's skip.
            self._optimizers: list[Any] = [
                fused_adam(
                    shards,
                    lr=config.lr,
                    betas=(config.beta1, config.beta2),
                    eps=config.eps,
                    weight_decay=decay,
                    adam_w_mode=True,
                    capturable=True,
                )
                for shards, decay in groups
                if shards
            ]
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"kernels = apex: {error}; build https://github.com/NVIDIA/apex with its CUDA "
                "extensions, or use kernels=torch"
            ) from error
        self._by_shard = {
            shard: optimizer
            for optimizer in self._optimizers
            for shard in optimizer.param_groups[0]["params"]
        }
        self._skipped_before = torch.zeros(1, dtype=torch.int32, device=device)

    def keep_moments(self, shard: Tensor, moments: Mapping[str, Tensor]) -> None:
        """See `UpdateRule`."""
        if shard in self._by_shard:
            self._by_shard[shard].state[shard] = dict(moments)

    def _apply(self, learning_rate: float, divisor: Tensor, skipped: Tensor) -> None:
        scaling = _Scaling(divisor.reshape(1), skipped.reshape(1))
        for optimizer in self._optimizers:
            (group,) = optimizer.param_groups
            group["lr"].fill_(learning_rate)
            group["step"] = self.updates + self._skipped_before
            optimizer.step(grad_scaler=scaling)
        self._skipped_before = scaling.skipped.int()
