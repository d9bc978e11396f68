"""Training steps here and by others, on the same documents, at the same shapes, in one run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_bert.benchmark.machine import Hardware, describe_hardware, describe_versions
from megatron_bert.benchmark.padded import document_pieces, pad_and_mask
from megatron_bert.benchmark.peer_megatron import time_megatron
from megatron_bert.benchmark.peer_trainer import time_trainer
from megatron_bert.benchmark.rows import make_batches, text_tokens
from megatron_bert.benchmark.step import measure_steps
from megatron_bert.benchmark.step_figures import StepWork
from megatron_bert.benchmark.synthetic import Corpora
from megatron_bert.config.schema import Config

OURS, TRAINER, MEGATRON = "megatron_bert", "Trainer", "Megatron-core"
_PACKAGES = {TRAINER: ("transformers", "accelerate"), MEGATRON: ("megatron-core",)}


@dataclass(frozen=True)
class PeersWork:
    """What is compared.

    Attributes:
        config: model, dropout, precision, compilation (ours alone) and masking.
        vocab_size: padded vocabulary.
        corpora: where the documents come from.
        seq_lengths: of the rows; a case each.
        micro_tokens: slots of a batch, at most; a step has one.
        steps: timed.
        warm_up: steps before them.
    """

    config: Config
    vocab_size: int
    corpora: Corpora
    seq_lengths: Sequence[int]
    micro_tokens: int
    steps: int
    warm_up: int


@dataclass(frozen=True)
class PeerCase:
    """One trainer at one row length.

    Attributes:
        trainer: whose steps.
        seq_length: slots of a row.
        rows: of a step; half as many as asked for, or a quarter, where memory did not suffice.
        text_share: of the slots that hold text: no padding, no CLS, no SEP.
        step_seconds: of a step.
        text_tokens_per_second: what counts.
        ratio: ours over this one.
    """

    trainer: str
    seq_length: int
    rows: int
    text_share: float
    step_seconds: float
    text_tokens_per_second: int
    ratio: float


@dataclass(frozen=True)
class PeersFigures:
    """All cases, and what they were measured on.

    Attributes:
        hardware: the machine.
        device: the GPU's name, or "cpu".
        versions: of packages, the others' too.
        quick: whether the work was cut short.
        cases: by row length, ours first.
        failed: cases that were not measured, and why.
    """

    hardware: Hardware
    device: str
    versions: dict[str, str]
    quick: bool
    cases: list[PeerCase]
    failed: dict[str, str]

    def document(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)


def measure_peers(
    work: PeersWork, device: torch.device, quick: bool, say: Callable[[str], None]
) -> PeersFigures:
    """Time every trainer at every row length; the process group has been started, with one rank.

    Args:
        work: the cases.
        device: where all of them train.
        quick: whether the work was cut short.
        say: is told what is being measured.
    """
    hardware, versions = describe_hardware(), describe_versions()
    cases: list[PeerCase] = []
    failed = {name: why for name in _PACKAGES if (why := _obstacle(name, work.config))}
    for name in _PACKAGES:
        if name not in failed:
            versions |= {package: version(package) for package in _PACKAGES[name]}
    for seq_length in work.seq_lengths:
        rows = max(1, work.micro_tokens // seq_length)
        ours = 0.0
        for name in (OURS, *_PACKAGES):
            if name in failed:
                continue
            say(f"{name}, length {seq_length}")
            result = _first_that_fits(work, name, seq_length, rows, device)
            if result is None:
                failed[f"{name}, length {seq_length}"] = "memory does not suffice for a quarter"
                continue
            rows_taken, text, seconds = result
            rate = text / seconds
            ours = rate if name == OURS else ours
            share = text / (rows_taken * seq_length)
            cases.append(
                PeerCase(
                    name, seq_length, rows_taken, round(share, 4), round(seconds, 5), round(rate),
                    round(ours / rate, 2),
                )
            )  # fmt: skip
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return PeersFigures(hardware, device_name, versions, quick, cases, failed)


def _obstacle(name: str, config: Config) -> str | None:
    """Why a trainer cannot be measured; None where it can."""
    modules = {TRAINER: ("transformers", "accelerate"), MEGATRON: ("megatron", "megatron.core")}
    if not all(find_spec(module) for module in modules[name]):
        return f"needs {' and '.join(_PACKAGES[name])}: pip install -e '.[peers]'"
    if name == MEGATRON and config.model.architecture != "retrievabert":
        return f"its BERT is not built as model.architecture={config.model.architecture} is"
    return None


def _first_that_fits(
    work: PeersWork, name: str, seq_length: int, rows: int, device: torch.device
) -> tuple[int, float, float] | None:
    """Rows of a step, its tokens of text and its seconds."""
    for divisor in (1, 2, 4):
        try:
            fewer = max(1, rows // divisor)
            return (fewer, *_MEASURES[name](work, seq_length, fewer, device))
        except torch.OutOfMemoryError:
            pass
        # Here, as the error holds what the step had allocated.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def _ours(work: PeersWork, seq_length: int, rows: int, device: torch.device) -> tuple[float, float]:
    steps = StepWork(
        config=work.config,
        vocab_size=work.vocab_size,
        corpora=work.corpora,
        seq_lengths=[seq_length],
        micro_tokens=[rows * seq_length],
        dropouts=[None],
        micro_batches=1,
        steps=work.steps,
        warm_up=work.warm_up,
        profiles=False,
    )
    figures = measure_steps(steps, device, quick=False, say=lambda _: None)
    if figures.failed:
        raise torch.OutOfMemoryError
    pinned = device.type == "cuda"
    batches = make_batches(
        work.corpora, work.config.mlm, seq_length, rows, range(1), 1, pinned=pinned
    )
    return text_tokens(batches), figures.cases[0].step_seconds


def _trainer(
    work: PeersWork, seq_length: int, rows: int, device: torch.device
) -> tuple[float, float]:
    pieces = _pieces(work, seq_length, rows)
    seconds = time_trainer(work.config, work.vocab_size, pieces, rows, work.warm_up, device)
    return _text_of_a_step(work, pieces), seconds


def _megatron(
    work: PeersWork, seq_length: int, rows: int, device: torch.device
) -> tuple[float, float]:
    pieces, random = _pieces(work, seq_length, rows), np.random.default_rng(0)
    probability = work.config.mlm.probability
    batches = [
        pad_and_mask(pieces[first : first + rows], seq_length, probability, work.vocab_size, random)
        for first in range(0, len(pieces), rows)
    ]
    seconds = time_megatron(work.config, work.vocab_size, batches, work.warm_up, device)
    return _text_of_a_step(work, pieces), seconds


_MEASURES = {OURS: _ours, TRAINER: _trainer, MEGATRON: _megatron}


def _pieces(work: PeersWork, seq_length: int, rows: int) -> list[NDArray[np.int32]]:
    """Those of all steps, in an order of their own: neighbours are of one document."""
    pieces = document_pieces(work.corpora, seq_length, rows * (work.warm_up + work.steps))
    order = np.random.default_rng(0).permutation(len(pieces))
    return [pieces[number] for number in order]


def _text_of_a_step(work: PeersWork, pieces: list[NDArray[np.int32]]) -> float:
    """Tokens of text in a step, on average."""
    return sum(map(len, pieces)) / (work.warm_up + work.steps)
