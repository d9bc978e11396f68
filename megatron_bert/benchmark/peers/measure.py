"""Training steps of this and other software: same documents, same shapes, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_bert.benchmark.machine import (
    Hardware,
    describe_hardware,
    describe_versions,
)
from megatron_bert.benchmark.peers.megatron import time_megatron
from megatron_bert.benchmark.peers.padded import document_pieces, pad_and_mask
from megatron_bert.benchmark.peers.step_rows import StepRows
from megatron_bert.benchmark.peers.trainer import time_trainer
from megatron_bert.benchmark.rows import make_batches, text_tokens
from megatron_bert.benchmark.step.measure import StepSubject, release_memory, wait_for_ranks
from megatron_bert.benchmark.synthetic import Corpora
from megatron_bert.config.kernels import ComputeDevice, records_passes
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_facts import device_name, facts_of
from megatron_bert.distributed.topology import Topology
from megatron_bert.words import counted

OURS, TRAINER, MEGATRON = "megatron_bert", "Trainer", "Megatron-core"
_DESCRIPTIONS = {
    OURS: "packed rows, assembled within the step",
    TRAINER: "its defaults, SDPA, rows padded to the longest of a batch by its own collator",
    MEGATRON: "rows padded to their length beforehand, its layer specification without "
    "Transformer Engine and Apex, PyTorch's fused AdamW on weights of the compute type",
}
_PACKAGES = {TRAINER: ("transformers", "accelerate"), MEGATRON: ("megatron-core",)}


@dataclass(frozen=True)
class PeersWork:
    """What is compared.

    Attributes:
        config: model, dropout, precision and masking apply to all trainers; compilation, kernels,
            optimizer and recomputation only to ours.
        vocab_size: padded vocabulary.
        corpora: where the documents come from.
        seq_lengths: of the rows; one case each.
        micro_tokens: maximum slots of a micro-batch.
        micro_batches: of a step, if these fit in memory.
        steps: number of timed steps.
        warm_up: number of steps before them.
    """

    config: Config
    vocab_size: int
    corpora: Corpora
    seq_lengths: Sequence[int]
    micro_tokens: int
    micro_batches: int
    steps: int
    warm_up: int


@dataclass(frozen=True)
class PeerCase:
    """One trainer at one row length.

    Attributes:
        trainer: name of the trainer.
        seq_length: slots of a row.
        rows: of a step.
        micro_batches: of a step: more than asked for if memory did not suffice.
        text_share: share of the slots that hold text: no padding, no CLS, no SEP.
        step_seconds: of a step.
        text_tokens_per_second: the rate that is compared.
        ratio: ours over this one; None if ours was not measured.
    """

    trainer: str
    seq_length: int
    rows: int
    micro_batches: int
    text_share: float
    step_seconds: float
    text_tokens_per_second: int
    ratio: float | None


@dataclass(frozen=True)
class PeersFigures:
    """All cases, and what they were measured on.

    Attributes:
        hardware: the machine.
        device: the GPU's name, or "cpu".
        versions: of packages, including the others'.
        quick: whether the work was cut short.
        ours: the configuration's settings that affect speed, as key=value.
        trainers: how each trainer computes, in words.
        cases: by row length, ours first.
        failed: cases that were not measured, and why.
    """

    hardware: Hardware
    device: str
    versions: dict[str, str]
    quick: bool
    ours: str
    trainers: dict[str, str]
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
        say: called with what is being measured.
    """
    hardware, versions = describe_hardware(), describe_versions()
    cases: list[PeerCase] = []
    failed = {name: why for name in _PACKAGES if (why := _obstacle(name, work.config))}
    measured = [name for name in (OURS, *_PACKAGES) if name not in failed]
    for name in measured[1:]:
        versions |= {package: version(package) for package in _PACKAGES[name]}
    for seq_length in work.seq_lengths:
        asked = StepRows.of(work.micro_tokens, seq_length, work.micro_batches)
        ours: float | None = None
        for name in measured:
            say(f"{name}, length {seq_length}")
            try:
                case = _first_that_fits(work, name, seq_length, asked, device)
            # Other software fails with all kinds of exceptions; keep what was measured.
            except Exception as error:
                if name == OURS:
                    raise
                text = str(error).strip().partition("\n")[0]
                failed[f"{name}, length {seq_length}"] = f"{type(error).__name__}: {text}"
                continue
            if case is None:
                *_, least = asked.smaller()
                rows = counted(least.micro_rows, "row")
                failed[f"{name}, length {seq_length}"] = f"memory does not suffice for {rows}"
                continue
            rate = case.text_tokens_per_second
            ours = rate if name == OURS else ours
            ratio = None if ours is None else round(ours / rate, 2)
            cases.append(replace(case, ratio=ratio))
    return PeersFigures(
        hardware=hardware,
        device=device_name(device),
        versions=versions,
        quick=quick,
        ours=_in_keys(work.config, facts_of(device)),
        trainers={name: _DESCRIPTIONS[name] for name in measured},
        cases=cases,
        failed=failed,
    )


def _in_keys(config: Config, device: ComputeDevice) -> str:
    return (
        f"precision.compute={config.precision.compute} precision.fp8={config.precision.fp8} "
        f"kernels={config.kernels} compile.enabled={str(config.compile.enabled).lower()} "
        f"compile.cuda_graphs={str(records_passes(config, device)).lower()} "
        f"optimizer.name={config.optimizer.name} recompute={config.recompute} "
        f"model.hidden_dropout={config.model.hidden_dropout:g} "
        f"model.attention_dropout={config.model.attention_dropout:g}"
    )


def _obstacle(name: str, config: Config) -> str | None:
    """Why a trainer cannot be measured; None if it can."""
    modules = {TRAINER: ("transformers", "accelerate"), MEGATRON: ("megatron", "megatron.core")}
    if not all(find_spec(module) for module in modules[name]):
        return f"needs {' and '.join(_PACKAGES[name])}: pip install -e '.[peers]'"
    if name == MEGATRON and config.model.architecture != "retrievabert":
        return f"its BERT is not built as model.architecture={config.model.architecture} is"
    return None


def _first_that_fits(
    work: PeersWork, name: str, seq_length: int, asked: StepRows, device: torch.device
) -> PeerCase | None:
    """Time a trainer at the largest micro-batches that fit; the rows of a step stay the same."""
    for step in asked.smaller():
        release_memory(device)
        try:
            text, seconds = _MEASURES[name](work, seq_length, step, device)
        except torch.OutOfMemoryError:
            continue
        return PeerCase(
            trainer=name,
            seq_length=seq_length,
            rows=step.rows,
            micro_batches=step.micro_batches,
            text_share=round(text / (step.rows * seq_length), 4),
            step_seconds=round(seconds, 5),
            text_tokens_per_second=round(text / seconds),
            ratio=None,
        )
    return None


def _ours(
    work: PeersWork, seq_length: int, step: StepRows, device: torch.device
) -> tuple[float, float]:
    """Time steps, each on new rows, assembled within the step (training uses other threads)."""
    topology = Topology.of(work.config.parallel, device, work.config.distributed.timeout_seconds)
    subject = StepSubject.build(work.config, work.vocab_size, topology)
    steps = work.warm_up + work.steps
    text = began = 0.0
    for number in range(steps):
        if number == work.warm_up:
            wait_for_ranks(device)
            began = time.perf_counter()
        batches = make_batches(
            work.corpora,
            work.config.mlm,
            seq_length,
            step.micro_rows,
            range(number * step.micro_batches, (number + 1) * step.micro_batches),
            steps * step.micro_batches,
            pinned=device.type == "cuda",
        )
        subject.step(batches)
        text += text_tokens(batches)
    wait_for_ranks(device)
    return text / steps, (time.perf_counter() - began) / work.steps


def _trainer(
    work: PeersWork, seq_length: int, step: StepRows, device: torch.device
) -> tuple[float, float]:
    pieces = _pieces(work, seq_length, step.rows)
    seconds = time_trainer(work.config, work.vocab_size, pieces, step, work.warm_up, device)
    return _text_of_a_step(work, pieces), seconds


def _megatron(
    work: PeersWork, seq_length: int, step: StepRows, device: torch.device
) -> tuple[float, float]:
    pieces, random = _pieces(work, seq_length, step.rows), np.random.default_rng(0)
    probability = work.config.mlm.probability
    batches = [
        pad_and_mask(
            pieces[first : first + step.micro_rows],
            seq_length,
            probability,
            work.vocab_size,
            random,
        )
        for first in range(0, len(pieces), step.micro_rows)
    ]
    seconds = time_megatron(
        work.config, work.vocab_size, batches, step.micro_batches, work.warm_up, device
    )
    return _text_of_a_step(work, pieces), seconds


_MEASURES = {OURS: _ours, TRAINER: _trainer, MEGATRON: _megatron}


def _pieces(work: PeersWork, seq_length: int, rows: int) -> list[NDArray[np.int32]]:
    """The pieces of all steps, shuffled, because adjacent pieces come from one document."""
    pieces = document_pieces(work.corpora, seq_length, rows * (work.warm_up + work.steps))
    order = np.random.default_rng(0).permutation(len(pieces))
    return [pieces[number] for number in order]


def _text_of_a_step(work: PeersWork, pieces: list[NDArray[np.int32]]) -> float:
    """Average tokens of text in a step."""
    return sum(map(len, pieces)) / (work.warm_up + work.steps)
