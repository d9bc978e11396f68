"""The weights of a Hugging Face directory: one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bert.checkpoint.huggingface_config import read_object
from megatron_bert.checkpoint.huggingface_names import (
    BUFFERS,
    TIED,
    Parameter,
    listed,
    their_tensors,
)
from megatron_bert.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is stored, and its shape and dtype in safetensors' terms."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class HuggingFaceWeights:
    """The tensors of a directory by their names there; files are opened, but not yet read.

    Args:
        directory: where `model.safetensors` or its shards lie.

    Attributes:
        files: the files that hold weights.

    Raises:
        CheckpointError: there are none, one is damaged or missing, or they are pickled.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        placed = _placed(directory)
        self.files = list(placed)
        self._stored: dict[str, _Stored] = {}
        for file, promised in placed.items():
            found = dict(_stored(file))
            missing = sorted(promised - found.keys())
            if missing:
                raise CheckpointError(
                    f"{directory / INDEX_NAME}: weight_map places {listed(missing)} in "
                    f"{file.name}, which does not hold them; copy the directory again"
                )
            self._stored |= found

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that weights are stored in, in safetensors' terms."""
        return sorted({stored.dtype for stored in self._stored.values()})

    @property
    def num_elements(self) -> int:
        """Elements of all parameters, tied ones counted once."""
        names = self._stored.keys() - BUFFERS - {n for n in TIED if TIED[n] in self._stored}
        return sum(torch.Size(self._stored[name].shape).numel() for name in names)

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._stored

    def problems(self, parameters: Iterable[Parameter]) -> Iterator[str]:
        """Yield what keeps these weights from being exactly `parameters`: every name, by kind."""
        expected = {tensor.name: tensor.shape for tensor in their_tensors(parameters)}
        tied = {name: first for name, first in TIED.items() if first in expected}
        second = {first: name for name, first in tied.items()}
        stored = self._stored
        missing = [
            name for name in expected if name not in stored and second.get(name) not in stored
        ]
        if missing:
            yield f"missing: {listed(missing)}"
        unknown = [name for name in stored if name not in expected.keys() | tied.keys() | BUFFERS]
        if unknown:
            yield f"unknown: {listed(unknown)}"
        shapes = expected | {name: expected[first] for name, first in tied.items()}
        for name, shape in shapes.items():
            if name in stored and stored[name].shape != shape:
                yield (f"{name} is {list(stored[name].shape)}, but by config.json {list(shape)}")
        odd = [name for name in shapes if name in stored and stored[name].dtype not in _TYPES]
        if odd:
            yield f"not of floating point: {listed(odd)}"

    def read(self, name: str) -> Tensor:
        """Read a tensor as fp32 on the CPU; if it is stored in fp32, it is the mapped file itself.

        Raises:
            CheckpointError: the file cannot be read, or the tensor is stored under a second name
                too and the two differ.
        """
        second = next((other for other, first in TIED.items() if first == name), None)
        names = [found for found in (name, second) if found in self._stored]
        first, *others = (self._read(found) for found in names if found is not None)
        if any(not torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{self._stored[name].file}: {second} differs from {name}; "
                "the training model has one parameter for both; name a model that was saved with "
                "tie_word_embeddings"
            )
        return first.float()

    def _read(self, name: str) -> Tensor:
        file = self._stored[name].file
        # Opened for each tensor, because the mapped part of a file counts as this process' memory.
        with _opened(file) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor


def _placed(directory: Path) -> Mapping[Path, frozenset[str]]:
    """The files of weights, and the names that an index promises in each."""
    index = directory / INDEX_NAME
    if (directory / WEIGHTS_NAME).is_file():
        return {directory / WEIGHTS_NAME: frozenset()}
    if index.is_file():
        return _indexed(index)
    pickled = sorted(path.name for form in _PICKLED for path in directory.glob(form))
    if pickled:
        raise CheckpointError(
            f"{directory}: holds {', '.join(pickled)} and no safetensors; pickled weights can run "
            "code when they are read, and are not. Where you trust them, save them anew: "
            "AutoModelForMaskedLM.from_pretrained(DIR).save_pretrained(NEW_DIR), where DIR brings "
            "its own modeling code with trust_remote_code=True"
        )
    raise CheckpointError(
        f"{directory}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}; name a directory that "
        "transformers has saved a model in"
    )


def _indexed(index: Path) -> dict[Path, frozenset[str]]:
    remedy = "copy the directory again"
    places = read_object(index, remedy).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{index}: weight_map is {places!r}, expected files by name; {remedy}"
        )
    names: dict[Path, set[str]] = {}
    for name, file in places.items():
        # Only files in the directory itself: an index must not lead elsewhere.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: weight_map.{name} is {file!r}, not a file's name; {remedy}"
            )
        names.setdefault(index.with_name(file), set()).add(name)
    missing = sorted(file.name for file in names if not file.is_file())
    if missing:
        raise CheckpointError(f"{index}: weight_map names {', '.join(missing)}, missing; {remedy}")
    return {file: frozenset(of_file) for file, of_file in sorted(names.items())}


def _stored(file: Path) -> Iterator[tuple[str, _Stored]]:
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            part = tensors.get_slice(name)
            yield name, _Stored(file, tuple(part.get_shape()), str(part.get_dtype()))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors ({error}); copy it again"
        ) from error
