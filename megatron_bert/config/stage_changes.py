"""Which changes of the curriculum a run allows: its past is fixed, its future may grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_bert.config.change_table import ABSENT, Change, Refusal, change_of
from megatron_bert.config.keys import INDEX, all_keys

Tree = Mapping[str, Any]

_STAGE = f"curriculum.{INDEX}."


@dataclass(frozen=True)
class _Progress:
    """How far a checkpoint is in one stage.

    Attributes:
        done: steps of the stage that were taken.
        is_over: steps of the next stage were taken.
        may_grow: the stage may be lengthened within the run, being the current or the last one.
        new_run: the job branches off into a new run.
    """

    done: int
    is_over: bool
    may_grow: bool
    new_run: bool

    @property
    def forbidden(self) -> Change | None:
        """The class of a change that would alter the stage's rows; None where it may change."""
        if self.done:
            return Change.NEVER
        return None if self.new_run else Change.NEW_RUN


def curriculum_problems(
    old: Tree, new: Tree, consumed_steps: int, new_run: bool
) -> Iterator[Refusal | str]:
    """Compare the stages of two configurations, including their batch sizes.

    Args:
        old: the whole configuration that the checkpoint was trained with, as plain values.
        new: the configuration of the job.
        consumed_steps: optimizer steps that the checkpoint has done.
        new_run: whether the job branches off into a new `run.dir`.

    Yields:
        Every change that is not allowed, as a `Refusal` or a message.
    """
    before, after = old["curriculum"], new["curriculum"]
    places = _places(before, consumed_steps, new_run)
    for index, place in enumerate(places):
        key = f"curriculum.{index}"
        if index < len(after):
            yield from _length_problems(key, before[index], after[index], place)
            yield from _learning_problems(old, new, index, new_run)
        elif place.forbidden:
            yield Refusal(key, _shown(before[index]), ABSENT, place.forbidden)
    if not new_run:
        for index in range(len(before), len(after)):
            yield Refusal(f"curriculum.{index}", ABSENT, _shown(after[index]), Change.NEW_RUN)
    yield from _batch_size_problems(old, new, places, new_run)


def _places(stages: Sequence[Tree], consumed_steps: int, new_run: bool) -> list[_Progress]:
    places = []
    begin = 0
    for index, stage in enumerate(stages):
        end = begin + stage["steps"]
        # A stage stays current until the first step of the next one is taken, so that a run that
        # has just reached a stage's end can still lengthen it.
        is_current = begin <= consumed_steps <= end
        places.append(
            _Progress(
                done=min(max(consumed_steps - begin, 0), stage["steps"]),
                is_over=consumed_steps > end,
                may_grow=is_current or index == len(stages) - 1,
                new_run=new_run,
            )
        )
        begin = end
    return places


def _length_problems(
    key: str, before: Tree, after: Tree, place: _Progress
) -> Iterator[Refusal | str]:
    """Compare a stage's row length and number of steps."""
    if after["seq_length"] != before["seq_length"] and place.forbidden:
        yield Refusal(
            f"{key}.seq_length", before["seq_length"], after["seq_length"], place.forbidden
        )
    steps, new_steps = before["steps"], after["steps"]
    if new_steps == steps:
        return
    if place.is_over:
        yield Refusal(f"{key}.steps", steps, new_steps, Change.NEVER)
    elif new_steps < place.done:
        yield (
            f"{key}.steps: was {steps}, is {new_steps}, but {place.done} steps of this stage are "
            f"done; use at least {place.done}"
        )
    elif not place.new_run and not (new_steps > steps and place.may_grow):
        yield Refusal(f"{key}.steps", steps, new_steps, Change.NEW_RUN)


def _learning_problems(old: Tree, new: Tree, index: int, new_run: bool) -> Iterator[Refusal]:
    """Compare the settings that a stage overrides; the table of changes has their class."""
    for name, key in all_keys().items():
        if not (key.is_leaf and name.startswith(_STAGE)):
            continue
        change, of_stage = change_of(name), name.removeprefix(_STAGE)
        before, after = (_setting(tree, index, of_stage) for tree in (old, new))
        # If neither stage has its own value, the run's is compared under its own name.
        differ = before.value != after.value and (before.own or after.own)
        if differ and change.is_refused(new_run):
            yield Refusal(f"curriculum.{index}.{of_stage}", before.value, after.value, change)


def _batch_size_problems(
    old: Tree, new: Tree, places: Sequence[_Progress], new_run: bool
) -> Iterator[Refusal | str]:
    """Compare the batch sizes that apply in the stages, wherever they are set."""
    problems: dict[str, Refusal] = {}
    begun: list[str] = []
    first, second = (tree["batch"]["global_size"] for tree in (old, new))
    for index, place in enumerate(places[: len(new["curriculum"])]):
        before, after = (_setting(tree, index, "batch.global_size") for tree in (old, new))
        if before.value == after.value or not place.forbidden:
            continue
        stage_key = f"curriculum.{index}." if before.own or after.own else ""
        key = f"{stage_key}batch.global_size"
        if new_run and not stage_key:
            begun.append(f"curriculum.{index}.batch.global_size={before.value}")
            continue
        # Keep the first stage's refusal: begun stages are refused more strictly than later ones.
        problems.setdefault(key, Refusal(key, before.value, after.value, place.forbidden))
    if first != second and not new_run:
        # Evaluation reads batches of this size, whatever the stages set.
        key = "batch.global_size"
        problems.setdefault(key, Refusal(key, first, second, Change.NEW_RUN))
    yield from problems.values()
    if begun:
        yield (
            f"batch.global_size: was {first}, is {second}, and stages that have begun keep their "
            f"size; set {' '.join(begun)} beside it, or restore the old value"
        )


@dataclass(frozen=True)
class _Setting:
    """A value that applies in a stage, and whether it is the stage's own or a default."""

    value: Any
    own: bool


def _setting(tree: Tree, index: int, name: str) -> _Setting:
    """The value of a stage's key; `name` is dotted, without the `curriculum.N.` prefix."""
    own = _value(tree["curriculum"][index], name)
    if own is not None:
        return _Setting(own, own=True)
    default = all_keys()[f"{_STAGE}{name}"].default
    return _Setting(_value(tree, name) if default is None else default, own=False)


def _value(tree: Tree, name: str) -> Any:
    """A key's value; None if it is not given, as in a configuration older than the key."""
    value: Any = tree
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(stage: Tree) -> dict[str, int]:
    return {"seq_length": stage["seq_length"], "steps": stage["steps"]}
