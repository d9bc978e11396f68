"""The list of a block's matrices, for all code that counts, times or plans them."""

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
        reads: the layer's input: a norm's output, or that of attention or of the gate.
    """

    name: str
    outputs: int
    inputs: int
    reads: Literal["attention_norm", "attention", "feed_forward_norm", "gate"]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.outputs * self.inputs

    @property
    def is_column_parallel(self) -> bool:
        """Whether tensor-parallel ranks shard its outputs; otherwise they shard its inputs."""
        return self.reads in ("attention_norm", "feed_forward_norm")


def block_matrices(model: ModelConfig, tensor: int = 1) -> tuple[BlockMatrix, ...]:
    """The matrices of a block; layers that read the same input are adjacent.

    Args:
        model: the encoder's shape.
        tensor: size of the tensor-parallel group; the result is one rank's shards.
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
    """Join the matrices of layers that read the same input, as fused kernels take them."""
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
