"""How long a pipeline's schedule takes, for many timings of its stages."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.parallel.actions import Action, Kind, StageTime, needs
from megatron_bert.parallel.schedule import arranged

_KINDS = {
    kind: number
    for number, kind in enumerate(
        (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    )
}

ARRANGING = 20


class TimedSchedule:
    """A training step's computations in an order in which each follows all that it needs.

    The order is that of training. To arrange it takes about `ARRANGING` times as long as to go
    through it, and it does not depend on how long the stages take.

    Args:
        name: which schedule.
        num_ranks: of the pipeline.
        num_micro_batches: of the step; kept as an attribute.
        virtual_stages: stages that each rank holds.
    """

    def __init__(
        self, name: ScheduleName, num_ranks: int, num_micro_batches: int, virtual_stages: int
    ) -> None:
        self.num_micro_batches = num_micro_batches
        self._num_ranks = num_ranks
        self._num_stages = num_ranks * virtual_stages
        # For each computation: its rank, the place of its time in `duration`, and which computation
        # of another stage it needs (-1: none). What it needs of its own stage its rank did before.
        self._steps: list[tuple[int, int, int]] = []
        numbers: dict[Action, int] = {}
        orders = arranged(name, num_ranks, num_micro_batches, virtual_stages)
        waiting = [order[::-1] for order in orders]
        while any(waiting):
            known = len(numbers)
            for rank, order in enumerate(waiting):
                while order:
                    action = order[-1]
                    need = self._from_elsewhere(action)
                    if need is not None and need not in numbers:
                        break
                    place = _KINDS[action.kind] * self._num_stages + action.stage
                    self._steps.append((rank, place, -1 if need is None else numbers[need]))
                    numbers[order.pop()] = len(numbers)
            assert len(numbers) > known, "the ranks wait for one another"

    def duration(self, stages: Sequence[StageTime], message: float) -> float:
        """What `parallel.schedule.simulate` says.

        Args:
            stages: how long each stage takes.
            message: how long a message is in flight.
        """
        seconds = [stage.of(kind) for kind in _KINDS for stage in stages]
        free_at, ends = [0.0] * self._num_ranks, [0.0] * len(self._steps)
        for number, (rank, place, need) in enumerate(self._steps):
            begin = free_at[rank]
            if need >= 0:
                begin = max(begin, ends[need] + message)
            free_at[rank] = ends[number] = begin + seconds[place]
        return max(free_at)

    def _from_elsewhere(self, action: Action) -> Action | None:
        return next(
            (need for need in needs(action, self._num_stages) if need.stage != action.stage), None
        )
