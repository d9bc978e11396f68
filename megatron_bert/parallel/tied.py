"""A parameter that a pipeline's first and last stages both hold, and whose copies must stay equal.

Each stage contributes the gradient of its own use. Both apply the sum to equal weights and moments,
so that the copies stay equal to the bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.distributed.topology import Topology


@torch.no_grad()
def sum_tied_gradient(gradient: Tensor, topology: Topology) -> None:
    """Add the other stage's gradient of a tied parameter to this one's, in place.

    Called on the first and the last rank of a pipeline. The two exchange what they have, which
    moves as many bytes as an all-reduce of two and needs no group of their own.

    Args:
        gradient: this rank's shard.
        topology: the ranks; at least two along the pipeline.
    """
    last = topology.pipeline_size - 1
    other = last - topology.pipeline_rank
    received = torch.empty_like(gradient)
    group = topology.pipeline_group
    messages = [
        dist.P2POp(dist.isend, gradient, group=group, group_peer=other),
        dist.P2POp(dist.irecv, received, group=group, group_peer=other),
    ]
    for message in dist.batch_isend_irecv(messages):
        message.wait()
    gradient.add_(received)
