"""Sharded data parallelism (ZeRO, Rajbhandari et al. 2020, sections 5 and 6).

Weights and optimizer states are sharded in fp32 over the data-parallel ranks, computation is in
`compute_dtype`, gradients are reduced in fp32 (or bf16, on request) and summed, never averaged: the
loss is already divided by the number of masked tokens in the global batch.

Unless weights are resharded after each forward pass, a step gathers them once and reduces the
gradients once, however many micro-batches it has: the all-gather of a unit's weights starts before
the preceding unit computes, and the reduction of its gradients overlaps the backward pass of the
preceding units. In the passes between the first and the last, nothing runs between the units, so
that a small micro-batch costs the host no more than the model itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.data_ranks import DataRanks
from megatron_bert.parallel.sharded_unit import ShardedUnit

Model = TypeVar("Model", bound=nn.Module)

_ENDED = object()


class ShardedModel(Generic[Model]):
    """A model, or a pipeline stage's part of it, whose parameters are sharded in place.

    The forward pass calls the units one after another. Each is gathered and reduced on its own, and
    so is the rest of the model, before and after the units.

    Attributes:
        module: the model.
        units: its blocks.

    Args:
        module: the model.
        units: its blocks, in the order of the forward pass.
        topology: the ranks.
        compute_dtype: dtype of weights and activations in forward and backward.
        reduce_dtype: dtype in which a step's gradients accumulate over micro-batches and are
            reduced over the ranks; always fp32 if one rank has all rows.
        reshard_after_forward: free a unit's gathered weights after its forward pass and after its
            backward pass (ZeRO-3); by default they stay until the end of a step.
    """

    def __init__(
        self,
        module: Model,
        units: Sequence[nn.Module],
        topology: Topology,
        compute_dtype: torch.dtype,
        *,
        reduce_dtype: torch.dtype = torch.float32,
        reshard_after_forward: bool = False,
    ) -> None:
        self.module = module
        self.units = tuple(units)
        if topology.data_parallel_size == 1:
            # Nothing is sent, so rounding would gain nothing.
            reduce_dtype = torch.float32
        self._compute_dtype, self._reduce_dtype = compute_dtype, reduce_dtype
        # In forward order, except that `module` also holds what runs after the units.
        self._parts: tuple[nn.Module, ...] = (module, *self.units)
        self._frees = reshard_after_forward
        ranks = DataRanks(topology)
        self._unit_of = {
            unit: ShardedUnit(parameters, ranks, compute_dtype, reduce_dtype)
            for unit, parameters in _shared_out((*units, module))
        }
        self._following = dict(pairwise(self._parts))
        self._ahead = {following: unit for unit, following in pairwise(self.units)}
        self._cut: Callable[[nn.Module, Tensor], Tensor] | None = None
        self._reduces = False
        self._reductions: list[Iterator[None]] = []
        self._reduced: set[nn.Module] = set()
        module.register_forward_pre_hook(self._before_model)
        for unit in self.units:
            unit.register_forward_pre_hook(self._before_unit)
            unit.register_forward_hook(self._after_unit)

    @contextmanager
    def step(self, micro_batches: int = 0, *, keeps_sums: bool = False) -> Iterator[None]:
        """Run a step of so many micro-batches or, with 0, forward passes without a backward pass.

        Inside the block the model's parameters are the gathered weights in the compute dtype: code
        that reads them, to save them for example, gets rounded values. After the block they are the
        shards again, with their gradients; after an exception, without the gradients of this step.

        Args:
            micro_batches: number of micro-batches whose gradients accumulate.
            keeps_sums: accumulate them at the same addresses in every step, starting from 0.
        """
        if micro_batches:
            self._begin(micro_batches, keeps_sums)
        try:
            yield
            self._end()
        except BaseException:
            self._abandon()
            raise

    def _begin(self, micro_batches: int, keeps_sums: bool) -> None:
        # The gradients of a single one stay in the compute dtype until reduced: half the bytes.
        several = micro_batches > 1 or keeps_sums
        dtype = self._reduce_dtype if several else self._compute_dtype
        for unit in self._unit_of.values():
            unit.sum_gradients_in(dtype)
            if keeps_sums:
                unit.keep_sums()

    def gather(self) -> None:
        """Gather all weights before the model is called."""
        for part in self._parts:
            self.gather_for(part)

    def gather_for(self, part: nn.Module) -> None:
        """Gather the weights of a unit, or of the model around the units, before it computes."""
        self._gather(part, self._following.get(part))

    def clear_sums(self) -> None:
        """Restart gradient accumulation from 0, in a step that keeps its sums."""
        for unit in self._unit_of.values():
            unit.clear_sums()

    def begin_last_pass(self) -> None:
        """Announce the step's last forward pass: its backward pass reduces gradients."""
        self._reduces = True

    def end_backward(self, unit: nn.Module) -> None:
        """Reduce a unit's gradients if they now include those of the step's last pass."""
        if self._reduces:
            self.reduce(unit)

    @contextmanager
    def cut_by(self, cut: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
        """Let `cut` replace each unit's input, and have nothing else run between the units."""
        self._cut = cut
        try:
            yield
        finally:
            self._cut = None

    def reduce(self, unit: nn.Module) -> None:
        """Start reducing a unit's gradients, which are complete."""
        self._go_on()
        self._reduced.add(unit)
        reduction = self._unit_of[unit].reduction()
        if next(reduction, _ENDED) is not _ENDED:
            self._reductions.append(reduction)

    def _end(self) -> None:
        for part in reversed(self._parts):
            if part not in self._reduced:
                self.reduce(part)
        while self._reductions:
            self._go_on()
        self._release()

    def _abandon(self) -> None:
        for sharded in self._unit_of.values():
            sharded.drop_gradients()
        self._reductions.clear()
        self._release()

    def _release(self) -> None:
        for sharded in self._unit_of.values():
            if self._frees:
                sharded.free()
            sharded.release()
        self._reduces = False
        self._reduced.clear()

    def _go_on(self) -> None:
        """Wait for the messages in flight, and start the ones that follow them."""
        self._reductions = [one for one in self._reductions if next(one, _ENDED) is not _ENDED]

    def _before_model(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.gather_for(self.module)

    def _before_unit(self, unit: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *others = inputs
        if self._cut is not None:
            return self._cut(unit, x), *others
        self.gather_for(unit)
        if not ((self._frees or self._reduces) and torch.is_grad_enabled()):
            return None
        return _run_backward(x, partial(self._after_backward, unit, self._reduces)), *others

    def _after_unit(self, unit: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self._frees:
            return
        self._unit_of[unit].free()
        if torch.is_grad_enabled():
            # A hook, not an autograd function, whose output would be a view: a pipeline frees the
            # data that it has sent.
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._gather(unit, self._ahead.get(unit))
            )

    def _gather(self, unit: nn.Module, next_one: nn.Module | None) -> None:
        """Gather a unit's weights, and start gathering those of the next one."""
        self._unit_of[unit].start_gathering()
        if next_one is not None:
            # Started before the unit computes, so that the host need not run ahead of the device.
            self._unit_of[next_one].start_gathering()
        self._unit_of[unit].gather()

    def _after_backward(self, unit: nn.Module, reduces: bool) -> None:
        if reduces:
            self.reduce(unit)
        if self._frees:
            self._unit_of[unit].free()


def _shared_out(
    modules: Sequence[nn.Module],
) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str]]]]:
    """Yield each module with its parameters, except those of the modules before it."""
    taken: set[nn.Module] = set()
    parameters: set[nn.Parameter] = set()
    for module in modules:
        own = [part for part in module.modules() if part not in taken]
        taken.update(own)
        places = []
        for part in own:
            for name, parameter in part.named_parameters(recurse=False):
                assert parameter not in parameters, f"{name} is two modules'"
                parameters.add(parameter)
                places.append((part, name))
        yield module, places


def _run_backward(x: Tensor, action: Callable[[], None]) -> Tensor:
    """Return the same tensor; in backward, `action` runs when its gradient passes."""
    y: Tensor = _RunBackward.apply(x, action)  # type: ignore[no-untyped-call]
    return y


class _RunBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # PyTorch accumulates gradients into parameters before it goes on to other functions.
        ctx.action()
        return grads[0], None
