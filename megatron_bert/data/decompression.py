"""Byte streams from `.gz` and `.zst` files."""

from __future__ import annotations

import gzip
import io
from typing import BinaryIO, cast

import zstandard

_READ_BYTES = 1 << 20


def decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    """A stream of a file's content: decompressed for `.gz` and `.zst`, else the file itself.

    Reading raises EOFError, zlib.error, gzip.BadGzipFile or zstandard.ZstdError where the
    compressed stream is damaged or cut short. This call raises EOFError for a compressed file of
    no bytes: even compressed empty content has some.
    """
    if suffix in (".gz", ".zst"):
        if not file.read(1):
            raise EOFError("it has no byte")
        file.seek(0)
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstandardReader(file), _READ_BYTES))
    return file


class _ZstandardReader(io.RawIOBase):
    """All frames of a zstd stream; zstandard's own reader takes a truncated stream as complete."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # Files compressed with `zstd --long=31` need the format's largest window.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._pending = memoryview(b"")
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            chunk = b""
            if self._frame.eof:
                chunk = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._inside_frame = False
            chunk = chunk or self._file.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE)
            if not chunk:
                if self._inside_frame:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._inside_frame = True
            self._pending = memoryview(self._frame.decompress(chunk))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
