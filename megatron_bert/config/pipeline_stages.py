"""How a pipeline divides the model's blocks: by work, embedding and head weighed in.

A checkpoint knows nothing of it: any division loads what any other saved.
"""

from __future__ import annotations

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.flops import block_flops, head_flops
from megatron_bert.config.schema import Config

# Looking up and adding embeddings multiplies nothing. With dropout and the table's gradient it took
# 0.02 to 0.04 of a block's CPU time at RetrievaBERT's width, in fp32 on one core, with
# micro-batches of 2,048 to 8,192 tokens (not measured on CUDA). More than 0, it decides between
# equals: the first stage is the last to get one more block.
EMBEDDING_BLOCKS = 0.03


def virtual_stages(config: Config) -> int:
    """Parts of the model that each pipeline rank holds: more than one where they interleave."""
    return config.parallel.virtual_stages if config.parallel.schedule.interleaves else 1


def num_stages(config: Config) -> int:
    """Parts that the model is cut into."""
    return config.parallel.pipeline * virtual_stages(config)


def stage_layers(config: Config, vocab_size: int) -> list[range]:
    """Numbers of the blocks that each stage holds, in the order of the stages.

    The busiest stage sets the pipeline's pace, so blocks go one by one to the stage that has the
    least work; the head's work is weighed in blocks as the whole curriculum asks for it.

    Args:
        config: the checked configuration: every stage gets a block.
        vocab_size: padded vocabulary.
    """
    work = [0.0] * num_stages(config)
    work[0] += EMBEDDING_BLOCKS
    work[-1] += head_in_blocks(config, vocab_size)
    counts = [1] * len(work)
    for _ in range(config.model.num_layers - len(work)):
        # Of equals the middle one: the first stage holds the most activations, the last the head's.
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
