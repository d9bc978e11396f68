"""Muon over the shards that this rank holds: momentum, orthogonalised on the whole matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_bert.config.schema import OptimizerConfig
from megatron_bert.parallel.sharding import local_part, placed_like
from megatron_bert.parallel.whole_matrices import MatrixOwners

# Of the iteration x -> a x + b (x x^T) x + c (x x^T)^2 x (Jordan et al. 2024, "Muon"): steepest at
# zero, so that five steps bring every singular value that is not tiny into about 0.7 to 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
# Root mean square of an update's elements over the learning rate, as AdamW's are in practice (Liu
# et al. 2025, "Muon is scalable for LLM training", section 2.2).
_UPDATE_RMS = 0.2


class Muon:
    """Nesterov momentum whose direction is the nearest orthogonal matrix, for 2-D weights.

    An update's elements have the size of AdamW's, so that both take one learning rate. Momentum and
    weights are shards; the ranks divide the whole matrices among themselves, bring each together on
    its owner, which orthogonalises it, and take their parts of the result.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        owners: MatrixOwners,
    ) -> None:
        """Update these of this rank's matrices, given by name, which `owners` has dealt out."""
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
        """Update the weights and the momentum in place; arguments as those of `AdamW.step`."""
        is_kept = skipped == 0
        directions = {}
        for name, momentum in self._momentum.items():
            gradient = gradients[name] / divisor
            _replace(momentum, torch.lerp(gradient, momentum, self._decay), is_kept)
            direction = torch.lerp(gradient, momentum, self._decay)
            directions[name] = direction.to(self._owners.dtype)
        wholes = self._owners.gather(directions)
        updates = self._owners.scatter({n: orthogonalized(whole) for n, whole in wholes.items()})
        for name, shard in self._shards.items():
            size = learning_rate * _UPDATE_RMS * math.sqrt(max(self._parameters[name].shape))
            decayed = shard * (1 - learning_rate * self._weight_decay)
            _replace(shard, decayed.add_(updates[name].to(shard.dtype), alpha=-size), is_kept)

    def state_tensors(self) -> dict[str, Tensor]:
        """The momentum, as `ShardedOptimizer.state_tensors` returns it."""
        return {
            f"{name}.momentum": placed_like(self._momentum[name], parameter)
            for name, parameter in self._parameters.items()
        }


def orthogonalized(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix close to 1, its singular vectors left as they are.

    Args:
        matrix: [rows, columns]; its dtype is that of the products.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _replace(old: Tensor, new: Tensor, is_kept: Tensor) -> None:
    """Write `new` into `old` where the scalar says so, without waiting for the device."""
    # Not by a factor of 0: `new` may be NaN.
    old.copy_(torch.where(is_kept, new, old))
