"""Measures the pieces of a step alone, each by every implementation available here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_bert.benchmark.gemm import seconds_of
from megatron_bert.benchmark.machine import (
    Hardware,
    describe_hardware,
    describe_versions,
)
from megatron_bert.distributed.device_facts import device_name

Compute = Callable[[], Tensor]
Outputs = Tensor | tuple[Tensor, ...]


def made_at_first_call(make: Callable[[], Compute]) -> Compute:
    """A computation of an optional package, which is imported and built at the first call.

    A failure to import or build is thus handled like a failure to compute: the alternative is
    listed as absent.
    """
    made = cache(make)
    return lambda: made()()


@dataclass(frozen=True)
class Piece:
    """One piece of a step at one shape.

    Attributes:
        name: what it computes.
        shape: its sizes, in words.
        inputs: the tensors that get a gradient; empty if there are none, as in the optimizer.
        alternatives: implementations available here, by name, the project's own reference first;
            if there are several outputs, each gets a gradient.
        absent: other implementations, and why they are not available here.
        products: operations of its forward matrix products, if these dominate.
        moved: minimum bytes to read or write: forward, and forward with backward.
        is_random: whether alternatives draw different random numbers, so that outputs differ.
    """

    name: str
    shape: str
    inputs: Sequence[Tensor]
    alternatives: Mapping[str, Callable[[], Outputs]]
    absent: dict[str, str]
    products: float | None = None
    moved: tuple[float, float] | None = None
    is_random: bool = False


@dataclass(frozen=True)
class KernelTime:
    """The time of one alternative.

    Attributes:
        name: of the alternative.
        forward_microseconds: without recording for backward; for the optimizer, the whole update.
        both_microseconds: forward and backward; None if there is no backward.
        tflops: of matrix products, 10^12 operations a second, in `both_microseconds`.
        gb_per_second: of the bytes that have to move, 10^9 a second, in `both_microseconds`, or
            forward if there is no backward.
        difference: of its output from the first alternative's, relative to the latter's norm; None
            if they draw different random numbers.
    """

    name: str
    forward_microseconds: float
    both_microseconds: float | None
    tflops: float | None
    gb_per_second: float | None
    difference: float | None


@dataclass(frozen=True)
class PieceFigures:
    """All alternatives of a piece.

    Attributes:
        piece: what is computed.
        shape: its sizes, in words.
        times: of the measured alternatives, the project's own reference first.
        absent: the alternatives that were not measured, and why.
    """

    piece: str
    shape: str
    times: list[KernelTime]
    absent: dict[str, str]


@dataclass(frozen=True)
class KernelFigures:
    """All pieces, and what they were measured on.

    Attributes:
        hardware: the machine.
        device: the GPU's name, or "cpu".
        compute: the compute dtype, "bf16" or "fp32".
        versions: of packages, and the commit.
        quick: whether the work was cut short.
        pieces: in the order in which they were measured.
    """

    hardware: Hardware
    device: str
    compute: str
    versions: dict[str, str]
    quick: bool
    pieces: list[PieceFigures]

    def document(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)


def measure_kernels(
    pieces: Iterator[Piece],
    device: torch.device,
    compute: str,
    quick: bool,
    say: Callable[[str], None],
) -> KernelFigures:
    """Time every alternative of every piece.

    Args:
        pieces: made one after another, so that only one piece's tensors are held at a time.
        device: of the tensors.
        compute: the compute dtype, for the record.
        quick: whether the work was cut short, for the record.
        say: called with what is being measured.
    """
    hardware, versions = describe_hardware(), describe_versions()
    figures = []
    for piece in pieces:
        say(f"{piece.name}, {piece.shape}")
        figures.append(_measure(piece, device))
    name = device_name(device)
    return KernelFigures(hardware, name, compute, versions, quick, figures)


def _measure(piece: Piece, device: torch.device) -> PieceFigures:
    times: list[KernelTime] = []
    absent = dict(piece.absent)
    reference: list[Tensor] = []
    for name, compute in piece.alternatives.items():
        try:
            with torch.no_grad():
                outputs = [output.clone() for output in _outputs(compute)]
            times.append(_time(piece, name, compute, outputs, device))
        # Optional kernels refuse shapes, dtypes or devices with all kinds of exceptions.
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        reference = reference or outputs
        if not piece.is_random:
            times[-1] = _with_difference(times[-1], outputs, reference)
    return PieceFigures(piece.name, piece.shape, times, absent)


def _outputs(compute: Callable[[], Outputs]) -> tuple[Tensor, ...]:
    made = compute()
    return (made,) if isinstance(made, Tensor) else made


def _time(
    piece: Piece,
    name: str,
    compute: Callable[[], Outputs],
    outputs: Sequence[Tensor],
    device: torch.device,
) -> KernelTime:
    with torch.no_grad():
        forward = seconds_of(compute, device)
    both = None
    if piece.inputs:
        grads = [torch.randn_like(output) for output in outputs]
        both = seconds_of(
            lambda: torch.autograd.grad(_outputs(compute), list(piece.inputs), grads), device
        )
    rate = None
    if piece.moved is not None:
        seconds, moved = (forward, piece.moved[0]) if both is None else (both, piece.moved[1])
        rate = moved / seconds / 1e9
    # Backward has twice as many products as forward.
    tflops = None
    if piece.products is not None and both is not None:
        tflops = 3 * piece.products / both / 1e12
    return KernelTime(
        name,
        forward_microseconds=round(1e6 * forward, 2),
        both_microseconds=None if both is None else round(1e6 * both, 2),
        tflops=None if tflops is None else round(tflops, 4),
        gb_per_second=None if rate is None else round(rate, 3),
        difference=None,
    )


def _with_difference(
    time: KernelTime, outputs: Sequence[Tensor], references: Sequence[Tensor]
) -> KernelTime:
    distance = max(
        float((output.double() - reference.double()).norm() / reference.double().norm())
        for output, reference in zip(outputs, references, strict=True)
    )
    return KernelTime(**{**asdict(time), "difference": float(f"{distance:.3g}")})
