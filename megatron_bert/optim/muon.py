"""Muon over the shards that this rank holds: momentum, orthogonalised on the whole matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_bert.config.muon import BATCH_ELEMENTS, ITERATIONS
from megatron_bert.config.schema import OptimizerConfig
from megatron_bert.parallel.sharding import local_part, placed_like
from megatron_bert.parallel.whole_matrices import MatrixOwners

# Coefficients of the iteration x -> a x + b (x x^T) x + c (x x^T)^2 x (Jordan et al. 2024, "Muon").
# It is steepest at zero, so that five steps bring every singular value that is not tiny into about
# 0.7 to 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
# Root mean square of an update's elements, divided by the learning rate: what AdamW has in practice
# (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
_UPDATE_RMS = 0.2


class Muon:
    """Nesterov momentum whose direction is the nearest orthogonal matrix, for 2-D weights.

    An update's elements have the size of AdamW's, so that one learning rate serves both. Momentum
    and weights are shards. The ranks divide the whole matrices among themselves: each is assembled
    on its owner, which orthogonalises it, and every rank takes its parts of the result.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        owners: MatrixOwners,
    ) -> None:
        """Update these matrices of this rank, by name; `owners` has assigned them to ranks."""
        self._parameters = parameters
        self._shards = {name: local_part(p).detach() for name, p in parameters.items()}
        self._momentum = {name: torch.zeros_like(shard) for name, shard in self._shards.items()}
        self._owners = owners
        self._decay = config.momentum
        self._weight_decay = config.weight_decay

    def step(
        self,
        gradients: Mapping[str, Tensor],
        learning_rate: float,
        divisor: Tensor,
        skipped: Tensor,
    ) -> None:
        """Update the weights and the momentum in place; arguments as in `AdamW.step`.

        The update is written over the gradients.
        """
        wholes: Mapping[str, Tensor] = self._owners.gather(
            self._directions(gradients, divisor, skipped) if self._shards else {}
        )
        updates = self._owners.scatter(_all_orthogonalized(wholes))
        if not self._shards:
            return
        # Over the gradients: what is subtracted from the weights, 0 if the update is skipped.
        steps, shards = [gradients[n] for n in self._shards], list(self._shards.values())
        sizes = [math.sqrt(max(self._parameters[name].shape)) for name in self._shards]
        kept = 1 - skipped
        torch._foreach_copy_(steps, [updates[name] for name in self._shards])
        torch._foreach_mul_(steps, [learning_rate * _UPDATE_RMS * size for size in sizes])
        torch._foreach_mul_(steps, kept)
        torch._foreach_mul_(shards, 1 - kept * (learning_rate * self._weight_decay))
        torch._foreach_sub_(shards, steps)

    def _directions(
        self, gradients: Mapping[str, Tensor], divisor: Tensor, skipped: Tensor
    ) -> dict[str, Tensor]:
        """Update the momentum; return its shards, a step ahead (Nesterov). Overwrites gradients."""
        own, momentum = [gradients[n] for n in self._momentum], list(self._momentum.values())
        torch._foreach_div_(own, divisor)
        # Not multiplied by 0: a skipped gradient may be NaN.
        is_skipped = skipped != 0
        for gradient in own:
            gradient.masked_fill_(is_skipped, 0.0)
        changes = torch._foreach_sub(own, momentum)
        torch._foreach_mul_(changes, (1 - skipped) * (1 - self._decay))
        torch._foreach_add_(momentum, changes)
        torch._foreach_lerp_(own, momentum, self._decay)
        directions = [torch.empty_like(shard, dtype=self._owners.dtype) for shard in own]
        torch._foreach_copy_(directions, own)
        return dict(zip(self._momentum, directions, strict=True))

    def state_tensors(self) -> dict[str, Tensor]:
        """The momentum, as `ShardedOptimizer.state_tensors` returns it."""
        return {
            f"{name}.momentum": placed_like(self._momentum[name], parameter)
            for name, parameter in self._parameters.items()
        }


def _all_orthogonalized(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orthogonalise matrices of equal shape together, in batches that keep a device busy."""
    names_by_shape: dict[torch.Size, list[str]] = {}
    for name, matrix in matrices.items():
        names_by_shape.setdefault(matrix.shape, []).append(name)
    results: dict[str, Tensor] = {}
    for shape, names in names_by_shape.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        for batch in (names[begin : begin + size] for begin in range(0, len(names), size)):
            result = orthogonalized(torch.stack([matrices[name] for name in batch]))
            results.update(zip(batch, result, strict=True))
    return results


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices close to 1, their singular vectors left as they are.

    Args:
        matrices: [matrices, rows, columns]; their dtype is that of the products.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
