"""What each pipeline rank holds of the model, in parameters and blocks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.config.parameters import PieceParameters
from megatron_bert.config.pipeline_stages import stage_layers
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Split


@dataclass(frozen=True)
class RankParts:
    """What a pipeline rank holds, as one rank of its tensor-parallel group.

    Attributes:
        parameters: all of them.
        root: those outside the blocks.
        layers: blocks, over its stages.
        has_head: whether it ends the model.
        matrices: of the parameters those of its blocks' matrices.
    """

    parameters: int
    root: int
    layers: int
    has_head: bool
    matrices: int

    @property
    def block(self) -> float:
        """Parameters of a block."""
        return (self.parameters - self.root) / max(1, self.layers)


def rank_parts(job: Job, split: Split) -> tuple[RankParts, ...]:
    """What each pipeline rank holds."""
    key = ("parts", split.tensor, split.pipeline, split.virtual)
    parts: tuple[RankParts, ...] = job.once(key, lambda: _make_parts(job, split))
    return parts


def layers_of_stages(job: Job, num_stages: int) -> tuple[int, ...]:
    """Blocks of each stage; only their number counts, not how ranks hold them."""
    layers: tuple[int, ...] = job.once(
        ("layers", num_stages), lambda: _make_layers(job, num_stages)
    )
    return layers


def _make_layers(job: Job, num_stages: int) -> tuple[int, ...]:
    keys = {"parallel.pipeline": num_stages, "parallel.pipeline_schedule": "1f1b"}
    config = job.config.with_keys(keys)
    return tuple(len(layers) for layers in stage_layers(config, job.vocab_size))


def _make_parts(job: Job, split: Split) -> tuple[RankParts, ...]:
    blocks = layers_of_stages(job, split.num_stages)
    pieces = PieceParameters.of(job.config.model, job.vocab_size, split.tensor)
    parts = []
    for rank in range(split.pipeline):
        layers = sum(blocks[rank :: split.pipeline])
        first, last = rank == 0, rank == split.pipeline - 1
        root = (pieces.word + pieces.position) * first + pieces.end * last
        # The last rank of a pipeline has a copy of the table, which its head decodes with.
        root += pieces.word if last and not first else 0
        parts.append(_part(pieces, root, layers, last))
    return tuple(parts)


def _part(pieces: PieceParameters, root: int, layers: int, has_head: bool) -> RankParts:
    parameters = root + layers * pieces.block
    return RankParts(parameters, root, layers, has_head, layers * pieces.matrices)
