"""What a run is, in a few lines: printed at its start and by `--dry-run`."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.config.kernels import ComputeDevice, describe_kernels, records_passes
from megatron_bert.config.parameters import parameter_count, rank_state_bytes
from megatron_bert.config.pipeline_stages import stage_layers, virtual_stages
from megatron_bert.config.schema import Config, ModelConfig
from megatron_bert.data.source import RowSource
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_export import export_obstacle
from megatron_bert.training.held_out import HeldOutRows
from megatron_bert.words import counted, rounded

# Above this share of surplus rows, which are computed for nothing, another layout is advised.
_MUCH_SURPLUS_PERCENT = 10.0
# Stages or corpora listed per line, at most.
_MOST_ITEMS = 3
# Width of the label before a line's text, trailing blanks included.
_LABEL_WIDTH = 12

logger = logging.getLogger(__name__)


def tell_plan(lines: Iterable[str]) -> None:
    """Log a plan, a line at a time.

    On a terminal, a line that is too wide is wrapped and indented to its own text; in a file it
    stays one line.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        for part in [line] if width is None else _wrapped(line, width):
            logger.info("%s", part)


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line,
        max(width, 2 * _LABEL_WIDTH),
        subsequent_indent=" " * _LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def describe_plan(
    config: Config,
    vocab_size: int | None,
    world_size: int,
    device: ComputeDevice,
    *,
    whole: bool = False,
) -> Iterator[str]:
    """Yield what is known from the configuration alone, and warnings.

    Args:
        config: the checked configuration.
        vocab_size: padded vocabulary size; None if it depends on a tokenizer that is missing.
        world_size: number of ranks.
        device: what is known of the ranks' devices.
        whole: list every stage on its own line, however many; by default the plan and
            `describe_data` together take ten lines at most.
    """
    data_parallel = world_size // (config.parallel.tensor * config.parallel.pipeline)
    yield _describe_model(config.model, vocab_size)
    if vocab_size is not None:
        yield _describe_memory(config, vocab_size, data_parallel)
    yield _describe_layout(config, vocab_size, world_size, data_parallel)
    yield _describe_computation(config, data_parallel, device)
    curriculum = Curriculum(config)
    steps = counted(curriculum.total_steps, "step")
    slots = counted(curriculum.total_slots, "token slot")
    if (short := rounded(curriculum.total_slots)) not in slots:
        slots += f" ({short})"
    layouts = [
        BatchLayout.of(config, span.global_size, span.seq_length, data_parallel)
        for span in curriculum.spans
    ]
    stages = map(partial(_describe_stage, curriculum), curriculum.spans, layouts)
    yield from _listed("curriculum", [f"{steps}, {slots}", *stages], None if whole else 2)
    yield from _surplus_warnings(layouts, data_parallel)
    yield _describe_places(config)


def _listed(label: str, items: Sequence[str], most_lines: int | None) -> Iterator[str]:
    """Yield one line per item, or a few items per line if that would exceed `most_lines`."""
    lines = len(items) if most_lines is None else min(most_lines, len(items))
    shown = items if most_lines is None else items[: lines * _MOST_ITEMS]
    for number in range(lines):
        a_line = ceil_div(len(shown), lines)
        text = "; ".join(shown[number * a_line : (number + 1) * a_line])
        if number == lines - 1 and len(shown) < len(items):
            text += (
                f"; and {len(items) - len(shown):,} more (pretrain_bert.py --dry-run lists them)"
            )
        yield f"{label:<{_LABEL_WIDTH}}{text}"


def _describe_model(model: ModelConfig, vocab_size: int | None) -> str:
    if vocab_size is None:
        size = "parameters unknown without the tokenizer (model.vocab_size would do)"
    else:
        size = f"{parameter_count(model, vocab_size):,} parameters, vocabulary {vocab_size:,}"
    return (
        f"model       {size}; {counted(model.num_layers, 'layer')}, hidden {model.hidden_size:,}, "
        f"feed-forward {model.ffn_hidden_size:,}, {counted(model.num_attention_heads, 'head')}, "
        f"{counted(model.num_query_groups, 'key/value head')}"
    )


def _describe_stage(curriculum: Curriculum, span: StageSpan, layout: BatchLayout) -> str:
    share = 100 * layout.surplus_share
    surplus = f", {counted(layout.surplus_rows, 'surplus row')} ({share:.3g} %)" if share else ""
    return (
        f"stage {span.index + 1}: length {span.seq_length}, steps {span.first_step:,} to "
        f"{span.last_step:,}, {_own_values(span, curriculum)}"
        f"{counted(span.masked_slots, 'masked slot')} a row, "
        f"{layout.num_micro_batches} x {counted(layout.micro_size, 'row')} a rank{surplus}"
    )


def _surplus_warnings(layouts: Sequence[BatchLayout], data_parallel: int) -> Iterator[str]:
    for number, layout in enumerate(layouts, start=1):
        share = 100 * layout.surplus_share
        if share > _MUCH_SURPLUS_PERCENT:
            micro_batches = counted(layout.num_micro_batches, "micro-batch", "micro-batches")
            ranks = counted(data_parallel, "data-parallel rank")
            fewer = ", or fewer ranks" if data_parallel > 1 else ""
            yield (
                f"warning     {share:.3g} % of the rows that stage {number} computes are surplus: "
                f"{ranks} with {micro_batches} of {counted(layout.micro_size, 'row')}; use more "
                f"rows a step, smaller micro-batches{fewer}"
            )


def _describe_memory(config: Config, vocab_size: int, data_parallel: int) -> str:
    """The sharded training state (weights, gradients, moments) of the rank that holds the most."""
    shards = data_parallel // config.parallel.replicate
    state = _size(max(rank_state_bytes(config, vocab_size)) / shards)
    rank = "a rank" if config.parallel.pipeline == 1 else "on the fullest rank"
    return (
        f"memory      {state} {rank} for weights, gradients and moments in fp32; "
        "gathered weights and activations not counted"
    )


def _describe_layout(
    config: Config, vocab_size: int | None, world_size: int, data_parallel: int
) -> str:
    parallel = config.parallel
    axes = []
    if parallel.pipeline > 1:
        virtual = virtual_stages(config)
        stages = f", {virtual} stages a rank" if virtual > 1 else ""
        axes.append(f"pipeline {parallel.pipeline} ({parallel.pipeline_schedule}{stages})")
    copies = parallel.replicate
    shards = f" ({copies} copies x {data_parallel // copies} shards)" if copies > 1 else ""
    axes.append(f"data {data_parallel}{shards}")
    sequence = " (sequence parallel)" if parallel.sequence and parallel.tensor > 1 else ""
    axes.append(f"tensor {parallel.tensor}{sequence}")
    line = f"layout      {counted(world_size, 'rank')}: {' x '.join(axes)}"
    if vocab_size is not None and parallel.pipeline > 1:
        blocks = ", ".join(str(len(layers)) for layers in stage_layers(config, vocab_size))
        line += f"; {blocks} blocks"
    return line if config.recompute == "none" else f"{line}; recomputation {config.recompute}"


def _describe_computation(config: Config, data_parallel: int, device: ComputeDevice) -> str:
    line = f"compute     {config.precision.compute}; weights and states fp32"
    if config.precision.reduce != "fp32" and data_parallel > 1:
        line += f"; gradients reduced in {config.precision.reduce}"
    compiled = ", blocks compiled" if config.compile.enabled else ""
    recorded = ", passes recorded (CUDA graphs)" if records_passes(config, device) else ""
    return f"{line}; kernels {describe_kernels(config, device)}{compiled}{recorded}"


def _describe_places(config: Config) -> str:
    log, interval, keep = config.log, config.checkpoint.interval, config.checkpoint.keep
    often = "step" if interval == 1 else f"{interval:,} steps"
    kept = "newest is" if keep == 1 else f"newest {keep} are"
    line = (
        f"writes to   {config.run.directory}: {config.run.paths.metrics.name}; "
        f"a checkpoint every {often}, the {kept} kept"
    )
    if log.wandb.mode != "disabled":
        line += f"; Weights & Biases {log.wandb.mode}, project {log.wandb.project}"
    return f"{line}; TensorBoard" if log.tensorboard else line


def describe_data(
    training: RowSource, held_out: HeldOutRows, *, whole: bool = False
) -> Iterator[str]:
    """Yield each corpus' documents, tokens, and how often it is read; and warnings.

    Args:
        training: rows of the run.
        held_out: the rows that are evaluated.
        whole: list every corpus on its own line; default: as for `describe_plan`.
    """
    yield from _listed("train", training.describe(), None if whole else 2)
    texts = [line for source in held_out.sources[held_out.fixed] for line in source.describe()]
    yield from _listed("valid", texts, None if whole else 1)
    for warning in (*training.warnings(), *held_out.warnings):
        yield f"warning     {warning}"


def tokenizer_warnings(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Warn if runs with this tokenizer, loaded from `path`, cannot be exported."""
    obstacle = export_obstacle(path, tokenizer)
    if obstacle is not None:
        yield (
            f"warning     tokenizer {path} {obstacle}: this run cannot be exported to Hugging Face"
        )


def _own_values(span: StageSpan, curriculum: Curriculum) -> str:
    """A stage's rows per step, masking rate and learning-rate factor, where stages differ."""
    spans = curriculum.spans
    own = ""
    if len({other.global_size for other in spans}) > 1:
        own += f"{span.global_size:,} rows a step, "
    if len({other.probability for other in spans}) > 1:
        own += f"{100 * span.probability:g} % masked, "
    if len({other.lr_factor for other in spans}) > 1:
        own += f"learning rate x {span.lr_factor:g}, "
    return own


def _size(count: float) -> str:
    """A number of bytes, in the unit that leaves it two digits or more."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"
