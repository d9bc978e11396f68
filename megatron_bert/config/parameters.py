"""How many parameters the model has, and how many of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.pipeline_stages import stage_layers
from megatron_bert.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class PieceParameters:
    """Parameters of the model's pieces, as one rank of a tensor-parallel group holds them.

    Attributes:
        word: of the word embeddings' table, which is the decoder too.
        position: of the position embeddings' table.
        block: of one block.
        matrices: of a block's matrices alone.
        end: of the final norm and the head, the decoder's table not counted.
    """

    word: int
    position: int
    block: int
    matrices: int
    end: int

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int, tensor: int = 1) -> PieceParameters:
        """Count them.

        Args:
            model: the encoder's shape.
            vocab_size: padded vocabulary.
            tensor: ranks of the tensor-parallel group.
        """
        layers, whole = block_matrices(model, tensor), model.hidden_size
        matrices = sum(layer.size for layer in layers)
        bias = int(model.family.biases)
        # An embedding norm takes the place of the first block's attention norm.
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
        vocab_size: rows of the embedding table, padding included.
    """
    pieces = PieceParameters.of(model, vocab_size)
    return pieces.word + pieces.position + model.num_layers * pieces.block + pieces.end


def rank_parameters(config: Config, vocab_size: int) -> list[int]:
    """Parameters that a rank holds together with those it shares rows of them with.

    The data-parallel ranks of one copy (`parallel.replicate`) share them out evenly, but for the
    last rows of small ones.

    Args:
        config: the checked configuration.
        vocab_size: padded vocabulary.

    Returns:
        For each pipeline rank the parameters of one of its tensor-parallel ranks; the last rank
        of a pipeline has a copy of the word embeddings' table.
    """
    pieces = PieceParameters.of(config.model, vocab_size, config.parallel.tensor)
    counts = [blocks * pieces.block for blocks in _rank_blocks(config, vocab_size)]
    counts[0] += pieces.word + pieces.position
    counts[-1] += pieces.end + (pieces.word if len(counts) > 1 else 0)
    return counts


def rank_state_bytes(config: Config, vocab_size: int) -> list[int]:
    """Bytes of weights, gradients and the optimizer's states, counted as `rank_parameters` does."""
    pieces = PieceParameters.of(config.model, vocab_size, config.parallel.tensor)
    # AdamW has two moments, Muon one for the blocks' matrices.
    saved = 4 * pieces.matrices if config.optimizer.name == "muon" else 0
    counts, blocks = rank_parameters(config, vocab_size), _rank_blocks(config, vocab_size)
    return [16 * count - saved * held for count, held in zip(counts, blocks, strict=True)]


def _rank_blocks(config: Config, vocab_size: int) -> list[int]:
    """Blocks of each pipeline rank."""
    pipeline = config.parallel.pipeline
    blocks = [len(layers) for layers in stage_layers(config, vocab_size)]
    return [sum(blocks[rank::pipeline]) for rank in range(pipeline)]
