"""The model card's part on training: what a checkpoint says of its run, and what that measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bert.checkpoint.run_state import RunState
from megatron_bert.config.schema import DEFAULT_WARMUP_FRACTION

UNKNOWN = "unknown"


@dataclass(frozen=True)
class RunFigures:
    """What a run measured up to a checkpoint; None where it was not measured.

    Attributes:
        first_step: the first step that was recorded; those before it belong to another run.
        tokens: token slots trained on, since the curriculum began.
        masked_tokens: tokens predicted in the recorded steps.
        seconds: time in the recorded steps.
        skipped: updates among them that were skipped for numbers that are not finite.
        loss: mean training loss of the last recorded steps, in nats.
        loss_steps: how many steps that is a mean of.
        valid_step: the step of the last evaluation.
        valid_loss: its loss on held-out text, in nats.
        valid_accuracy: its share of masked tokens predicted rightly.
        valid_seq_length: the length of its rows.
    """

    first_step: int
    tokens: int
    masked_tokens: int
    seconds: float
    skipped: int
    loss: float
    loss_steps: int
    valid_step: int | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    valid_seq_length: int | None = None


def training_sections(state: RunState, figures: RunFigures | None) -> Iterator[str]:
    """Yield the card's sections on how the weights were trained.

    Args:
        state: what the checkpoint says of its run.
        figures: what the run measured; None if its metrics are not at hand.
    """
    if state.is_imported:
        yield (
            "The weights came from elsewhere and were converted twice; how they were trained is "
            "unknown here.\n"
        )
        return
    config = state.config
    if state.origin is not None:
        yield (
            f"The run went on from a checkpoint of another, `{state.origin}`, whose steps "
            "are counted with its own.\n"
        )
    yield table([*_progress(state, figures), *_settings(config), *_layout(state)])
    yield "### Curriculum\n"
    yield _curriculum(config)
    if figures is None:
        yield "What is unknown stands in the run's `metrics.jsonl`, which was not at hand.\n"


def _progress(state: RunState, figures: RunFigures | None) -> Iterator[tuple[str, str]]:
    yield "optimizer steps", f"{state.step:,}"
    yield "rows", f"{state.consumed_rows:,}"
    if figures is None:
        for name in ("token slots", "training loss", "held-out loss", "time in steps"):
            yield name, UNKNOWN
        return
    since = f" (since step {figures.first_step:,})" if figures.first_step > 1 else ""
    yield "token slots", f"{figures.tokens:,}"
    yield "tokens predicted", f"{figures.masked_tokens:,}{since}"
    yield "training loss", f"{figures.loss:.4f} nats, mean of the last {figures.loss_steps} steps"
    if figures.valid_loss is None:
        yield "held-out loss", "not evaluated"
    else:
        yield (
            "held-out loss",
            f"{figures.valid_loss:.4f} nats, accuracy {figures.valid_accuracy:.4f}, at length "
            f"{figures.valid_seq_length}, after step {figures.valid_step:,}",
        )
    yield "skipped updates", f"{figures.skipped:,}{since}"
    yield "time in steps", f"{figures.seconds / 3600:,.2f} hours{since}"


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    optimizer = {name: _key(config, "optimizer", name) for name in _OPTIMIZER}
    name = "AdamW"
    if _key(config, "optimizer", "name") == "muon":
        momentum = _key(config, "optimizer", "momentum")
        name = f"Muon (momentum {momentum}) for the blocks' matrices, AdamW for the rest"
    yield "optimizer", f"{name}, " + ", ".join(f"{_OPTIMIZER[n]} {v}" for n, v in optimizer.items())
    yield (
        "learning rate",
        f"{_key(config, 'optimizer', 'lr')} to {_key(config, 'optimizer', 'min_lr')}, "
        f"{_key(config, 'schedule', 'decay')} decay, warm-up {_warmup(config)}",
    )
    precision = f"{_key(config, 'precision', 'compute')}, weights and moments fp32"
    fp8 = _key(config, "precision", "fp8")
    if fp8 not in ("none", UNKNOWN):
        precision += f", products of blocks in FP8 ({fp8} scaling)"
    if _key(config, "precision", "reduce") == "bf16":
        precision += ", gradients reduced in bf16"
    yield "precision", precision
    yield (
        "masking",
        f"{_key(config, 'mlm', 'probability')} of the tokens, by {_key(config, 'mlm', 'unit')}; "
        f"{_key(config, 'mlm', 'mask_ratio')} masked, {_key(config, 'mlm', 'random_ratio')} random",
    )
    corpora = _key(config, "data", "train")
    if isinstance(corpora, list):
        # A prefix is a path on the machine that trained.
        names = [f"`{Path(str(corpus['prefix'])).name}`" for corpus in corpora]
        yield "training corpora", ", ".join(names)
    yield "seed", f"{_key(config, 'run', 'seed')}"


def _warmup(config: Mapping[str, Any]) -> str:
    steps = _key(config, "schedule", "warmup_steps")
    share = _key(config, "schedule", "warmup_fraction")
    if steps not in (None, UNKNOWN):
        return f"{steps} steps"
    if share == UNKNOWN:
        return UNKNOWN
    return f"share {DEFAULT_WARMUP_FRACTION if share is None else share}"


_OPTIMIZER = {
    "beta1": "beta1",
    "beta2": "beta2",
    "eps": "epsilon",
    "weight_decay": "weight decay",
    "clip_grad": "gradient clipped at",
}


def _layout(state: RunState) -> Iterator[tuple[str, str]]:
    ranks = {axis: n for axis, n in state.topology.items() if isinstance(n, int) and n > 1}
    yield "layout at the end", " x ".join(f"{axis} {n}" for axis, n in ranks.items()) or "one rank"


def _curriculum(config: Mapping[str, Any]) -> str:
    rows = []
    for stage in _key(config, "curriculum"):
        size = _key(stage, "batch", "global_size")
        rate = _key(stage, "mlm", "probability")
        own = {
            "size": _key(config, "batch", "global_size") if size in (None, UNKNOWN) else size,
            "rate": _key(config, "mlm", "probability") if rate in (None, UNKNOWN) else rate,
        }
        rows.append(
            f"| {stage['seq_length']:,} | {stage['steps']:,} | {own['size']:,} | {own['rate']} | "
            f"{stage.get('lr_factor', 1.0)} |"
        )
    head = "| row length | steps planned | rows a step | masked | learning rate x |"
    return "\n".join([head, "|---|---|---|---|---|", *rows]) + "\n"


def _key(tree: Mapping[str, Any], *names: str) -> Any:
    """A value of a configuration; `UNKNOWN` if an earlier version wrote none for the key."""
    value: Any = tree
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            return UNKNOWN
        value = value[name]
    return value


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns, without titles, in Markdown."""
    return (
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]) + "\n"
    )
