"""A block's matrices, one after another: what counts, times and plans them reads them here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from megatron_bert.config.schema import ModelConfig


@dataclass(frozen=True)
class BlockMatrix:
    """A linear layer's weight, [outputs, inputs], or the part of it that a rank holds.

    Attributes:
        name: of the layer in its sub-layer.
        outputs: features out.
        inputs: features in.
        reads: what the layer reads: a norm's output, or what attention or the gate gives.
    """

    name: str
    outputs: int
    inputs: int
    reads: Literal["attention_norm", "attention", "feed_forward_norm", "gate"]

    @property
    def size(self) -> int:
        """Elements."""
        return self.outputs * self.inputs

    @property
    def is_column_parallel(self) -> bool:
        """Whether tensor-parallel ranks divide its outputs; else they divide its inputs."""
        return self.reads in ("attention_norm", "feed_forward_norm")


def block_matrices(model: ModelConfig, tensor: int = 1) -> tuple[BlockMatrix, ...]:
    """The matrices of a block; layers that read the same input follow one another.

    Args:
        model: the encoder's shape.
        tensor: ranks of the tensor-parallel group of which one rank's parts are asked for.
    """
    whole, hidden = model.hidden_size, model.hidden_size // tensor
    ffn, kv_size = model.ffn_hidden_size // tensor, model.kv_size // model.kv_ranks(tensor)
    return (
        BlockMatrix("query", hidden, whole, "attention_norm"),
        BlockMatrix("key", kv_size, whole, "attention_norm"),
        BlockMatrix("value", kv_size, whole, "attention_norm"),
        BlockMatrix("output", whole, hidden, "attention"),
        BlockMatrix("gate", ffn, whole, "feed_forward_norm"),
        BlockMatrix("up", ffn, whole, "feed_forward_norm"),
        BlockMatrix("down", whole, ffn, "gate"),
    )


def joined_matrices(matrices: Iterable[BlockMatrix]) -> tuple[BlockMatrix, ...]:
    """Matrices of layers that read the same input laid end to end, as fused kernels take them."""
    groups = (list(group) for _, group in groupby(matrices, lambda matrix: matrix.reads))
    return tuple(
        BlockMatrix(
            ", ".join(matrix.name for matrix in group),
            sum(matrix.outputs for matrix in group),
            group[0].inputs,
            group[0].reads,
        )
        for group in groups
    )
