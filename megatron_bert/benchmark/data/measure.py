"""All measurements of the data core and of preprocessing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bert.benchmark.data.assemble import AssembleFigures, AssembleWork, measure_assembly
from megatron_bert.benchmark.data.epoch import EpochFigures, count_epoch
from megatron_bert.benchmark.data.megatron_core import (
    MegatronCoreFigures,
    is_installed,
    measure_megatron_core,
)
from megatron_bert.benchmark.data.memory import MemoryFigures, measure_memory
from megatron_bert.benchmark.data.plan import PlanFigures, PlanWork, measure_plan
from megatron_bert.benchmark.data.preprocess import (
    PreprocessFigures,
    measure_preprocessing,
    read_documents,
    tokenizer_for,
)
from megatron_bert.benchmark.machine import Hardware, describe_hardware, describe_versions
from megatron_bert.benchmark.process import run_isolated
from megatron_bert.benchmark.synthetic import (
    ARTICLES,
    PARAGRAPHS,
    Corpora,
    draw_lengths,
    write_corpora,
)
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config, MlmConfig
from megatron_bert.errors import DataError

SEQ_LENGTHS = (128, 512, 2048)
_KINDS = (PARAGRAPHS, ARTICLES)


@dataclass(frozen=True)
class DataSizes:
    """How much each measurement works on.

    Attributes:
        plan_documents: documents in all corpora of the plan.
        plan_tokens: their tokens.
        plan_shortening: factor by which the rows of the recipe's stages are divided.
        assemble_tokens: tokens of the datasets that rows are assembled from.
        epoch_tokens: tokens of the corpora whose first epoch is counted.
        text_bytes: approximate size of the text to preprocess.
        rival_tokens: tokens of the samples that Megatron-core makes at each length.
        memory_batches: batches assembled while memory is watched.
        repetitions: of everything that is timed.
    """

    plan_documents: int
    plan_tokens: int
    plan_shortening: int
    assemble_tokens: int
    epoch_tokens: int
    text_bytes: int
    rival_tokens: int
    memory_batches: int
    repetitions: int


FULL = DataSizes(
    plan_documents=200_000_000,
    plan_tokens=187_000_000_000,
    plan_shortening=1,
    assemble_tokens=64_000_000,
    epoch_tokens=20_000_000,
    text_bytes=100_000_000,
    rival_tokens=100_000,
    memory_batches=5000,
    repetitions=5,
)

QUICK = DataSizes(
    plan_documents=200_000,
    plan_tokens=187_000_000,
    plan_shortening=1000,
    assemble_tokens=400_000,
    epoch_tokens=400_000,
    text_bytes=200_000,
    rival_tokens=5000,
    memory_batches=50,
    repetitions=2,
)
"""Takes seconds rather than minutes: shows that everything runs; its figures mean nothing."""


@dataclass(frozen=True)
class DataOptions:
    """What to measure with.

    Attributes:
        recipe: its curriculum and its corpora's weights are planned.
        corpus: text files to preprocess.
        json_key: key of their text.
        tokenizer: a SentencePiece model; None: one is trained on the corpus.
        sizes: how much to measure.
    """

    recipe: Config
    corpus: Sequence[Path]
    json_key: str
    tokenizer: Path | None
    sizes: DataSizes


@dataclass(frozen=True)
class DataFigures:
    """The figures, by document kind and row length where there are several.

    Attributes:
        hardware: what they were measured on.
        versions: of the packages they were measured with.
        quick: whether the work was too small for the figures to mean anything.
        plan: planning the recipe.
        assemble: rows of articles, single tokens masked.
        assemble_paragraphs: rows of paragraphs, single tokens masked.
        assemble_ngram: rows of articles, runs of tokens masked.
        epoch: slots filled and tokens seen.
        memory: of the data side.
        preprocess: preprocessing the text.
        megatron_core: making Megatron-core's samples; None if it is not installed.
    """

    hardware: Hardware
    versions: dict[str, str]
    quick: bool
    plan: PlanFigures
    assemble: dict[int, AssembleFigures]
    assemble_paragraphs: dict[int, AssembleFigures]
    assemble_ngram: dict[int, AssembleFigures]
    epoch: dict[str, dict[int, EpochFigures]]
    memory: MemoryFigures
    preprocess: PreprocessFigures
    megatron_core: MegatronCoreFigures | None

    def document(self) -> dict[str, Any]:
        """The figures for JSON: `fill` and `seen_once` separately, shares by kind and length."""
        fields = asdict(self)
        epoch = fields.pop("epoch")
        for share, name in (("fill", "filled"), ("seen_once", "seen_once")):
            fields[share] = {
                kind: {length: figures[name] for length, figures in lengths.items()}
                for kind, lengths in epoch.items()
            }
        return fields


def measure_data(options: DataOptions, say: Callable[[str], None]) -> DataFigures:
    """Measure everything, in a temporary folder of about a gigabyte.

    Args:
        options: what to measure with.
        say: called with what is being measured.

    Raises:
        DataError: the corpus or tokenizer cannot be used, or the disk or the memory is too small.
    """
    hardware, versions = describe_hardware(), describe_versions()
    try:
        with tempfile.TemporaryDirectory(prefix="megatron_bert_benchmark_") as folder:
            return _measure(options, Path(folder), hardware, versions, say)
    except OSError as error:
        raise DataError(
            f"cannot write benchmark data ({error}); set TMPDIR to a folder with 2 GB free"
        ) from error


def _measure(
    options: DataOptions,
    folder: Path,
    hardware: Hardware,
    versions: dict[str, str],
    say: Callable[[str], None],
) -> DataFigures:
    sizes, weights = options.sizes, _weights(options.recipe)
    # First, because the user's files may be wrong.
    say("preparing the corpus and the tokenizer")
    texts = read_documents(options.corpus, options.json_key, sizes.text_bytes)
    tokenizer = tokenizer_for(options.tokenizer, texts, folder)
    say("preprocessing")
    preprocess = measure_preprocessing(texts, tokenizer, folder, sizes.repetitions)
    say(f"planning {sizes.plan_documents:,} documents")
    plan = run_isolated(measure_plan, _plan_work(options.recipe, sizes))
    say("writing datasets")
    articles = write_corpora(folder, ARTICLES, sizes.assemble_tokens, weights)
    paragraphs = write_corpora(folder, PARAGRAPHS, sizes.assemble_tokens, weights)

    def assemble(corpora: Corpora, mlm: MlmConfig) -> dict[int, AssembleFigures]:
        say(f"assembling rows of {Path(corpora.prefixes[0]).name[:-2]}, unit {mlm.unit}")
        work = AssembleWork(corpora, SEQ_LENGTHS, mlm, sizes.repetitions)
        return run_isolated(measure_assembly, work)

    of_articles = assemble(articles, MlmConfig())
    of_paragraphs = assemble(paragraphs, MlmConfig())
    of_ngrams = assemble(articles, MlmConfig(unit="ngram"))
    say("watching memory")
    memory = run_isolated(measure_memory, articles, 512, sizes.memory_batches)
    rival = None
    if is_installed():
        say("making samples with Megatron-core")
        rival = run_isolated(
            measure_megatron_core, folder, SEQ_LENGTHS, sizes.rival_tokens, sizes.repetitions
        )
    say("counting an epoch")
    return DataFigures(
        hardware=hardware,
        versions=versions,
        quick=sizes is QUICK,
        plan=plan,
        assemble=of_articles,
        assemble_paragraphs=of_paragraphs,
        assemble_ngram=of_ngrams,
        epoch={kind.name: _count_epochs(kind.mean_tokens, sizes.epoch_tokens) for kind in _KINDS},
        memory=memory,
        preprocess=preprocess,
        megatron_core=rival,
    )


def _weights(recipe: Config) -> list[float]:
    return [corpus.weight_or_default for corpus in recipe.data.train]


def _plan_work(recipe: Config, sizes: DataSizes) -> PlanWork:
    return PlanWork(
        documents=sizes.plan_documents,
        tokens=sizes.plan_tokens,
        weights=_weights(recipe),
        stages=[
            (span.seq_length, max(1, span.num_rows // sizes.plan_shortening))
            for span in Curriculum(recipe).spans
        ],
        repetitions=sizes.repetitions,
    )


def _count_epochs(mean_tokens: float, tokens: int) -> dict[int, EpochFigures]:
    lengths_D = draw_lengths(round(tokens / mean_tokens), mean_tokens, seed=0)
    return {length: count_epoch(lengths_D, length) for length in SEQ_LENGTHS}
