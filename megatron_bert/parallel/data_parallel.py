"""Sharded data parallelism (ZeRO, Rajbhandari et al. 2020, sections 5 and 6).

Weights and optimizer states are sharded in fp32 over the data-parallel ranks, computation is in
`compute_dtype`, gradients are reduced in fp32 (or bf16, on request) and summed, never averaged: the
loss is already divided by the number of masked tokens in the global batch.

A step gathers weights once and reduces gradients once, however many micro-batches it has: each
unit's weights are asked for before the unit ahead of it computes, and its gradients are reduced
beside the backward pass of the units ahead. In passes between the first and the last nothing stands
between the units, so that what a small micro-batch costs the host is the model's own.
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
    """A model, or a pipeline stage's part of it, whose parameters are sharded; changed in place.

    Each of its units, which the forward pass calls one after another, is gathered and reduced by
    itself, and what remains of the model before and after all of them.

    Attributes:
        module: the model.
        units: its blocks.

    Args:
        module: the model.
        units: its blocks, in the order of the forward pass.
        topology: the ranks.
        compute_dtype: type of weights and activations in forward and backward.
        reduce_dtype: type in which a step's gradients are added up, over micro-batches and over
            the ranks; where one rank has all rows, it stays fp32.
        reshard_after_forward: free a unit's gathered weights after its forward pass and after its
            backward pass (ZeRO-3); by default they stay to the end of a step.
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
            # There is nothing to send, and rounding would be for nothing.
            reduce_dtype = torch.float32
        self._compute_dtype, self._reduce_dtype = compute_dtype, reduce_dtype
        # In the order of the forward pass, but for what of the model stands behind the units.
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
        """A step of so many micro-batches, or forward passes that no backward pass follows.

        Within it the model's parameters are the gathered weights in the compute type: whoever read
        them, to save them say, would get rounded ones. After it they are the shards, with what
        gradients there were, and after an exception without those of this step.

        Args:
            micro_batches: whose gradients are added up.
            keeps_sums: add them up at the same addresses in every step, from 0 on.
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
        # Those of a single one are rather reduced from the compute type: half the bytes.
        several = micro_batches > 1 or keeps_sums
        dtype = self._reduce_dtype if several else self._compute_dtype
        for unit in self._unit_of.values():
            unit.sum_gradients_in(dtype)
            if keeps_sums:
                unit.keep_sums()

    def gather(self) -> None:
        """Have all weights, before the model is called."""
        for part in self._parts:
            self.gather_for(part)

    def gather_for(self, part: nn.Module) -> None:
        """Have a unit's weights, or those of what stands around the units, as it is to compute."""
        self._gather(part, self._following.get(part))

    def clear_sums(self) -> None:
        """Begin once more to add up gradients, of a step that keeps its sums."""
        for unit in self._unit_of.values():
            unit.clear_sums()

    def begin_last_pass(self) -> None:
        """The coming forward pass is the step's last: its backward pass reduces gradients."""
        self._reduces = True

    def end_backward(self, unit: nn.Module) -> None:
        """Reduce a unit's gradients, if those of the step's last pass were added to them."""
        if self._reduces:
            self.reduce(unit)

    @contextmanager
    def cut_by(self, cut: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
        """Let `cut` change what goes into each unit, and nothing else happen between units."""
        self._cut = cut
        try:
            yield
        finally:
            self._cut = None

    def reduce(self, unit: nn.Module) -> None:
        """Begin to reduce a unit's gradients, which are complete."""
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
        """Wait for the messages that are under way, and begin those behind them."""
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
            # Not by another function, whose output would be a view: a pipeline frees what it sent.
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._gather(unit, self._ahead.get(unit))
            )

    def _gather(self, unit: nn.Module, next_one: nn.Module | None) -> None:
        """Have a unit's weights, and ask for those of the one whose turn is next."""
        self._unit_of[unit].start_gathering()
        if next_one is not None:
            # Before the unit computes: the host need not run ahead of the device for it.
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
    """The parameters of each module, but for those of the modules ahead of it."""
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
    """The same tensor, whose gradient runs `action` as it passes."""
    y: Tensor = _RunBackward.apply(x, action)  # type: ignore[no-untyped-call]
    return y


class _RunBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # PyTorch adds gradients up on parameters before it goes on to other functions.
        ctx.action()
        return grads[0], None
