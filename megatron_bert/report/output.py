"""Files that a user named."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.config.errors import UserError
from megatron_bert.config.places import check_place


def write(path: Path, content: str | bytes) -> None:
    """Write a page or a picture.

    Raises:
        UserError: the path climbs out of a folder that it names, or cannot be written.
    """
    check_place(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from error
