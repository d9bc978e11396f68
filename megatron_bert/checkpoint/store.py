"""The checkpoints of a run: saved whole or not at all, verified before they are loaded."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_bert.checkpoint.manifest import (
    JSON,
    MANIFEST_NAME,
    DamagedCheckpointError,
    Manifest,
)
from megatron_bert.checkpoint.tensors import (
    MAX_FILE_BYTES,
    read_tensors,
    total_bytes,
    write_tensors,
)
from megatron_bert.config.errors import CheckpointError
from megatron_bert.distributed.agreement import Ranks, RanksFailedError
from megatron_bert.files import (
    TEMPORARY_INFIX,
    sync_to_disk,
    temporary_path,
    write_atomically,
)

LATEST_NAME = "latest"
_FOLDER = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(rf"(step_\d{{8,}}|{LATEST_NAME}){re.escape(TEMPORARY_INFIX)}[0-9a-f]+")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

logger = logging.getLogger(__name__)


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
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}; at least 1 must be kept")
        self.root = root
        self.keep = keep
        self._max_file_bytes = max_file_bytes
        self._ranks = Ranks(group)
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
        """
        assert step >= 0, step
        ranks = self._ranks
        self._verified = None
        needed = total_bytes(tensors, ranks)
        final = self.root / f"step_{step:08d}"
        staging = ranks.on_first(lambda: temporary_path(final))
        try:
            ranks.on_first(lambda: self._open_staging(staging))
            files = write_tensors(staging, tensors, ranks, self._max_file_bytes)
            ranks.on_first(lambda: self._publish(staging, final, Manifest(step, files, state)))
        except RanksFailedError as error:
            # Before the temporaries go, so that the free bytes are those that did not suffice.
            message = ranks.on_first(partial(self._explain, error, final, needed))
            ranks.on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
            raise _translated(error, message) from error
        return final

    def newest(self) -> Path | None:
        """Return the newest intact checkpoint, None when there is no checkpoint. Collective.

        Sizes and checksums of all files are compared with the manifest, each rank reading its
        share. A damaged checkpoint is passed over with a warning that names the file and what is
        wrong with it.

        Raises:
            CheckpointError: There are checkpoints, but all are damaged: a run must not silently
                start anew in their place.
        """
        folders = self._ranks.on_first(self._folders)
        damages: list[str] = []
        for folder in folders:
            try:
                self._verify(folder)
            except DamagedCheckpointError as error:
                damages.append(str(error))
                if self._ranks.rank == 0:
                    logger.warning("checkpoint %s is damaged, trying an older: %s", folder, error)
            else:
                return folder
        if damages:
            raise CheckpointError(
                f"{self.root}: no checkpoint is intact ({'; '.join(damages)}). Restore one from a "
                f"backup, or remove them to start anew"
            )
        return None

    def load(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, JSON]:
        """Fill `tensors` in place from the checkpoint `path` and return its state. Collective.

        Files are verified first, unless `newest` has just done it.

        Args:
            path: The checkpoint's folder.
            tensors: All tensors of the checkpoint by the names of `save`, sharded in any way.

        Raises:
            CheckpointError: The checkpoint is missing or damaged, or does not have exactly these
                names, shapes and types. `tensors` are untouched.
        """
        if path != self._verified:
            self._verify(path)
        state = self.read_state(path)
        try:
            read_tensors(path, tensors, self._ranks)
        except RanksFailedError as error:
            raise _translated(error, f"cannot load {path}: {error}") from error
        return state

    def read_state(self, path: Path) -> dict[str, JSON]:
        """Return the state of the checkpoint `path` without its tensors. Collective.

        Raises:
            CheckpointError: The checkpoint or its manifest is missing or damaged.
        """
        try:
            manifest = self._ranks.on_first(lambda: Manifest.read(path))
        except RanksFailedError as error:
            raise _translated(error, f"cannot load {path}: {error}") from error
        return dict(manifest.state)

    def remove_leftovers(self) -> None:
        """Remove what a killed save left behind. Collective.

        Every save does so too. Only the process that owns the run may call it: what looks left
        behind may be the save in flight of another.
        """
        try:
            self._ranks.on_first(self._remove_leftovers)
        except RanksFailedError as error:
            raise _translated(error, f"cannot clean up {self.root}: {error}") from error

    def _folders(self) -> list[Path]:
        """Return the folders that claim to be checkpoints, the newest first."""
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if _FOLDER.fullmatch(path.name)]
        return sorted(folders, key=_step_of, reverse=True)

    def _verify(self, folder: Path) -> None:
        ranks = self._ranks

        def read_manifest() -> Manifest:
            manifest = Manifest.read(folder)
            manifest.verify_names(folder)
            return manifest

        try:
            manifest = ranks.on_first(read_manifest)
            names = sorted(manifest.files)[ranks.rank :: ranks.size]
            ranks.on_all(lambda: manifest.verify_content(folder, names))
        except RanksFailedError as error:
            texts = [failure.text for failure in error.failures]
            raise DamagedCheckpointError("; ".join(texts)) from error
        self._verified = folder

    def _open_staging(self, staging: Path) -> None:
        self._remove_leftovers()
        staging.mkdir(parents=True)

    def _publish(self, staging: Path, final: Path, manifest: Manifest) -> None:
        manifest.write(staging)
        sync_to_disk(staging)
        replaced = temporary_path(final)
        if final.exists():
            final.rename(replaced)
        staging.rename(final)
        sync_to_disk(self.root)
        write_atomically(self.root / LATEST_NAME, final.name + "\n")
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_surplus(final)

    def _remove_surplus(self, newest: Path) -> None:
        # Later steps than the one just saved were damaged or belong to an abandoned course of the
        # run: they must not push the good ones out.
        ours = [path for path in self._folders() if _step_of(path) <= _step_of(newest)]
        for folder in ours[self.keep :]:
            # Renamed first: a removal cut short must not leave half a folder under a good name.
            doomed = temporary_path(folder)
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", folder, error)

    def _remove_leftovers(self) -> None:
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            if not _LEFTOVER.fullmatch(path.name):
                continue
            logger.info("removing %s, left behind by an interrupted save", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _explain(self, error: RanksFailedError, final: Path, needed: int) -> str:
        message = f"cannot save {final}: {error}"
        if any(failure.errno in _NO_SPACE for failure in error.failures):
            free = shutil.disk_usage(self.root).free
            message += (
                f". The checkpoint needs {needed} bytes, {free} are free: make room, lower "
                f"checkpoint.keep, or use a run.dir on a larger disk. Older checkpoints are intact"
            )
        return message


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user means by `path`.

    Args:
        path: a checkpoint's folder, or a run directory or its `checkpoints`, whose newest intact
            one is meant.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    for root in (path / "checkpoints", path):
        if root.name == "checkpoints" and root.is_dir():
            newest = CheckpointStore(root, keep=1).newest()
            if newest is None:
                raise CheckpointError(f"{root} holds no checkpoint yet; train first")
            return newest
    if not (path / MANIFEST_NAME).is_file():
        problem = "has no manifest.json" if path.is_dir() else "no such directory"
        raise CheckpointError(
            f"{path}: {problem}; name a complete checkpoint "
            "(runs/NAME/checkpoints/step_00001234) or a run directory that holds one"
        )
    return path


def _step_of(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def _translated(error: RanksFailedError, message: str) -> Exception:
    """Return a user's error for what a user can mend, and keep a defect recognisable as one."""
    if all(failure.is_user_error or failure.errno is not None for failure in error.failures):
        return CheckpointError(message)
    return RuntimeError(message)
