"""Checks of keys that must agree with each other; each refusal names values that work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_bert.command_line.places import place_problem, shell_problem
from megatron_bert.config.arithmetic import computed_lengths, warmup_steps
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.diagnostics import format_value, raise_problems
from megatron_bert.config.kernels import fp8_problems, kernel_conflicts, kernel_problems
from megatron_bert.config.layout_checks import layout_problems, split_backward_problems
from megatron_bert.config.profiled_steps import profile_problems
from megatron_bert.config.remedies import near_divisors, near_multiples
from megatron_bert.config.row_memory import row_problems
from megatron_bert.config.schema import Config, Corpus


def check_config(config: Config, *, world_size: int, vocab_size: int | None = None) -> None:
    """Refuse a configuration that cannot be trained on `world_size` ranks.

    Args:
        config: What `load_config` returned.
        world_size: Ranks of the job.
        vocab_size: Rows of the embedding table if already known; default: `model.vocab_size`,
            unchecked if that is not set.

    Raises:
        ConfigError: All contradictions in one message, each with key, value and values that work.
    """
    rows = config.model.vocab_size if vocab_size is None else vocab_size
    problems = [
        *value_problems(config),
        *_logger_problems(config),
        *kernel_problems(config),
        *layout_problems(config, world_size, rows),
        *row_problems(config, world_size),
    ]
    raise_problems(problems, "the configuration")


def value_problems(config: Config) -> list[str]:
    """Contradictions between values, whatever the number of ranks."""
    checks: tuple[Callable[[Config], Iterator[str]], ...] = (
        _place_problems,
        _model_problems,
        _length_problems,
        _mlm_problems,
        _corpus_problems,
        _schedule_problems,
        _batch_problems,
        split_backward_problems,
        profile_problems,
        kernel_conflicts,
        fp8_problems,
    )
    return [problem for check in checks for problem in check(config)]


def shell_problems(config: Config) -> Iterator[str]:
    """Paths with parts that only a shell would replace, as in a translated script."""
    paths = {
        "run.dir": config.run.dir,
        "data.tokenizer": config.data.tokenizer,
        "checkpoint.resume": config.checkpoint.resume,
    }
    for name, corpora in (("train", config.data.train), ("valid", config.data.valid)):
        paths |= {f"data.{name}.{i}.prefix": corpus.prefix for i, corpus in enumerate(corpora)}
    for key, path in paths.items():
        problem = None if path is None else shell_problem(path)
        if problem is not None:
            yield f"{key} = {path}: {problem}"


def _logger_problems(config: Config) -> Iterator[str]:
    wanted = {
        "wandb": ("log.wandb.mode", config.log.wandb.mode, "disabled"),
        "tensorboard": ("log.tensorboard", config.log.tensorboard, False),
    }
    for package, (key, value, off) in wanted.items():
        found = find_spec(package)
        # A folder of that name, such as wandb leaves where it ran, is found, but has no origin.
        if value != off and (found is None or found.origin is None):
            yield (
                f"{key} = {format_value(value)}: the package {package} is not installed; "
                f"pip install {package}, or use {format_value(off)}"
            )


def _place_problems(config: Config) -> Iterator[str]:
    problem = None if config.run.dir is None else place_problem(Path(config.run.dir))
    if problem is not None:
        yield f"run.dir = {config.run.dir}: {problem}"


def _model_problems(config: Config) -> Iterator[str]:
    model = config.model
    hidden, heads, groups = model.hidden_size, model.num_attention_heads, model.num_query_groups
    if hidden % heads:
        yield (
            f"model.hidden_size = {hidden}: not divisible by model.num_attention_heads = {heads}; "
            f"use {near_multiples(hidden, heads)}, or {near_divisors(hidden, heads)} heads"
        )
    if heads % groups:
        yield (
            f"model.num_query_groups = {groups}: does not divide "
            f"model.num_attention_heads = {heads}; use {near_divisors(heads, groups)}"
        )
    if model.family.rotary and groups != heads:
        yield (
            f"model.num_query_groups = {groups}: model.architecture = {model.architecture} has a "
            f"key/value head for each of model.num_attention_heads = {heads}; use {heads}"
        )
    if model.family.rotary and hidden % heads == 0 and model.head_dim % 2:
        yield (
            f"model.num_attention_heads = {heads}: heads of {model.head_dim} channels, and rotary "
            f"positions turn them in pairs; use {near_divisors(hidden // 2, heads)}"
        )


def _length_problems(config: Config) -> Iterator[str]:
    longest = config.model.max_position_embeddings
    for key, length in computed_lengths(config).items():
        if length > longest:
            yield (
                f"{key} = {length}: longer than model.max_position_embeddings = {longest}; "
                f"use at most {longest}, or model.max_position_embeddings={length}"
            )


def _mlm_problems(config: Config) -> Iterator[str]:
    mlm = config.mlm
    # Sums of shares such as 0.7 + 0.2 + 0.1 may miss 1 by a rounding error.
    if mlm.mask_ratio + mlm.random_ratio > 1 + 1e-9:
        yield (
            f"mlm.random_ratio = {mlm.random_ratio:g}: together with mlm.mask_ratio = "
            f"{mlm.mask_ratio:g} more than 1; use at most {1 - mlm.mask_ratio:g}"
        )


def _corpus_problems(config: Config) -> Iterator[str]:
    for name, corpora in (("train", config.data.train), ("valid", config.data.valid)):
        yield from _prefix_problems(f"data.{name}", corpora, is_blend=name == "train")
    yield from _blend_problems(config.data.train)


def _prefix_problems(key: str, corpora: Sequence[Corpus], *, is_blend: bool) -> Iterator[str]:
    first_use: dict[str, int] = {}
    for index, corpus in enumerate(corpora):
        stem, suffix = os.path.splitext(corpus.prefix)  # noqa: PTH122 (it is no path of a file)
        if suffix in (".bin", ".idx"):
            yield (
                f"{key}.{index}.prefix = {corpus.prefix}: is one file of the dataset; "
                f"give its prefix, {stem}"
            )
        first = first_use.setdefault(os.path.normpath(corpus.prefix), index)
        if first != index:
            shares = "weights" if corpus.epochs is None else "epochs"
            yield (
                f"{key}.{index}.prefix = {corpus.prefix}: the same corpus as {key}.{first}; "
                f"give it once{f', with the {shares} added' if is_blend else ''}"
            )


def _blend_problems(corpora: Sequence[Corpus]) -> Iterator[str]:
    """Corpora are blended either all by epochs or all by weight."""
    by_epochs = next((i for i, corpus in enumerate(corpora) if corpus.epochs is not None), None)
    if by_epochs is None:
        return
    given = f"data.train.{by_epochs}.epochs = {corpora[by_epochs].epochs:g}"
    for index, corpus in enumerate(corpora):
        key = f"data.train.{index}"
        if corpus.weight is not None:
            yield (
                f"{key}.weight = {corpus.weight:g}: {given} is given too; give all corpora "
                "epochs, or all of them weights"
            )
        elif corpus.epochs is None:
            yield (
                f"{key}.epochs is missing: {given} is given, and a corpus without epochs has a "
                f"{key}.weight of 1; give all corpora epochs, or all of them weights"
            )


def _schedule_problems(config: Config) -> Iterator[str]:
    schedule, optimizer = config.schedule, config.optimizer
    steps = Curriculum(config).total_steps
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr = {optimizer.min_lr:g}: larger than optimizer.lr = "
            f"{optimizer.lr:g}; use at most {optimizer.lr:g}"
        )
    if schedule.warmup_fraction is not None and schedule.warmup_steps is not None:
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps}: schedule.warmup_fraction = "
            f"{schedule.warmup_fraction:g} is given too; set one of them to null"
        )
        return
    warmup = warmup_steps(schedule, steps)
    if warmup > steps:
        yield (
            f"schedule.warmup_steps = {warmup}: longer than the run of {steps} steps; "
            f"use at most {steps}"
        )
        return
    decay = schedule.wsd_decay_fraction * steps
    if schedule.decay == "wsd" and warmup + decay > steps:
        yield (
            f"schedule.wsd_decay_fraction = {schedule.wsd_decay_fraction:g}: {decay:g} steps of "
            f"decay and {warmup} of warm-up are more than the run's {steps}; "
            f"use at most {(steps - warmup) / steps:g}"
        )


def _batch_problems(config: Config) -> Iterator[str]:
    batch = config.batch
    if batch.micro_size is not None and batch.micro_tokens is not None:
        yield (
            f"batch.micro_size = {batch.micro_size}: batch.micro_tokens = {batch.micro_tokens} "
            "is given too; set one of them to null"
        )
