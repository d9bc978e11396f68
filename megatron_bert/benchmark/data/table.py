"""The figures of the data side as a table to read."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bert.benchmark.data.assemble import AssembleFigures
from megatron_bert.benchmark.data.epoch import EpochFigures
from megatron_bert.benchmark.data.measure import DataFigures
from megatron_bert.benchmark.data.megatron_core import MegatronCoreFigures
from megatron_bert.benchmark.data.memory import MemoryFigures
from megatron_bert.benchmark.data.plan import PlanFigures
from megatron_bert.benchmark.data.preprocess import PreprocessFigures
from megatron_bert.benchmark.table import Row, table_lines


def data_table(figures: DataFigures) -> list[str]:
    """Lines of the table."""
    return table_lines(
        figures.hardware,
        figures.versions,
        figures.quick,
        *_plan(figures.plan),
        *_assemble("articles", figures.assemble),
        *_assemble("paragraphs", figures.assemble_paragraphs),
        *_assemble("articles, n-grams", figures.assemble_ngram),
        *_megatron_core(figures.megatron_core),
        *_epoch(figures.epoch),
        *_memory(figures.memory),
        *_preprocess(figures.preprocess),
    )


def _plan(plan: PlanFigures) -> Iterator[Row]:
    work = f"plan: {plan.documents:,} documents, {plan.tokens / 1e9:.1f} B tokens"
    yield work, f"{plan.seconds:.2f} s (median {plan.median_seconds:.2f} s) for {plan.rows:,} rows"
    yield (
        "plan: memory",
        f"{plan.peak_rss_mb:,.0f} MB at most, {plan.lengths_rss_mb:,.0f} MB of it before the plan, "
        f"{plan.kept_mb:,.0f} MB kept by it; {plan.bytes_written:,} bytes written",
    )


def _assemble(what: str, figures: dict[int, AssembleFigures]) -> Iterator[Row]:
    for length, of_length in figures.items():
        best = of_length.tokens_per_second_per_core / 1e6
        median = of_length.median_tokens_per_second_per_core / 1e6
        yield (
            f"random rows of {length}, {what}",
            f"{best:.1f} M tokens/s a core (median {median:.1f}, {of_length.core_share:.0%} of the "
            f"core's time)",
        )


def _megatron_core(figures: MegatronCoreFigures | None) -> Iterator[Row]:
    if figures is not None:
        for length, rate in figures.tokens_per_second_per_core.items():
            yield (
                f"samples of {length}, Megatron-core {figures.version}",
                f"{rate / 1e6:.3f} M tokens/s a core",
            )


def _epoch(figures: dict[str, dict[int, EpochFigures]]) -> Iterator[Row]:
    for kind, by_length in figures.items():
        for length, epoch in by_length.items():
            yield (
                f"an epoch of {kind} at {length}",
                f"{epoch.filled:.3%} of slots filled, {epoch.seen_once:.3%} of tokens seen once",
            )


def _memory(memory: MemoryFigures) -> Iterator[Row]:
    yield (
        f"data side, {memory.batches:,} batches",
        f"{memory.data_mb:.1f} MB beyond mapped pages, {memory.growth_mb:+.2f} MB in the last 90 %",
    )


def _preprocess(preprocess: PreprocessFigures) -> Iterator[Row]:
    ours = preprocess.tokens_per_second
    theirs = preprocess.sentencepiece_tokens_per_second
    seconds = preprocess.tokens / ours
    yield (
        "text",
        f"{preprocess.text_bytes / 1e6:.1f} MB, {preprocess.documents:,} documents, "
        f"{preprocess.tokens:,} tokens of {preprocess.tokenizer} ({preprocess.pieces:,} pieces)",
    )
    yield (
        "preprocessing, 2 workers",
        f"{ours / 1e6:.2f} M tokens/s (median {preprocess.median_tokens_per_second / 1e6:.2f}): "
        f"{seconds:.2f} s, {preprocess.start_seconds:.2f} s of it to start",
    )
    yield (
        "SentencePiece alone, 2 threads",
        f"{theirs / 1e6:.2f} M tokens/s "
        f"(median {preprocess.median_sentencepiece_tokens_per_second / 1e6:.2f})",
    )
    yield "preprocessing against SentencePiece", f"{ours / theirs:.1%}"
