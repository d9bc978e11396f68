"""How the rows of a global batch are divided among ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.config.arithmetic import ceil_div, next_multiple
from megatron_bert.config.schema import Config


@dataclass(frozen=True)
class BatchLayout:
    """The division of one optimizer step's rows, the same on every rank.

    Every micro-batch has the same shape on every rank. If the ranks and micro-batches do not divide
    the global batch evenly, the rows of each are rounded up, and the surplus rows have weight 0.

    Attributes:
        global_size: Rows in one optimizer step.
        data_parallel: Ranks that share them.
        micro_size: Rows of one forward pass of one rank.
        num_micro_batches: Forward passes of one rank in one step.
    """

    global_size: int
    data_parallel: int
    micro_size: int
    num_micro_batches: int

    @classmethod
    def divide(
        cls,
        global_size: int,
        data_parallel: int,
        max_micro_rows: int,
        *,
        pipeline: int = 1,
        interleaved: bool = False,
    ) -> BatchLayout:
        """Divide a batch of `global_size` rows over `data_parallel` ranks.

        There are as few micro-batches as the limit of `max_micro_rows` allows, and they are
        balanced: with 9 rows and a limit of 8 they have 5 rows each, not 8 and 1.

        Args:
            global_size: rows in one optimizer step.
            data_parallel: ranks that share them.
            max_micro_rows: maximum rows of a micro-batch.
            pipeline: ranks of the pipeline; there are at least as many micro-batches.
            interleaved: whether pipeline ranks hold several stages; the number of micro-batches is
                then a multiple of `pipeline`.
        """
        rows = ceil_div(global_size, data_parallel)
        num_micro_batches = max(pipeline, ceil_div(rows, max_micro_rows))
        if interleaved:
            num_micro_batches = next_multiple(num_micro_batches, pipeline)
        return cls(
            global_size=global_size,
            data_parallel=data_parallel,
            micro_size=ceil_div(rows, num_micro_batches),
            num_micro_batches=num_micro_batches,
        )

    @classmethod
    def of(
        cls, config: Config, global_size: int, seq_length: int, data_parallel: int
    ) -> BatchLayout:
        """Divide a batch as the configuration says.

        Args:
            config: its micro-batch limits and pipeline settings are used.
            global_size: rows in one optimizer step.
            seq_length: slots of a row.
            data_parallel: ranks that share the rows.
        """
        return cls.divide(
            global_size,
            data_parallel,
            config.batch.max_micro_rows(seq_length),
            pipeline=config.parallel.pipeline,
            interleaved=config.parallel.schedule.interleaves,
        )

    @property
    def rows_per_rank(self) -> int:
        """Rows that a rank takes in one step, including surplus rows."""
        return self.num_micro_batches * self.micro_size

    @property
    def surplus_rows(self) -> int:
        """Rows of weight 0 in one step, over all ranks."""
        return self.rows_per_rank * self.data_parallel - self.global_size

    @property
    def surplus_share(self) -> float:
        """Share of the computed rows that are surplus, that is, wasted work."""
        return self.surplus_rows / (self.rows_per_rank * self.data_parallel)

    def row_offsets(self, data_rank: int, micro_batch: int) -> range:
        """Which rows of the global batch a rank takes in one micro-batch.

        Rows are dealt round-robin, so that ranks differ by at most one real row per step.

        Args:
            data_rank: Rank within data parallelism, from 0.
            micro_batch: Forward pass within the step, from 0.

        Returns:
            `micro_size` offsets within the global batch; offsets from `global_size` on are surplus
            rows.
        """
        assert 0 <= data_rank < self.data_parallel
        assert 0 <= micro_batch < self.num_micro_batches
        rows = self.micro_size * self.data_parallel
        return range(micro_batch * rows + data_rank, (micro_batch + 1) * rows, self.data_parallel)
