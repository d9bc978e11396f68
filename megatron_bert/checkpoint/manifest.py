"""The manifest of a checkpoint: what makes a folder of tensors complete, and proves it intact.

It is written last and names every file with its size and checksum, so a folder without it, or
with any other bytes than it says, is no checkpoint. It also carries the training state that is not
a tensor, as JSON: nothing in a checkpoint can execute code when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import xxhash

from megatron_bert.errors import CheckpointError
from megatron_bert.files import write_durably

JSON: TypeAlias = "Mapping[str, JSON] | list[JSON] | str | int | float | bool | None"

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
TENSOR_SUFFIX = ".safetensors"
_READ_BYTES = 1 << 22
_REMEDY = "restore it from a backup, or use another checkpoint"


class DamagedCheckpointError(CheckpointError):
    """A folder's content is not what its manifest says, or it has none."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the XXH3-64 of its content (hexadecimal)."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        step: Optimizer steps taken when the checkpoint was saved.
        files: Every other file of the folder, by name.
        state: The training state that is not a tensor.
    """

    step: int
    files: Mapping[str, FileRecord]
    state: Mapping[str, JSON]

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, durably."""
        content = {
            "version": FORMAT_VERSION,
            "step": self.step,
            "state": dict(self.state),
            "files": {
                name: {"size": record.size, "checksum": record.checksum}
                for name, record in sorted(self.files.items())
            },
        }
        text = json.dumps(
            {**content, "checksum": _checksum_of(content)},
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        write_durably(folder / MANIFEST_NAME, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder` and check its own checksum, not yet the other files.

        Raises:
            DamagedCheckpointError: It is missing, unreadable, altered, or of an unknown version.
        """
        if not folder.is_dir():
            raise DamagedCheckpointError(f"{folder}: no such folder; {_REMEDY}")
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("checksum")
            version = content["version"]
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            manifest = cls(step=content["step"], files=files, state=content["state"])
        except FileNotFoundError as error:
            raise DamagedCheckpointError(
                f"{path}: missing, so the checkpoint was never completed; {_REMEDY}"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(
                f"{path}: not a manifest ({error!r}); {_REMEDY}"
            ) from error
        if checksum != _checksum_of(content):
            raise DamagedCheckpointError(
                f"{path}: altered, its own checksum does not fit; {_REMEDY}"
            )
        if version != FORMAT_VERSION:
            raise DamagedCheckpointError(
                f"{path}: format version {version}, but this program reads {FORMAT_VERSION}; "
                f"use the version of the program that wrote it"
            )
        return manifest

    def verify_names(self, folder: Path) -> None:
        """Check that `folder` holds the files listed and no other tensors.

        Raises:
            DamagedCheckpointError: A file is missing, or one of another save was added.
        """
        present = {path.name for path in folder.iterdir()}
        for name in sorted(set(self.files) - present):
            raise DamagedCheckpointError(f"{folder / name}: missing; {_REMEDY}")
        for name in sorted(present - set(self.files)):
            if name.endswith(TENSOR_SUFFIX):
                raise DamagedCheckpointError(f"{folder / name}: not of this checkpoint; {_REMEDY}")

    def verify_content(self, folder: Path, names: Iterable[str]) -> None:
        """Check size and checksum of the files `names` (some of `files`).

        Raises:
            DamagedCheckpointError: A file has another size or other content; it is named with
                what was expected and what was found.
        """
        for name in names:
            path, expected = folder / name, self.files[name]
            size = path.stat().st_size
            if size != expected.size:
                raise DamagedCheckpointError(
                    f"{path}: size is {size} bytes instead of {expected.size}; {_REMEDY}"
                )
            checksum = file_checksum(path)
            if checksum != expected.checksum:
                raise DamagedCheckpointError(
                    f"{path}: checksum is {checksum} instead of {expected.checksum}; {_REMEDY}"
                )


def verified_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder` and compare every file with it, in this process alone.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or cannot be read.
    """
    try:
        manifest = Manifest.read(folder)
        manifest.verify_names(folder)
        manifest.verify_content(folder, manifest.files)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {folder}: {error}; see that it may be read and that no run removes it "
            "meanwhile"
        ) from error
    return manifest


def file_checksum(path: Path) -> str:
    """Return the XXH3-64 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _checksum_of(content: Mapping[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_64_hexdigest(canonical.encode())
