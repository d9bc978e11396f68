"""How many parameters the model has, and how many of them a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.pipeline_stages import stage_layers
from megatron_bert.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class PieceParameters:
    """Number of parameters of the model's parts on one rank of a tensor-parallel group.

    Attributes:
        word: of the word embedding table, which is also the decoder.
        position: of the position embedding table.
        block: of one block.
        matrices: of a block's matrices alone.
        end: of the final norm and the head, without the decoder's table.
    """

    word: int
    position: int
    block: int
    matrices: int
    end: int

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int, tensor: int = 1) -> PieceParameters:
        """Count the parameters.

        Args:
            model: the encoder's shape.
            vocab_size: padded vocabulary.
            tensor: ranks of the tensor-parallel group.
        """
        layers, whole = block_matrices(model, tensor), model.hidden_size
        matrices = sum(layer.size for layer in layers)
        bias = int(model.family.biases)
        # An embedding norm replaces the first block's attention norm, so the count is the same.
        norm = (1 + bias) * whole
        return cls(
            word=vocab_size // tensor * whole,
            position=0 if model.family.rotary else model.max_position_embeddings * whole,
            block=2 * norm + matrices + bias * sum(layer.outputs for layer in layers),
            matrices=matrices,
            end=norm + (whole + bias) * whole + norm + vocab_size // tensor,
        )


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, with the decoder tied to the word embeddings.

    Args:
        model: the encoder's shape.
        vocab_size: rows of the embedding table, including padding.
    """
    pieces = PieceParameters.of(model, vocab_size)
    return pieces.word + pieces.position + model.num_layers * pieces.block + pieces.end


@dataclass(frozen=True)
class RankParameters:
    """What a pipeline rank holds, as one rank of its tensor-parallel group.

    Data-parallel ranks shard it evenly, except for the last rows of small parameters.

    Attributes:
        root: parameters outside the blocks.
        layers: number of blocks in all its stages.
        block: parameters of a block.
        matrices: how many of all its parameters are in its blocks' matrices.
        has_head: whether it has the end of the model.
    """

    root: int
    layers: int
    block: int
    matrices: int
    has_head: bool

    @property
    def total(self) -> int:
        """Number of all its parameters."""
        return self.root + self.layers * self.block


def rank_parameters(config: Config, vocab_size: int) -> tuple[RankParameters, ...]:
    """Parameters of each pipeline rank under the configuration's layout.

    Args:
        config: the checked configuration.
        vocab_size: padded vocabulary.
    """
    blocks = [len(layers) for layers in stage_layers(config, vocab_size)]
    parallel = config.parallel
    return divided_parameters(config.model, vocab_size, parallel.tensor, parallel.pipeline, blocks)


def divided_parameters(
    model: ModelConfig, vocab_size: int, tensor: int, pipeline: int, stage_blocks: Sequence[int]
) -> tuple[RankParameters, ...]:
    """Parameters of each pipeline rank.

    Args:
        model: the encoder's shape.
        vocab_size: padded vocabulary.
        tensor: ranks of a tensor-parallel group.
        pipeline: ranks of the pipeline, which take the stages in turn.
        stage_blocks: blocks of each stage.
    """
    pieces = PieceParameters.of(model, vocab_size, tensor)
    ranks = []
    for rank in range(pipeline):
        layers, is_first, is_last = (
            sum(stage_blocks[rank::pipeline]),
            rank == 0,
            rank == pipeline - 1,
        )
        # The last rank of a pipeline has a copy of the table, for the head's decoder.
        root = pieces.word if is_first or is_last else 0
        root += pieces.position * is_first + pieces.end * is_last
        matrices = layers * pieces.matrices
        ranks.append(RankParameters(root, layers, pieces.block, matrices, is_last))
    return tuple(ranks)


def rank_state_bytes(config: Config, vocab_size: int) -> list[int]:
    """Bytes of each pipeline rank's weights, gradients and optimizer states, before sharding."""
    # AdamW has two moments, Muon one for the blocks' matrices.
    saved = 4 if config.optimizer.name == "muon" else 0
    ranks = rank_parameters(config, vocab_size)
    return [16 * rank.total - saved * rank.matrices for rank in ranks]
