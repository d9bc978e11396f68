"""The pieces of a step alone, each by all that can compute it here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_bert.benchmark.device import device_name
from megatron_bert.benchmark.gemm import seconds_of
from megatron_bert.benchmark.machine import (
    Hardware,
    describe_hardware,
    describe_versions,
)

Compute = Callable[[], Tensor]
Outputs = Tensor | tuple[Tensor, ...]


def made_at_first_call(make: Callable[[], Compute]) -> Compute:
    """What an optional package computes, imported and built when it is first called.

    So what fails there fails as what is computed does: that alternative is listed as absent.
    """
    made = cache(make)
    return lambda: made()()


@dataclass(frozen=True)
class Piece:
    """One piece of a step at one shape.

    Attributes:
        name: what it computes.
        shape: its sizes, in words.
        inputs: what gets a gradient; empty where nothing does, as in the optimizer.
        alternatives: what can compute it here by name, the project's own reference first; each
            of several outputs gets a gradient.
        absent: what else could, and why it does not here.
        products: operations of its matrix products, forward, where these are most of it.
        moved: bytes that have to be read or written at least: forward, and with backward.
        is_random: whether alternatives draw different numbers, so that outputs differ.
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
    """What one alternative takes.

    Attributes:
        name: of the alternative.
        forward_microseconds: without recording for backward; the whole of it in the optimizer.
        both_microseconds: forward and backward; None where there is no backward.
        tflops: of matrix products, 10^12 operations a second, in `both_microseconds`.
        gb_per_second: of the bytes that have to move, 10^9 a second, in `both_microseconds`, or
            forward where there is no backward.
        difference: of its output from the first alternative's, as a share of its norm; None
            where they draw different numbers.
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
        times: of what was measured, the project's own reference first.
        absent: what was not, and why.
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
        compute: the type of numbers, "bf16" or "fp32".
        versions: of packages, and the commit.
        quick: whether the work was cut short.
        pieces: in the order of measuring.
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
        pieces: made one after another, so that only one's tensors are held.
        device: where they lie.
        compute: the type of numbers, for the record.
        quick: whether the work was cut short, for the record.
        say: is told what is being measured.
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
        # An optional kernel refuses shapes, types or devices in as many ways as there are.
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
    # Backward takes twice the products of forward.
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
