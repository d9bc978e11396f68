"""The one table of parameters: this project's names, Hugging Face's, and shapes.

RetrievaBERT's are there as far as they are published (MegatronBert's names with Llama's MLP).
Matrices are laid out alike on both sides, `[out, in]`; several of ours that have one name on the
right are stacked there, in the order of the rows. To correct a name, correct it here: both
directions of the conversion, and `inspect`, go by these rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

from megatron_bert.config.architectures import ArchitectureName
from megatron_bert.config.schema import ModelConfig

# `*` stands for a layer's number. Letters of a shape: V vocabulary, P positions, D hidden,
# K key/value heads x head size, F feed-forward.
_RETRIEVABERT = (
    ("embeddings.word.weight", "bert.embeddings.word_embeddings.weight", "VD"),
    ("embeddings.position.weight", "bert.embeddings.position_embeddings.weight", "PD"),
    ("blocks.*.attention_norm.weight", "bert.encoder.layer.*.attention.ln.weight", "D"),
    ("blocks.*.attention_norm.bias", "bert.encoder.layer.*.attention.ln.bias", "D"),
    ("blocks.*.attention.query.weight", "bert.encoder.layer.*.attention.self.query.weight", "DD"),
    ("blocks.*.attention.query.bias", "bert.encoder.layer.*.attention.self.query.bias", "D"),
    ("blocks.*.attention.key.weight", "bert.encoder.layer.*.attention.self.key.weight", "KD"),
    ("blocks.*.attention.key.bias", "bert.encoder.layer.*.attention.self.key.bias", "K"),
    ("blocks.*.attention.value.weight", "bert.encoder.layer.*.attention.self.value.weight", "KD"),
    ("blocks.*.attention.value.bias", "bert.encoder.layer.*.attention.self.value.bias", "K"),
    (
        "blocks.*.attention.output.weight",
        "bert.encoder.layer.*.attention.output.dense.weight",
        "DD",
    ),
    ("blocks.*.attention.output.bias", "bert.encoder.layer.*.attention.output.dense.bias", "D"),
    ("blocks.*.feed_forward_norm.weight", "bert.encoder.layer.*.ln.weight", "D"),
    ("blocks.*.feed_forward_norm.bias", "bert.encoder.layer.*.ln.bias", "D"),
    ("blocks.*.feed_forward.gate.weight", "bert.encoder.layer.*.mlp.gate_proj.weight", "FD"),
    ("blocks.*.feed_forward.gate.bias", "bert.encoder.layer.*.mlp.gate_proj.bias", "F"),
    ("blocks.*.feed_forward.up.weight", "bert.encoder.layer.*.mlp.up_proj.weight", "FD"),
    ("blocks.*.feed_forward.up.bias", "bert.encoder.layer.*.mlp.up_proj.bias", "F"),
    ("blocks.*.feed_forward.down.weight", "bert.encoder.layer.*.mlp.down_proj.weight", "DF"),
    ("blocks.*.feed_forward.down.bias", "bert.encoder.layer.*.mlp.down_proj.bias", "D"),
    ("final_norm.weight", "bert.encoder.ln.weight", "D"),
    ("final_norm.bias", "bert.encoder.ln.bias", "D"),
    ("head.dense.weight", "cls.predictions.transform.dense.weight", "DD"),
    ("head.dense.bias", "cls.predictions.transform.dense.bias", "D"),
    ("head.norm.weight", "cls.predictions.transform.LayerNorm.weight", "D"),
    ("head.norm.bias", "cls.predictions.transform.LayerNorm.bias", "D"),
    ("head.bias", "cls.predictions.bias", "V"),
)

_MODERNBERT = (
    ("embeddings.word.weight", "model.embeddings.tok_embeddings.weight", "VD"),
    ("embeddings.norm.weight", "model.embeddings.norm.weight", "D"),
    ("blocks.*.attention_norm.weight", "model.layers.*.attn_norm.weight", "D"),
    ("blocks.*.attention.query.weight", "model.layers.*.attn.Wqkv.weight", "DD"),
    ("blocks.*.attention.key.weight", "model.layers.*.attn.Wqkv.weight", "KD"),
    ("blocks.*.attention.value.weight", "model.layers.*.attn.Wqkv.weight", "KD"),
    ("blocks.*.attention.output.weight", "model.layers.*.attn.Wo.weight", "DD"),
    ("blocks.*.feed_forward_norm.weight", "model.layers.*.mlp_norm.weight", "D"),
    ("blocks.*.feed_forward.gate.weight", "model.layers.*.mlp.Wi.weight", "FD"),
    ("blocks.*.feed_forward.up.weight", "model.layers.*.mlp.Wi.weight", "FD"),
    ("blocks.*.feed_forward.down.weight", "model.layers.*.mlp.Wo.weight", "DF"),
    ("final_norm.weight", "model.final_norm.weight", "D"),
    ("head.dense.weight", "head.dense.weight", "DD"),
    ("head.norm.weight", "head.norm.weight", "D"),
    ("head.bias", "decoder.bias", "V"),
)

_TABLES: Mapping[ArchitectureName, tuple[tuple[str, str, str], ...]] = MappingProxyType(
    {"retrievabert": _RETRIEVABERT, "modernbert": _MODERNBERT}
)

TIED: Mapping[str, str] = MappingProxyType(
    {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "decoder.weight": "model.embeddings.tok_embeddings.weight",
    }
)
"""Second Hugging Face names of a tensor, which a file may hold too, or in place of the first."""

BUFFERS = frozenset({"bert.embeddings.position_ids"})
"""Hugging Face names that older versions of transformers save, and that hold no parameter."""

_ATTENTION_NORM = "blocks.*.attention_norm.weight"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model.

    Attributes:
        name: its name in `BertForPretraining`.
        theirs: name of the tensor that it is, or is a part of, in a Hugging Face directory.
        shape: its shape here; there, others may be stacked below it.
        has_vocabulary: whether the first dimension counts rows of the vocabulary.
    """

    name: str
    theirs: str
    shape: tuple[int, ...]
    has_vocabulary: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TheirTensor:
    """A tensor of a Hugging Face directory.

    Attributes:
        name: its name there.
        parts: the parameters that are stacked in it along the first dimension; usually one.
    """

    name: str
    parts: tuple[Parameter, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


def their_tensors(parameters: Iterable[Parameter]) -> list[TheirTensor]:
    """The Hugging Face tensors for `parameters` (as `model_parameters` returns them), in order."""
    return [
        TheirTensor(name, tuple(parts))
        for name, parts in groupby(parameters, key=lambda parameter: parameter.theirs)
    ]


def model_parameters(model: ModelConfig, vocab_size: int) -> list[Parameter]:
    """Return every parameter of a model, in the order in which its layers compute.

    Args:
        model: the encoder's shape.
        vocab_size: rows of the embedding table, padding included.
    """
    sizes = {
        "V": vocab_size,
        "P": model.max_position_embeddings,
        "D": model.hidden_size,
        "K": model.kv_size,
        "F": model.ffn_hidden_size,
    }
    parameters = []
    for in_layers, rows in groupby(_TABLES[model.architecture], key=lambda row: "*" in row[0]):
        rows_of_part = list(rows)
        for number in range(model.num_layers if in_layers else 1):
            for ours, theirs, letters in rows_of_part:
                if model.family.embedding_norm and ours == _ATTENTION_NORM and number == 0:
                    # The norm of the embeddings takes its place.
                    continue
                parameters.append(
                    Parameter(
                        ours.replace("*", str(number)),
                        theirs.replace("*", str(number)),
                        tuple(sizes[letter] for letter in letters),
                        "V" in letters,
                    )
                )
    return parameters


def listed(names: Iterable[str]) -> str:
    """Name all of `names` in few words: those that differ in the layer's number alone are joined.

    `a.0.b, a.1.b, a.2.b, c` becomes `a.{0-2}.b, c`.
    """
    numbers: dict[str, list[int]] = {}
    for name in names:
        number = _NUMBER.search(name)
        form = name if number is None else _NUMBER.sub("{}", name, count=1)
        numbers.setdefault(form, []).extend([] if number is None else [int(number[0])])
    return ", ".join(
        form.replace("{}", _ranges(sorted(found)), 1) for form, found in numbers.items()
    )


def _ranges(numbers: list[int]) -> str:
    """`[3]` as `3`, `[0, 1, 2, 5]` as `{0-2,5}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"
