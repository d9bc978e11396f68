"""Parameters of a model that are gathered together, with gradients that are reduced together.

Between steps the model holds this rank's shards, in fp32. Within a step it holds the gathered
weights, in the compute dtype, at the same addresses in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_bert.config.arithmetic import next_multiple
from megatron_bert.distributed.collectives import (
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megatron_bert.parallel.data_ranks import DataRanks
from megatron_bert.parallel.sharding import local_part, placed_like

# Alignment of a gathered weight's address, in bytes: more than any product asks for.
_ALIGNMENT = 256


@dataclass
class _Place:
    """Where the model looks for a parameter.

    Attributes:
        module: the module that has it.
        name: its name there.
        shape: of the whole, or of this tensor-parallel rank's part of it.
        size: elements of a rank's shard in messages, counting rows that the last ranks lack.
        shard: the parameter between steps.
        weight: the parameter within a step; None before the first step.
        gradient: the shard's gradient in the current step.
    """

    module: nn.Module
    name: str
    shape: torch.Size
    size: int
    shard: nn.Parameter
    weight: nn.Parameter | None = None
    gradient: Tensor | None = None

    def put(self, parameter: nn.Parameter) -> None:
        """Make this one the module's parameter."""
        # Not by `register_parameter`, whose checks take milliseconds for a model's parameters.
        self.module._parameters[self.name] = parameter

    def local_shard(self) -> Tensor:
        """The elements of the shard."""
        found = self.module._parameters[self.name]
        if found is not self.weight and found is not None:
            # `to_empty` has replaced the shard.
            self.shard = found
        return local_part(self.shard)


class ShardedUnit:
    """The parameters of one block, for example: gathers their shards and reduces their gradients.

    Args:
        parameters: modules, each with the name of one of its own parameters. These become shards.
        ranks: the ranks over which they are sharded.
        compute_dtype: dtype of gathered weights.
        reduce_dtype: dtype in which gradients are reduced to the shards.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[nn.Module, str]],
        ranks: DataRanks,
        compute_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
    ) -> None:
        self._ranks = ranks
        self._compute_dtype = compute_dtype
        self._reduce_dtype = reduce_dtype
        self._places: list[_Place] = []
        for module, name in parameters:
            parameter = module.get_parameter(name)
            shape = local_part(parameter).shape
            size = ranks.rows_of_each(shape[0]) * shape[1:].numel()
            place = _Place(module, name, shape, size, ranks.shard_of(parameter))
            place.put(place.shard)
            self._places.append(place)
        # Biases go last, so that the weights of layers that read one input lie end to end
        # (`joined_rows`), as do their gradient sums, if the ranks divide their rows and sizes are
        # multiples of the alignment. Otherwise they are copied.
        self._places.sort(key=lambda place: len(place.shape) < 2)
        self._sizes = [place.size for place in self._places]
        self._memory: Tensor | None = None
        self._sums: tuple[Tensor, list[Tensor]] | None = None
        # The gathered weights as messages bring them, [ranks, size] each.
        self._parts: list[Tensor] = []
        self._gathering: Pending | None = None
        self._sum_dtype = compute_dtype
        self._is_gathered = False
        self._is_in_step = False

    @torch.no_grad()
    def start_gathering(self) -> None:
        """Start gathering the weights, unless they are there or on their way."""
        is_needed = self._places and not self._is_gathered and self._gathering is None
        if not is_needed or self._ranks.size == 1:
            return
        shards = [place.local_shard() for place in self._places]
        sent = shards[0].new_empty(sum(self._sizes), dtype=self._compute_dtype)
        _copy(shards, torch.split(sent, self._sizes))
        self._gathering = start_all_gather(sent, self._ranks.group)

    @torch.no_grad()
    def gather(self) -> None:
        """Gather the weights, and make them the model's parameters."""
        if self._is_gathered or not self._places:
            return
        self.start_gathering()
        self._take_memory()
        if self._gathering is None:
            shards = [place.local_shard() for place in self._places]
            _copy(shards, [part[0] for part in self._parts])
        else:
            received = wait(self._gathering).view(self._ranks.size, -1)
            torch.split_with_sizes_copy(received, self._sizes, dim=1, out=self._parts)
            self._gathering = None
        for place, weight in zip(self._places, self.weights(), strict=True):
            place.put(weight)
        self._is_gathered = self._is_in_step = True

    def free(self) -> None:
        """Free the weights' memory; the model still refers to them, so `gather` before using it."""
        if self._is_gathered:
            assert self._memory is not None
            self._memory.untyped_storage().resize_(0)
            self._is_gathered = False

    def sum_gradients_in(self, dtype: torch.dtype) -> None:
        """Accumulate the gradients of the coming passes in this dtype.

        A gradient in the compute dtype would be added to a sum of another dtype by a kernel that
        converts number by number, at a quarter of a GPU's memory bandwidth; and layers that know
        the dtype return their products in it, unrounded.
        """
        if dtype == self._sum_dtype:
            return
        self._sum_dtype = dtype
        for weight in self.weights():
            weight.grad_dtype = dtype

    def weights(self) -> list[nn.Parameter]:
        """The weights that the model computes with in a step; none before the first step."""
        return [place.weight for place in self._places if place.weight is not None]

    @torch.no_grad()
    def keep_sums(self) -> None:
        """Accumulate gradients from 0, at the same addresses as before.

        Every parameter then has a gradient, even one that no pass reaches.
        """
        if not self._places:
            return
        self._take_memory()
        if self._sums is None:
            device = self._places[0].local_shard().device
            sizes = [place.shape.numel() for place in self._places]
            self._sums = _aligned(sizes, self._sum_dtype, device)
        for place, weight, part in zip(self._places, self.weights(), self._sums[1], strict=True):
            if place.shard.grad is not None:
                # The previous step's gradient, which nobody has taken, is in this memory.
                place.shard.grad = place.shard.grad.clone()
            weight.grad = part.view(place.shape)
        self.clear_sums()

    def clear_sums(self) -> None:
        """Set the kept sums to 0."""
        if self._sums is not None:
            self._sums[0].zero_()

    @torch.no_grad()
    def reduction(self) -> Iterator[None]:
        """Sum the gradients over the ranks; yields whenever a message is in flight."""
        places, gradients = [], []
        for place, weight in zip(self._places, self.weights(), strict=False):
            if weight.grad is not None:
                places.append(place)
                gradients.append(weight.grad)
                weight.grad = None
        if not places:
            return
        alone = self._ranks.size == 1 and self._ranks.copies is None
        if alone and all(gradient.dtype == torch.float32 for gradient in gradients):
            _hand_over(places, gradients)
            return
        sizes = [place.size for place in places]
        packed = gradients[0].new_empty(self._ranks.size, sum(sizes), dtype=self._reduce_dtype)
        torch._chunk_cat(gradients, 0, self._ranks.size, out=packed)
        gradients.clear()
        summed = packed[0]
        if self._ranks.size > 1:
            reducing = start_reduce_scatter(packed.flatten(), self._ranks.group)
            del packed
            yield
            summed = wait(reducing)
            del reducing
        if self._ranks.copies is not None:
            reducing = start_all_reduce(summed, self._ranks.copies)
            yield
            summed = wait(reducing)
        _hand_over(places, torch.split(summed.float(), sizes))

    def drop_gradients(self) -> None:
        """Discard the gradients of the current step."""
        for place in self._places:
            place.gradient = None
            if place.weight is not None:
                place.weight.grad = None

    @torch.no_grad()
    def release(self) -> None:
        """Make the shards the model's parameters again, with the gradients reduced to them."""
        # Started, but not needed.
        self._gathering = None
        if not self._is_in_step:
            return
        self._is_gathered = self._is_in_step = False
        for place in self._places:
            place.put(place.shard)
            gradient, place.gradient = place.gradient, None
            if gradient is None:
                continue
            if place.shard.grad is None:
                place.shard.grad = placed_like(gradient, place.shard)
            else:
                local_part(place.shard.grad).add_(gradient)

    def _take_memory(self) -> None:
        """Allocate memory for the weights and, the first time, make the weights themselves."""
        if self._memory is not None:
            storage = self._memory.untyped_storage()
            if storage.size() == 0:
                storage.resize_(self._memory.nbytes)
            return
        sizes = [size * self._ranks.size for size in self._sizes]
        device = self._places[0].local_shard().device
        self._memory, wholes = _aligned(sizes, self._compute_dtype, device)
        for place, whole in zip(self._places, wholes, strict=True):
            self._parts.append(whole.view(self._ranks.size, place.size))
            # Through `data`, so that autograd does not mistake weights that were freed and gathered
            # again for modified ones.
            weight = whole.data[: place.shape.numel()].view(place.shape)
            place.weight = nn.Parameter(weight.data)
            place.weight.grad_dtype = self._sum_dtype


def _aligned(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Allocate one buffer, and return it with aligned slices of these lengths."""
    step = _ALIGNMENT // dtype.itemsize
    rooms = [next_multiple(size, step) for size in sizes]
    memory = torch.empty(sum(rooms), dtype=dtype, device=device)
    parts = torch.split(memory, rooms)
    return memory, [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _copy(shards: Sequence[Tensor], messages: Sequence[Tensor]) -> None:
    """Copy shards to flat parts of a message, which may be longer, converting their dtype."""
    parts = [
        message[: shard.numel()].view_as(shard)
        for message, shard in zip(messages, shards, strict=True)
    ]
    torch._foreach_copy_(parts, list(shards))


def _hand_over(places: Sequence[_Place], sums: Sequence[Tensor]) -> None:
    for place, part in zip(places, sums, strict=True):
        shard = place.local_shard()
        place.gradient = part.flatten()[: shard.numel()].view_as(shard)
