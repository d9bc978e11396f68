"""How a pipeline divides the model's blocks: by work, including the embedding's and the head's.

Checkpoints do not depend on it: any division loads what any other saved.
"""

from __future__ import annotations

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.flops import block_flops, head_flops
from megatron_bert.config.schema import Config

# Looking up and adding embeddings multiplies nothing. With dropout and the table's gradient it took
# 0.02 to 0.04 of a block's CPU time at RetrievaBERT's width, in fp32 on one core, with
# micro-batches of 2,048 to 8,192 tokens (not measured on CUDA). Being above 0, it breaks ties: the
# first stage is the last to get one more block.
EMBEDDING_BLOCKS = 0.03


def virtual_stages(config: Config) -> int:
    """Parts of the model on each pipeline rank: more than one if the schedule interleaves."""
    return config.parallel.virtual_stages if config.parallel.schedule.interleaves else 1


def num_stages(config: Config) -> int:
    """Parts that the model is divided into."""
    return config.parallel.pipeline * virtual_stages(config)


def stage_layers(config: Config, vocab_size: int) -> list[range]:
    """Numbers of the blocks that each stage holds, in the order of the stages.

    The busiest stage sets the pipeline's pace, so blocks go one by one to the stage with the least
    work; the head's work is expressed in blocks, averaged over the whole curriculum.

    Args:
        config: the checked configuration: every stage gets a block.
        vocab_size: padded vocabulary.
    """
    work = [0.0] * num_stages(config)
    work[0] += EMBEDDING_BLOCKS
    work[-1] += head_in_blocks(config, vocab_size)
    counts = [1] * len(work)
    for _ in range(config.model.num_layers - len(work)):
        # Ties go to the middle: the first stage holds the most activations, the last the head's.
        lightest = min(
            range(len(work)),
            key=lambda stage: (work[stage] + counts[stage], abs(stage - len(work) / 2)),
        )
        counts[lightest] += 1
    layers, first = [], 0
    for count in counts:
        layers.append(range(first, first + count))
        first += count
    return layers


def head_in_blocks(config: Config, vocab_size: int) -> float:
    """The head's work over the whole curriculum, in blocks."""
    head = block = 0.0
    for span in Curriculum(config).spans:
        head += span.num_rows * head_flops(config.model, vocab_size, span.masked_slots)
        block += span.num_rows * block_flops(config.model, span.seq_length)
    return head / block
