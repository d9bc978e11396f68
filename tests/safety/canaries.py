"""Content that makes a folder when it is read as what it pretends to be."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class _Payload:
    def __init__(self, trace: Path) -> None:
        self._trace = str(trace)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (self._trace,)


def pickled(trace: Path) -> bytes:
    """A pickle, as `.pt` and `.bin` files of old and DCP's `.metadata` are."""
    return pickle.dumps({"model": _Payload(trace)})


def saved_by_torch(trace: Path) -> bytes:
    """What `torch.save` writes: a ZIP file with a pickle in it."""
    content = io.BytesIO()
    torch.save({"model": _Payload(trace)}, content)
    return content.getvalue()


def saved_by_numpy(trace: Path) -> bytes:
    """A `.npy` of objects, which are pickled."""
    content = io.BytesIO()
    objects = np.empty(1, dtype=object)
    objects[0] = _Payload(trace)
    np.save(content, objects, allow_pickle=True)
    return content.getvalue()


def yaml_tag(trace: Path) -> str:
    """A value whose tag has PyYAML's unsafe loaders call a function."""
    return f"!!python/object/apply:os.mkdir ['{trace}']"


def nested(_trace: Path) -> bytes:
    """No canary: JSON that is nested more deeply than a parser's stack."""
    return b"[" * 1_000_000


BINARY = [pickled, saved_by_torch, saved_by_numpy]
