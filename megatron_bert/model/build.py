"""From configuration to the sharded, initialised part of the model that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_bert.config.kernels import chosen_kernels, records_passes
from megatron_bert.config.pipeline_stages import num_stages, stage_layers
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_facts import facts_of
from megatron_bert.distributed.topology import Topology
from megatron_bert.errors import ConfigError
from megatron_bert.model.bert import TIED_PARAMETER, BertForPretraining, ModelPart
from megatron_bert.model.initialization import initialize_weights
from megatron_bert.model.kernels import use_kernels
from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.micro_batches import MicroBatchRunner, WholeModel
from megatron_bert.parallel.partial_gradients import sum_partial_gradients
from megatron_bert.parallel.pipeline import Pipeline
from megatron_bert.parallel.recorded_passes import CudaGraphs, RecordedModel
from megatron_bert.parallel.sharding import is_split_over, local_part
from megatron_bert.parallel.tied import sum_tied_gradient

# The most shapes of micro-batches for which blocks are compiled in one job.
_MOST_SHAPES = 64

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class RankModel:
    """What a rank holds of the model, and how it takes part in a step.

    Attributes:
        chunks: the whole model, or the stages of a pipeline rank.
        runner: takes micro-batches through them and through the other ranks' stages.
        topology: the ranks.
    """

    chunks: tuple[BertForPretraining, ...]
    runner: MicroBatchRunner
    topology: Topology

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by the names that they have in the whole model."""
        return {name: p for chunk in self.chunks for name, p in chunk.named_parameters()}

    def block_matrices(self) -> dict[str, nn.Parameter]:
        """The weights of this rank's blocks that are matrices, by the same names."""
        return {
            f"blocks.{name}": parameter
            for chunk in self.chunks
            for name, parameter in chunk.blocks.named_parameters()
            if parameter.dim() == 2
        }

    def counts_here(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether this rank is the one that counts its shard in a sum over all ranks."""
        topology = self.topology
        tensor_parallel = topology.tensor_parallel.rank == 0 or is_split_over("tp", parameter)
        is_copy = self._holds_tied_copy and name == TIED_PARAMETER
        return tensor_parallel and topology.replica == 0 and not is_copy

    def sum_shared_gradients(self) -> None:
        """Complete the gradients that backward left in parts on several ranks."""
        topology = self.topology
        sum_partial_gradients(self.chunks, topology.tensor_parallel)
        if topology.pipeline_size == 1:
            return
        for chunk in self.chunks:
            if chunk.embeddings is not None:
                gradient = chunk.embeddings.word.weight.grad
                assert gradient is not None
                sum_tied_gradient(local_part(gradient), topology)

    @property
    def _holds_tied_copy(self) -> bool:
        return self.topology.pipeline_rank > 0


def build_model(config: Config, vocab_size: int, topology: Topology) -> RankModel:
    """Build what this rank holds of the model.

    It is laid out on the meta device and sharded there, so that a rank only ever allocates its
    own part.

    Args:
        config: the whole configuration.
        vocab_size: padded vocabulary.
        topology: the ranks.
    """
    sharded = lay_out_chunks(config, vocab_size, topology)
    chunks = tuple(chunk.module for chunk in sharded)
    for chunk in chunks:
        chunk.to_empty(device=topology.device)
        initialize_weights(chunk, config.model, config.run.seed)
    runner: MicroBatchRunner
    if topology.pipeline_size == 1:
        runner = _one_rank_runner(sharded[0], config, topology)
    else:
        runner = Pipeline(
            sharded,
            config.parallel.pipeline_schedule,
            topology,
            config.model.hidden_size,
            DTYPES[config.precision.compute],
        )
    return RankModel(chunks, runner, topology)


def _one_rank_runner(
    model: ShardedModel[BertForPretraining], config: Config, topology: Topology
) -> MicroBatchRunner:
    if not records_passes(config, facts_of(topology.device)):
        return WholeModel(model)
    if topology.device.type != "cuda":
        raise ConfigError(
            "compile.cuda_graphs = true: they are CUDA's, and this machine shows PyTorch no CUDA "
            "device; use compile.cuda_graphs=false"
        )
    timeout = config.distributed.timeout_seconds
    return RecordedModel(model, CudaGraphs(topology.device, timeout))


def lay_out_chunks(
    config: Config, vocab_size: int, topology: Topology
) -> tuple[ShardedModel[BertForPretraining], ...]:
    """Make the sharded model, or this pipeline rank's stages of it, on the meta device."""
    layers, count = stage_layers(config, vocab_size), num_stages(config)
    return tuple(
        _lay_out(
            config, vocab_size, topology, ModelPart(layers[stage], stage == 0, stage == count - 1)
        )
        for stage in range(topology.pipeline_rank, count, topology.pipeline_size)
    )


def _lay_out(
    config: Config, vocab_size: int, topology: Topology, part: ModelPart
) -> ShardedModel[BertForPretraining]:
    dtype = DTYPES[config.precision.compute]
    with torch.device("meta"):
        chunk = BertForPretraining(
            config.model,
            vocab_size,
            topology.tensor_parallel,
            config.run.seed,
            part=part,
            recompute=config.recompute,
        )
    kernels = chosen_kernels(config, facts_of(topology.device))
    use_kernels(chunk, kernels, topology.device, dtype, fp8=config.precision.fp8 != "none")
    blocks = list(chunk.blocks.values())
    if config.compile.enabled:
        # Other packages' kernels cannot be traced: only what lies between them is compiled.
        _compile(blocks, fullgraph=kernels == "torch")
    return ShardedModel(
        chunk,
        blocks,
        topology,
        dtype,
        reduce_dtype=DTYPES[config.precision.reduce],
        reshard_after_forward=config.parallel.reshard_after_forward,
    )


def _compile(blocks: Sequence[nn.Module], *, fullgraph: bool) -> None:
    """Have each block compiled when it first runs, separately for each shape of micro-batches.

    Only `forward` is compiled, not the module's call: the hooks that gather weights stay outside
    the graphs. One graph serves all blocks, as their weights are its inputs.
    """
    torch._dynamo.config.recompile_limit = max(_MOST_SHAPES, torch._dynamo.config.recompile_limit)
    # The outputs of norms and activation are recomputed in backward, in kernels that read their
    # inputs anyway: a third less memory, and no product is computed twice.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=fullgraph, dynamic=False)
