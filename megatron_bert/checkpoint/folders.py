"""The folders of a checkpoint store on the disk, as the one process that manages them sees them."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.checkpoint.manifest import DamagedCheckpointError, Manifest
from megatron_bert.files import TEMPORARY_INFIX, sync_to_disk, temporary_path, write_atomically

LATEST_NAME = "latest"
_FOLDER = re.compile(r"step_(\d{8,})")
# In the name of a folder that is to be removed, and never to be taken for a checkpoint again.
_DOOMED_INFIX = ".old-"
_LEFTOVER = re.compile(
    rf"(step_\d{{8,}}|{LATEST_NAME})({re.escape(TEMPORARY_INFIX)}|{re.escape(_DOOMED_INFIX)})[0-9a-f]+"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFolders:
    """Checkpoints `step_00001234` under `root`, of which the newest `keep` are kept."""

    root: Path
    keep: int

    def of_step(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.root / f"step_{step:08d}"

    def step_of(self, folder: Path) -> int:
        """Return the step of a checkpoint's folder that `newest_first` returned."""
        match = _FOLDER.fullmatch(folder.name)
        assert match is not None, folder
        return int(match[1])

    def newest_first(self) -> list[Path]:
        """Return the folders that claim to be checkpoints."""
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if _FOLDER.fullmatch(path.name)]
        return sorted(folders, key=self.step_of, reverse=True)

    def open_staging(self, staging: Path) -> None:
        """Make the folder that a save writes into, and remove what an earlier one left."""
        self.remove_leftovers()
        staging.mkdir(parents=True)

    def publish(self, staging: Path, final: Path, manifest: Manifest) -> None:
        """Complete the folder `staging`, give it its name, and then remove surplus checkpoints."""
        manifest.write(staging)
        sync_to_disk(staging)
        replaced = temporary_path(final)
        if final.exists():
            final.rename(replaced)
        staging.rename(final)
        sync_to_disk(self.root)
        # The checkpoint is complete: nothing that fails from here on may be told as a failed save.
        try:
            write_atomically(self.root / LATEST_NAME, final.name + "\n")
        except OSError as error:
            logger.warning("%s is saved, but %s still names another: %s", final, LATEST_NAME, error)
        if replaced.exists():
            _discard(replaced, final.name)
        self._remove_surplus(final)

    def remove_leftovers(self) -> None:
        """Remove what killed saves left under temporary names.

        A complete checkpoint whose own name is free gets that back: a save that replaced it was
        killed between two renames. What cannot be removed is warned of, and is in nobody's way.
        """
        if not self.root.is_dir():
            return
        found = [(path, _LEFTOVER.fullmatch(path.name)) for path in self.root.iterdir()]
        leftovers = [(path, match) for path, match in found if match is not None]
        # Of the two complete ones that such a save leaves the newer one is taken.
        for path, match in sorted(leftovers, key=lambda leftover: _changed_at(leftover[0])):
            final = self.root / match[1]
            may_return = match[1] != LATEST_NAME and match[2] == TEMPORARY_INFIX
            try:
                if may_return and not final.exists() and _is_complete(path, self.step_of(final)):
                    path.rename(final)
                    logger.warning("%s was complete under the name %s: renamed", final, path)
                    continue
                logger.info("removing %s, left behind by an interrupted save", path)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                logger.warning("cannot remove %s, which is of no use: %s", path, error)

    def _remove_surplus(self, newest: Path) -> None:
        # Checkpoints of later steps than the one just saved were damaged or belong to an abandoned
        # course of the run: they must not push out good ones.
        ours = [path for path in self.newest_first() if self.step_of(path) <= self.step_of(newest)]
        for folder in ours[self.keep :]:
            _discard(folder, folder.name)


def _discard(folder: Path, name: str) -> None:
    """Remove a folder that was the checkpoint of this name; warn if that cannot be done."""
    # Renamed first: a removal cut short must not leave half a folder under a good name.
    doomed = folder.with_name(f"{name}{_DOOMED_INFIX}{secrets.token_hex(4)}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("cannot remove the old checkpoint %s: %s", folder, error)


def _changed_at(path: Path) -> float:
    """A key by which the newest comes first, and what has vanished last."""
    try:
        return -path.lstat().st_mtime
    except OSError:
        return 0.0


def _is_complete(folder: Path, step: int) -> bool:
    """Whether the manifest of that step and the files that it names are there."""
    try:
        manifest = Manifest.read(folder)
        manifest.verify_names(folder)
    except DamagedCheckpointError:
        return False
    return manifest.step == step
