"""The optimizer of the shards that a rank holds: norm, clipping, skipping, and the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.optim.adamw import AdamW
from megatron_bert.optim.muon import Muon
from megatron_bert.optim.square_sum import square_sum
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


class ShardedOptimizer:
    """Applies updates, with clipping by the global norm, unless gradients or loss are not finite.

    The norm, over all parameters whichever optimizer updates them, is reduced here by hand. The
    updates get their divisor and whether to skip as tensors on the device, so that nothing waits
    for it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        adamw: AdamW,
        muon: Muon | None,
        counts_here: Callable[[str, nn.Parameter], bool],
        clip_grad: float,
    ) -> None:
        """Update what this rank holds.

        Args:
            parameters: this rank's parameters by name.
            adamw: updates all parameters or, with `muon`, only some.
            muon: updates the parameters that `adamw` does not.
            counts_here: whether this rank counts its shard of a parameter in the global norm;
                only one of the ranks that hold the same shard does.
            clip_grad: largest global norm; 0 for none.
        """
        self._parameters = parameters
        self._adamw = adamw
        self._muon = muon
        self._clip_grad = clip_grad
        self._counted_here = {name: counts_here(name, p) for name, p in parameters.items()}

    @property
    def name(self) -> str:
        """Its `optimizer.name`: the state of another optimizer does not fit it."""
        return "adamw" if self._muon is None else "muon"

    @torch.no_grad()
    def step(self, learning_rate: float, loss: Tensor | None = None) -> Update:
        """Apply the gradients that backward left on the parameters, and clear them.

        Args:
            learning_rate: of this update.
            loss: scalar on the device, the same on all ranks; where it is not finite, the update
                is skipped too.
        """
        gradients = {
            name: local_part(parameter.grad)
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }
        norm, is_finite_here = self._global_norm(gradients)
        is_finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        skipped = (~is_finite).float()
        # Gradients are divided by it, which leaves a norm of at most `clip_grad`.
        divisor = torch.ones_like(norm)
        if self._clip_grad:
            divisor = (norm / self._clip_grad).clamp(min=1.0)
        self._adamw.step(gradients, learning_rate, divisor, skipped)
        if self._muon is not None:
            self._muon.step(gradients, learning_rate, divisor, skipped)
        for parameter in self._parameters.values():
            parameter.grad = None
        return Update(norm, skipped, is_finite_here)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by parameter name, sharded as the parameters are.

        The tensors share their storage with the optimizer: loading into them restores it. The
        count of steps is one number for all parameters.
        """
        tensors = self._adamw.state_tensors()
        return tensors if self._muon is None else tensors | self._muon.state_tensors()

    @property
    def updates(self) -> int:
        """Number of updates made (skipped ones not counted); waits for the device."""
        return self._adamw.updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._adamw.updates = value

    def _global_norm(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L2 norm over all ranks' parameters, each counted once; whether this rank's is finite."""
        counted = [gradient for name, gradient in gradients.items() if self._counted_here[name]]
        device = local_part(next(iter(self._parameters.values()))).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        if counted:
            total = square_sum(counted)
        is_finite_here = total.isfinite()
        dist.all_reduce(total)
        return total.sqrt().float(), is_finite_here
