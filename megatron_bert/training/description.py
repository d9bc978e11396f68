"""What a run is, in a few lines: printed at its start and by `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.config.kernels import describe_kernels
from megatron_bert.config.layout import BatchLayout
from megatron_bert.config.parameters import parameter_count, rank_state_bytes
from megatron_bert.config.pipeline_stages import stage_layers, virtual_stages
from megatron_bert.config.schema import Config, ModelConfig
from megatron_bert.data.source import RowSource
from megatron_bert.training.held_out import HeldOutRows

# From where on work done for nothing is a reason to choose another layout.
_MUCH_SURPLUS_PERCENT = 10.0


def describe_plan(config: Config, vocab_size: int | None, world_size: int) -> Iterator[str]:
    """Yield what is known from the configuration alone.

    Args:
        config: the checked configuration.
        vocab_size: padded vocabulary, None where only an absent tokenizer knows it.
        world_size: number of ranks.
    """
    data_parallel = world_size // (config.parallel.tensor * config.parallel.pipeline)
    yield _describe_model(config.model, vocab_size)
    if vocab_size is not None:
        yield _describe_memory(config, vocab_size, data_parallel)
    yield _describe_layout(config, world_size, data_parallel)
    if vocab_size is not None and config.parallel.pipeline > 1:
        blocks = ", ".join(str(len(layers)) for layers in stage_layers(config, vocab_size))
        yield f"stages      {blocks} blocks"
    yield _describe_precision(config, data_parallel)
    compiled = ", blocks compiled" if config.compile.enabled else ""
    yield f"kernels     {describe_kernels(config)}{compiled}"
    curriculum = Curriculum(config)
    yield (
        f"curriculum  {curriculum.total_steps:,} steps, {curriculum.total_slots:,} token slots "
        f"({_rounded(curriculum.total_slots)})"
    )
    for span in curriculum.spans:
        yield from _describe_stage(config, span, curriculum, data_parallel)
    yield _describe_places(config)


def _describe_model(model: ModelConfig, vocab_size: int | None) -> str:
    if vocab_size is None:
        size = "parameters unknown without the tokenizer (model.vocab_size would do)"
    else:
        size = f"{parameter_count(model, vocab_size):,} parameters, vocabulary {vocab_size:,}"
    return (
        f"model       {size}; {model.num_layers} layers, hidden {model.hidden_size:,}, "
        f"feed-forward {model.ffn_hidden_size:,}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} key/value heads"
    )


def _describe_stage(
    config: Config, span: StageSpan, curriculum: Curriculum, data_parallel: int
) -> Iterator[str]:
    layout = BatchLayout.of(config, span.global_size, span.seq_length, data_parallel)
    share = 100 * layout.surplus_share
    surplus = f", {layout.surplus_rows} surplus rows ({share:.3g} %)" if share else ""
    yield (
        f"stage {span.index + 1:<5} length {span.seq_length}, steps {span.first_step:,} to "
        f"{span.last_step:,}, {_own_values(span, curriculum)}"
        f"{span.masked_slots} masked slots a row, "
        f"{layout.num_micro_batches} x {layout.micro_size} rows a rank{surplus}"
    )
    if share > _MUCH_SURPLUS_PERCENT:
        yield (
            f"warning     {share:.3g} % of the rows that stage {span.index + 1} computes are "
            f"surplus: {data_parallel} data-parallel ranks take {layout.num_micro_batches} "
            "micro-batches each; use more rows a step, or fewer ranks"
        )


def _describe_memory(config: Config, vocab_size: int, data_parallel: int) -> str:
    """What the optimizer needs on the rank that holds the most."""
    shards = data_parallel // config.parallel.replicate
    state = max(rank_state_bytes(config, vocab_size)) / shards / 2**30
    rank = "a rank" if config.parallel.pipeline == 1 else "on the fullest rank"
    return (
        f"memory      {state:.2f} GiB {rank} for weights, gradients and moments in fp32; "
        "gathered weights and activations not counted"
    )


def _describe_layout(config: Config, world_size: int, data_parallel: int) -> str:
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
    ranks = "rank" if world_size == 1 else "ranks"
    line = f"layout      {world_size:,} {ranks}: {' x '.join(axes)}"
    return line if config.recompute == "none" else f"{line}; recomputation {config.recompute}"


def _describe_precision(config: Config, data_parallel: int) -> str:
    line = f"precision   compute {config.precision.compute}; weights and states fp32"
    if config.precision.reduce != "fp32" and data_parallel > 1:
        line += f"; gradients reduced in {config.precision.reduce}"
    return line


def _describe_places(config: Config) -> str:
    log = config.log
    line = (
        f"writes to   {config.run.directory}: metrics.jsonl; a checkpoint every "
        f"{config.checkpoint.interval:,} steps, the newest {config.checkpoint.keep} are kept"
    )
    if log.wandb.mode != "disabled":
        line += f"; Weights & Biases {log.wandb.mode}, project {log.wandb.project}"
    return f"{line}; TensorBoard" if log.tensorboard else line


def describe_data(training: RowSource, held_out: HeldOutRows) -> Iterator[str]:
    """Yield a line a corpus: documents, tokens, how often they are read; and warnings."""
    yield from (f"train       {line}" for line in training.describe())
    for source in held_out.sources[held_out.fixed]:
        yield from (f"valid       {line}" for line in source.describe())
    for warning in (*training.warnings(), *held_out.warnings):
        yield f"warning     {warning}"


def _own_values(span: StageSpan, curriculum: Curriculum) -> str:
    """Of rows a step, masking rate and learning-rate factor those in which stages differ."""
    spans = curriculum.spans
    own = ""
    if len({other.global_size for other in spans}) > 1:
        own += f"{span.global_size:,} rows a step, "
    if len({other.probability for other in spans}) > 1:
        own += f"{100 * span.probability:g} % masked, "
    if len({other.lr_factor for other in spans}) > 1:
        own += f"learning rate x {span.lr_factor:g}, "
    return own


def _rounded(count: int) -> str:
    """A large number as people say it: 6.4 M, 187.3 B."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
