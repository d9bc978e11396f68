"""Jobs to plan: RetrievaBERT's recipe on machines of the table."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.config.load import load_config
from megatron_bert.config.schema import Config
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Layout, Split
from megatron_bert.planner.machines import find_machine

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"
VOCABULARY = 99_584


def recipe(*overrides: str) -> Config:
    """RetrievaBERT-1.3B's published run."""
    return load_config(EXAMPLE, overrides)


def job(ranks: int, *overrides: str, gpu: str = "h100-80gb") -> Job:
    """The run on so many GPUs."""
    return Job(recipe(*overrides), VOCABULARY, find_machine(gpu), ranks)


def single(micro_tokens: int) -> Layout:
    """All of it on one GPU."""
    return Layout(Split(1, False, 1, "1f1b", 1, 1), micro_tokens, "none")
