"""From configuration to a sharded, initialised model on this rank's device."""

from __future__ import annotations

import torch

from megatron_bert.config.schema import Config
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.model.initialization import initialize_weights
from megatron_bert.parallel.data_parallel import shard_over_data

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: Config, vocab_size: int, topology: Topology) -> BertForPretraining:
    """Build the model as this rank holds it.

    It is laid out on the meta device and sharded there, so that a rank only ever allocates its
    own part. Blocks are compiled before they are sharded: the hooks that gather and free weights
    then stay outside the graphs.

    Args:
        config: the whole configuration.
        vocab_size: padded vocabulary.
        topology: the ranks.
    """
    with torch.device("meta"):
        model = BertForPretraining(
            config.model, vocab_size, topology.tensor_parallel, config.run.seed
        )
    if config.compile.enabled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    shard_over_data(model, model.blocks, topology, _COMPUTE_DTYPES[config.precision.compute])
    model.to_empty(device=topology.device)
    initialize_weights(model, config.model, config.run.seed)
    return model
