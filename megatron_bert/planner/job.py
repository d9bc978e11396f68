"""The run to be planned, on its machine, and the work of a rank on one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.config.kernels import (
    ComputeDevice,
    chosen_kernels,
    records_passes,
)
from megatron_bert.config.schema import BatchConfig, Config
from megatron_bert.planner.layouts import Layout, Split
from megatron_bert.planner.machines import Machine


@dataclass(frozen=True, eq=False)
class Job:
    """A run and the ranks that it gets; compared by identity, so that lookups of results are fast.

    Attributes:
        config: of the run; its layout is ignored.
        vocab_size: padded vocabulary.
        machine: the cluster.
        ranks: of the job, one per GPU.
    """

    config: Config
    vocab_size: int
    machine: Machine
    ranks: int

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first called for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def spans(self) -> list[StageSpan]:
        """The curriculum's stages."""
        return Curriculum(self.config).spans

    @cached_property
    def element_bytes(self) -> int:
        """Bytes of an element in the compute dtype."""
        return 2 if self.config.precision.compute == "bf16" else 4

    @cached_property
    def reduce_bytes(self) -> int:
        """Bytes of an element of a gradient that is reduced."""
        return 2 if self.config.precision.reduce == "bf16" else 4

    @cached_property
    def has_kernel(self) -> bool:
        """Whether attention is computed by a kernel that does not store the scores."""
        compute, head_dim = self.config.precision.compute, self.config.model.head_dim
        return self._device.runs_our_attention(compute, head_dim)

    def is_fused(self, tensor: int) -> bool:
        """Whether few kernels, compiled ones or our own, run between a block's products.

        Neither kind keeps the outputs of norms and activations, or dropout's mask.

        Args:
            tensor: tensor-parallel ranks.
        """
        return self.config.compile.enabled or self.has_fused_kernels(tensor)

    def has_fused_kernels(self, tensor: int) -> bool:
        """Whether our own fused kernels run between a block's products."""
        is_fused: bool = self.once(
            ("fused", tensor),
            lambda: (
                chosen_kernels(self.config.with_keys({"parallel.tensor": tensor}), self._device)
                == "fused"
            ),
        )
        return is_fused

    @cached_property
    def _device(self) -> ComputeDevice:
        return ComputeDevice(self.machine.gpu.kind)

    def records(self, layout: Layout) -> bool:
        """Whether passes are recorded under a layout."""
        # Everything in a layout that `records_passes` looks at.
        keys = {
            "parallel.tensor": layout.split.tensor,
            "parallel.pipeline": layout.split.pipeline,
            "parallel.reshard_after_forward": layout.reshard_after_forward,
        }
        is_recorded: bool = self.once(
            ("records", *keys.values()),
            lambda: records_passes(self.config.with_keys(keys), self._device),
        )
        return is_recorded

    def batch(self, layout: Layout, span: StageSpan) -> BatchLayout:
        """How a stage's rows are divided, as `BatchLayout.of` does with the layout's keys."""
        split = layout.split
        return BatchLayout.divide(
            span.global_size,
            split.data,
            BatchConfig.rows_in(layout.micro_tokens, span.seq_length),
            pipeline=split.pipeline,
            interleaved=split.virtual > 1,
        )


@dataclass(frozen=True)
class Work:
    """One micro-batch as one rank of a tensor-parallel group computes it.

    Attributes:
        job: the run.
        split: how ranks share the model.
        recompute: what the backward pass recomputes.
        rows: of the micro-batch.
        span: the stage of the curriculum.
        is_recorded: whether passes are replayed rather than launched kernel by kernel.
    """

    job: Job
    split: Split
    recompute: str
    rows: int
    span: StageSpan
    is_recorded: bool = False

    @property
    def tokens(self) -> int:
        """N, the tokens of the micro-batch."""
        return self.rows * self.span.seq_length

    @property
    def share(self) -> float:
        """The part of the tokens that this rank's residual stream holds."""
        return 1.0 / self.split.tensor if self.split.sequence else 1.0

    @property
    def masked(self) -> int:
        """Masked slots of the micro-batch."""
        return self.rows * self.span.masked_slots

    @property
    def kv_size(self) -> int:
        """Channels of the keys that this rank computes; the values have as many."""
        model, tensor = self.job.config.model, self.split.tensor
        return model.kv_size // model.kv_ranks(tensor)

    @property
    def writes_scores(self) -> bool:
        """Whether attention stores the scores of every pair of slots."""
        return not self.job.has_kernel
