"""The checkpoints of a run: saved whole or not at all, verified before they are loaded."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_bert.checkpoint.folders import CheckpointFolders
from megatron_bert.checkpoint.manifest import (
    JSON,
    MANIFEST_NAME,
    DamagedCheckpointError,
    Manifest,
    verified_manifest,
)
from megatron_bert.checkpoint.shards import LocalShards
from megatron_bert.checkpoint.tensors import read_tensors, total_bytes, write_tensors
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.distributed.agreement import Ranks, RanksFailedError
from megatron_bert.errors import CheckpointError
from megatron_bert.files import temporary_path

MAX_FILE_BYTES = 1 << 30
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

logger = logging.getLogger(__name__)


class CheckpointDefectError(RuntimeError):
    """Saving or loading failed, on all ranks alike, for a reason that no user can mend."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that was just saved: its folder, and the bytes of its tensors' files."""

    path: Path
    size: int


class CheckpointStore:
    """A folder of checkpoints `step_00001234`, of which the newest `keep` are kept.

    Every method that says "collective" must be called by all ranks of the group together, and
    returns or raises alike on all of them. All ranks must see the same file system.

    Args:
        root: The folder; made by the first save.
        keep: How many checkpoints to keep, at least 1.
        group: The ranks that save and load together; None means the default group, or this
            process alone where torch.distributed is not initialised.
        max_file_bytes: Files are split at about this size.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        group: ProcessGroup | None = None,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        assert keep >= 1, f"keep {keep} checkpoints"
        self.root = root
        self.ranks = Ranks(group)
        self._folders = CheckpointFolders(root, keep)
        self._max_file_bytes = max_file_bytes
        self._verified: Path | None = None

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, JSON]
    ) -> Path:
        """Save a checkpoint of `step` and return its folder. Collective.

        The folder appears under its name only when it is complete and on the disk. Then `latest`
        names it and checkpoints beyond `keep` are removed. One of the same step is replaced.

        Args:
            step: Optimizer steps taken so far.
            tensors: The whole state by flat names: DTensors, of which each rank writes its shards,
                or plain tensors that are equal on all ranks.
            state: What else a resumed run needs, as JSON; the first rank's is written.

        Raises:
            CheckpointError: The host refused to write (the message has the path, and for a full
                disk the bytes needed and free). Older checkpoints are as they were.
            CheckpointDefectError: Something else failed on some rank.
        """
        return self.save_shards(step, LocalShards.of(tensors), state).path

    def save_shards(
        self,
        step: int,
        shards: LocalShards,
        state: Mapping[str, JSON],
        check: Callable[[], None] = lambda: None,
    ) -> SavedCheckpoint:
        """Do as `save` does, with shards that were already taken apart, and possibly copied.

        It may run in a thread of its own while the same ranks work in other groups.

        Args:
            step: See `save`.
            shards: What this rank holds of the state.
            state: See `save`.
            check: Called now and then; what it raises on a rank ends the save on all of them.

        Raises:
            CheckpointError, CheckpointDefectError: See `save`.
        """
        assert step >= 0, step
        ranks, folders = self.ranks, self._folders
        self._verified = None
        final = folders.of_step(step)
        staging = ranks.on_first(lambda: temporary_path(final))

        def publish(manifest: Manifest) -> None:
            check()
            folders.publish(staging, final, manifest)

        try:
            ranks.on_first(lambda: folders.open_staging(staging))
            files = write_tensors(staging, shards, ranks, self._max_file_bytes, check)
            ranks.on_first(lambda: publish(Manifest(step, files, state)))
        except RanksFailedError as error:
            numbers = {failure.errno for failure in error.failures}
            needed = total_bytes(shards, ranks) if numbers & _NO_SPACE else 0
            ranks.on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
            remedy = "see that every rank can write there"
            if numbers & _NO_SPACE:
                # Looked up only now that what was half written is removed: `needed` bytes must be
                # free.
                room = self._explain_full_disk(needed)
                remedy = f"make room, lower checkpoint.keep, or use a larger disk. {room}"
            elif errno.EFBIG in numbers:
                remedy = "raise the largest size of a file that the host allows (ulimit -f)"
            raise _translated(error, f"cannot save {final}: {error}; {remedy}") from error
        return SavedCheckpoint(final, sum(record.size for record in files.values()))

    def folders(self) -> list[Path]:
        """Return the folders that claim to be checkpoints, newest first, as this rank sees them."""
        return self._folders.newest_first()

    def newest(self) -> Path | None:
        """Return the newest intact checkpoint, None when there is no checkpoint. Collective.

        Sizes and checksums of all files are compared with the manifest, each rank reading its
        share. A damaged checkpoint is passed over with a warning that names the file and what is
        wrong with it.

        Raises:
            CheckpointError: There are checkpoints, but all are damaged: a run must not silently
                start anew in their place.
        """
        folders = self.ranks.on_first(self._folders.newest_first)
        damages: list[str] = []
        for folder in folders:
            try:
                self._verify(folder)
            except DamagedCheckpointError as error:
                damages.append(str(error))
                if self.ranks.rank == 0:
                    logger.warning("checkpoint %s is damaged, trying an older: %s", folder, error)
            else:
                return folder
        if damages:
            raise CheckpointError(
                f"{self.root}: no checkpoint is intact ({'; '.join(damages)}). Restore one from a "
                f"backup, or remove them to start anew"
            )
        return None

    def load(
        self, path: Path, tensors: Mapping[str, torch.Tensor], *, left_out: str | None = None
    ) -> dict[str, JSON]:
        """Fill `tensors` in place from the checkpoint `path` and return its state. Collective.

        Files are verified first, unless `newest` has just done it.

        Args:
            path: The checkpoint's folder.
            tensors: All tensors of the checkpoint by the names of `save`, sharded in any way.
            left_out: Prefix of the names of tensors that are not wanted; default: none.

        Raises:
            CheckpointError: The checkpoint is missing or damaged, or does not have exactly these
                names, shapes and types. `tensors` are untouched.
        """
        if path != self._verified:
            self._verify(path)
        state = self.read_state(path)
        try:
            read_tensors(path, tensors, self.ranks, left_out)
        except RanksFailedError as error:
            raise _translated(
                error, f"cannot load {path}: {error}; see that all ranks can read it"
            ) from error
        return state

    def read_state(self, path: Path) -> dict[str, JSON]:
        """Return the state of the checkpoint `path` without its tensors. Collective.

        Raises:
            CheckpointError: The checkpoint or its manifest is missing or damaged.
        """
        try:
            manifest = self.ranks.on_first(lambda: Manifest.read(path))
        except RanksFailedError as error:
            raise _translated(
                error, f"cannot load {path}: {error}; see that all ranks can read it"
            ) from error
        return dict(manifest.state)

    def remove_leftovers(self) -> None:
        """Remove what a killed save left behind. Collective.

        Every save does so too. Only the process that owns the run may call it: what looks left
        behind may be the save in flight of another.
        """
        try:
            self.ranks.on_first(self._folders.remove_leftovers)
        except RanksFailedError as error:
            raise _translated(
                error, f"cannot clean up {self.root}: {error}; see to who may write there"
            ) from error

    def _verify(self, folder: Path) -> None:
        ranks = self.ranks

        def read_manifest() -> Manifest:
            manifest = Manifest.read(folder)
            manifest.verify_names(folder)
            return manifest

        try:
            manifest = ranks.on_first(read_manifest)
            names = sorted(manifest.files)[ranks.rank :: ranks.size]
            ranks.on_all(lambda: manifest.verify_content(folder, names))
        except RanksFailedError as error:
            if not all(failure.is_user_error for failure in error.failures):
                # An error of the host: taking an older one would repeat training that this one may
                # hold.
                raise _translated(
                    error,
                    f"{folder} cannot be read, though it may be intact ({error}); mend the host, "
                    "or move the folder away to go on from the checkpoint before",
                ) from error
            texts = [failure.text for failure in error.failures]
            raise DamagedCheckpointError("; ".join(texts)) from error
        self._verified = folder

    def _explain_full_disk(self, needed: int) -> str:
        def look() -> tuple[int, bool]:
            there = next(path for path in (self.root, *self.root.parents) if path.is_dir())
            has_older = any(self.root.glob(f"step_*/{MANIFEST_NAME}"))
            return shutil.disk_usage(there).free, has_older

        free, has_older = self.ranks.on_first(look)
        older = "Older checkpoints are intact" if has_older else "There is no older checkpoint"
        return (
            f"The checkpoint needs a little more than {needed:,} bytes, {free:,} are free without "
            f"it. {older}"
        )


def find_checkpoint(path: Path, *, verify: bool = True) -> Path:
    """Return the checkpoint that a user means by `path`.

    Args:
        path: a checkpoint's folder, or a run directory or its `checkpoints`, whose newest intact
            one is meant.
        verify: compare every file with the manifest; a run's damaged checkpoints are passed over.
            Otherwise nothing is read, and a run's newest checkpoint is taken as it is.

    Raises:
        CheckpointError: there is none, or it is damaged, or all of a run's are.
    """
    for root in (RunPaths(path).checkpoints, path):
        if root == RunPaths(root.parent).checkpoints and root.is_dir():
            store = CheckpointStore(root, keep=1)
            newest = store.newest() if verify else next(iter(store.folders()), None)
            if newest is None:
                raise CheckpointError(f"{root} holds no checkpoint yet; train first")
            return newest
    if not (path / MANIFEST_NAME).is_file():
        problem = "has no manifest.json" if path.is_dir() else "no such directory"
        raise CheckpointError(
            f"{path}: {problem}; name a complete checkpoint "
            "(runs/NAME/checkpoints/step_00001234) or a run directory that holds one"
        )
    if verify:
        verified_manifest(path)
    return path


def _translated(error: RanksFailedError, message: str) -> Exception:
    """Return a user's error for what a user can mend, and keep a defect recognisable as one."""
    if all(failure.is_user_error or failure.errno is not None for failure in error.failures):
        return CheckpointError(message)
    return CheckpointDefectError(message)
