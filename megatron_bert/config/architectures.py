"""The families of encoders that can be trained; their sizes are separate keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ArchitectureName = Literal["retrievabert", "modernbert"]


@dataclass(frozen=True)
class Architecture:
    """What distinguishes a family apart from its sizes.

    All are PreNorm with LayerNorm, a gated MLP, and a decoder tied to the word embeddings.

    Attributes:
        biases: projections and norms have biases (the decoder always has one).
        activation: of the gate.
        rotary: positions rotate queries and keys; otherwise a learned table is added to the
            embeddings.
        embedding_norm: the embeddings are normalised, in place of the first block's attention norm.
        alternates: local layers alternate with layers that see whole segments.
    """

    biases: bool
    activation: Literal["silu", "gelu"]
    rotary: bool
    embedding_norm: bool
    alternates: bool


ARCHITECTURES: Mapping[ArchitectureName, Architecture] = MappingProxyType(
    {
        "retrievabert": Architecture(
            biases=True, activation="silu", rotary=False, embedding_norm=False, alternates=False
        ),
        # Warner et al. 2024, "Smarter, Better, Faster, Longer", section 2.1.
        "modernbert": Architecture(
            biases=False, activation="gelu", rotary=True, embedding_norm=True, alternates=True
        ),
    }
)
