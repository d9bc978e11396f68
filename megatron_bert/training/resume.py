"""Where a job begins: afresh, at its run's newest checkpoint, or at another run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bert.checkpoint.manifest import MANIFEST_NAME
from megatron_bert.checkpoint.run_state import RunState
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.diagnostics import raise_problems
from megatron_bert.config.identity import check_resume
from megatron_bert.config.kernels import fp8_changes
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.config.schema import Config
from megatron_bert.data.source import RowSource
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.device_facts import facts_at_hand
from megatron_bert.errors import CheckpointError


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a job goes on from.

    Attributes:
        path: its folder.
        new_run: whether it belongs to another run, from which this one branches off.
    """

    path: Path
    new_run: bool


def starting_point(config: Config, store: CheckpointStore) -> StartingPoint | None:
    """Find the checkpoint that `checkpoint.resume` means; None begins afresh. Collective.

    Raises:
        CheckpointError: there are checkpoints that `checkpoint.resume` does not go on from, or
            none of them is intact.
    """
    resume = config.checkpoint.resume
    newest = store.newest()
    if resume == "none" and newest is not None:
        raise CheckpointError(
            f"checkpoint.resume=none, but {store.root} holds checkpoints, the newest "
            f"{newest.name}; choose another run.dir, or resume with checkpoint.resume=auto"
        )
    if resume in ("auto", "none"):
        return None if newest is None else StartingPoint(newest, new_run=False)
    if Path(resume).resolve().is_relative_to(config.run.directory.resolve()):
        raise CheckpointError(
            f"checkpoint.resume={resume} lies in this run's own run.dir, whose newest "
            "checkpoint is the one to go on from; set checkpoint.resume=auto, or branch off "
            "into a new run.dir"
        )
    checkpoints = RunPaths(Path(resume)).checkpoints
    if checkpoints.is_dir():
        raise CheckpointError(
            f"checkpoint.resume={resume} is a run directory; name one of its checkpoints: "
            + (", ".join(map(str, sorted(checkpoints.glob("step_*")))) or "it has none")
        )
    if newest is None and not (Path(resume) / MANIFEST_NAME).is_file():
        is_folder = Path(resume).is_dir()
        problem = (
            "holds no manifest.json, so it is no checkpoint" if is_folder else "no such folder"
        )
        raise CheckpointError(
            f"checkpoint.resume={resume}: {problem}; name a complete one, as "
            "runs/NAME/checkpoints/step_00001234, or begin anew with checkpoint.resume=auto"
        )
    if newest is not None:
        # A later job of a branched run goes on from its own checkpoints.
        return StartingPoint(newest, new_run=False)
    return StartingPoint(Path(resume), new_run=True)


def check_continuity(
    start: StartingPoint,
    state: RunState,
    config: Config,
    tokenizer: Tokenizer,
    source: RowSource,
) -> None:
    """Refuse to go on under another configuration, tokenizer or dataset.

    Args:
        start: where the job begins.
        state: what that checkpoint's manifest says.
        config: this job's configuration.
        tokenizer: this job's tokenizer.
        source: this job's training rows.

    Raises:
        ConfigError: a key changed that may not.
        CheckpointError: the tokenizer or the data are not those of the checkpoint, or no run
            wrote it.
    """
    with state.reading():
        check_resume(state.config, config, state.step, start.new_run, start.path)
        if not start.new_run:
            facts = facts_at_hand(config.run.device)
            raise_problems(list(fp8_changes(state.config, config, facts)), "a resumed run")
    if state.tokenizer_hash != tokenizer.hash:
        raise CheckpointError(
            f"{start.path} was trained with a tokenizer of hash {state.tokenizer_hash}, "
            f"{config.data.tokenizer} has {tokenizer.hash}; use the tokenizer that the run began "
            "with"
        )
    if not start.new_run and state.data != source.fingerprint():
        corpora = zip(config.data.train, state.data, source.fingerprint(), strict=False)
        changed = [
            f"{corpus.prefix} had {then}, and has {now}"
            for corpus, then, now in corpora
            if then != now
        ]
        raise CheckpointError(
            f"{start.path} was trained on other data than data.train names now: "
            f"{'; '.join(changed)}; restore the datasets that the run began with, or branch off: "
            f"checkpoint.resume={start.path} and a new run.dir"
        )
