"""Builds this rank's optimizer from the configuration and the model."""

from __future__ import annotations

from megatron_bert.config.kernels import chosen_kernels
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_facts import facts_of
from megatron_bert.model.build import DTYPES, RankModel
from megatron_bert.optim.adamw import AdamW
from megatron_bert.optim.muon import Muon
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.parallel.whole_matrices import MatrixOwners


def build_optimizer(config: Config, model: RankModel) -> ShardedOptimizer:
    """Make the optimizer of the parameters that this rank holds, with zero state.

    Args:
        config: the whole configuration.
        model: the model of the same configuration.
    """
    parameters = model.named_parameters()
    muon = None
    if config.optimizer.name == "muon":
        matrices = model.block_matrices()
        dtype = DTYPES[config.precision.compute]
        muon = Muon(matrices, config.optimizer, MatrixOwners(matrices, model.topology, dtype))
        others = {name: p for name, p in parameters.items() if name not in matrices}
    else:
        others = parameters
    device = model.topology.device
    adamw = AdamW(others, config.optimizer, device, chosen_kernels(config, facts_of(device)))
    clip_grad = config.optimizer.clip_grad
    return ShardedOptimizer(parameters, adamw, muon, model.counts_here, clip_grad)
