"""Files and folders that appear whole or not at all, and survive a loss of power once they do."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TEMPORARY_INFIX = ".tmp-"


def temporary_path(final: Path) -> Path:
    """Return an unused name beside `final`; a rename between the two never leaves the disk."""
    return final.with_name(f"{final.name}{TEMPORARY_INFIX}{secrets.token_hex(4)}")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) so that readers see the old file or the new one whole.

    Raises:
        OSError: The host could not write; the old file is as it was and no temporary is left.
    """
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)
