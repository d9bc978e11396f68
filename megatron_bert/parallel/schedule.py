"""Who does what, and when, in a pipeline: lists of actions; needs neither torch nor processes.

With p ranks stage s lies on rank s % p. 1F1B and its interleaved form are Narayanan et al. 2021
("Efficient Large-Scale Language Model Training on GPU Clusters", sections 2.2.1 and 2.2.2). Zero
bubble splits a backward pass (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2): the
gradient of a stage's input, which the stage before waits for, comes first; the gradients of its
weights, which nobody waits for, fill the gaps.

All messages have one order, by the time at which their contents are ready, and every rank sends and
receives its own in that order. So ranks never wait in a circle, even if each message blocks all
later ones on both sides, as the messages of a communicator on one stream do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_bert.config.pipeline_schedules import SCHEDULES, ScheduleName
from megatron_bert.parallel.actions import Action, Kind, StageTime, needs


@dataclass(frozen=True)
class Schedule:
    """All ranks' actions of one step.

    Attributes:
        num_stages: parts that the model is cut into.
        actions: one list per rank, in the order in which it starts them. For each kind of action, a
            stage takes the micro-batches in order.
    """

    num_stages: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.actions)


@dataclass(frozen=True)
class Timing:
    """How long a step takes.

    Attributes:
        duration: from the start of the first action to the end of the last.
        idle_share: the fraction of it that a rank waits, averaged over the ranks.
    """

    duration: float
    idle_share: float


def make_schedule(
    name: ScheduleName, num_ranks: int, num_micro_batches: int, virtual_stages: int = 1
) -> Schedule:
    """Arrange a training step: the computations of `arranged`, with the messages between ranks.

    Args:
        name: which schedule.
        num_ranks: p, ranks of the pipeline, at least 2.
        num_micro_batches: m, of the step; a multiple of p where stages interleave.
        virtual_stages: stages that each rank holds; 1 where they do not interleave.

    Raises:
        ValueError: the numbers do not go together.
    """
    computations = arranged(name, num_ranks, num_micro_batches, virtual_stages)
    return _with_messages(num_ranks * virtual_stages, computations)


def arranged(
    name: ScheduleName, num_ranks: int, num_micro_batches: int, virtual_stages: int = 1
) -> list[list[Action]]:
    """The computations alone of `make_schedule`, which says what is taken and raised, by rank."""
    if virtual_stages > 1 and not SCHEDULES[name].interleaves:
        raise ValueError(f"{name} has one stage a rank, not {virtual_stages}")
    if virtual_stages > 1 and num_micro_batches % num_ranks:
        raise ValueError(
            f"interleaved stages take rounds of {num_ranks} micro-batches, one a rank: "
            f"{num_micro_batches} do not divide"
        )
    rounds = _Rounds(num_ranks, num_micro_batches, virtual_stages)
    if name == "zero_bubble":
        return _zero_bubble(rounds)
    return [_one_forward_one_backward(rounds, rank) for rank in range(num_ranks)]


def most_in_flight(num_ranks: int, virtual_stages: int, rank: int) -> int:
    """The most forward passes, over a rank's stages, that await their backward under 1F1B.

    With one stage a rank: one for each rank from this one to the last. While the first gradient
    comes back the rank waits, since more forward passes would take memory and save no time.

    With several: enough to keep the rank busy until the first gradient comes back. That is one
    round for each further stage, since a round goes through one stage before it goes through the
    next, and each rank behind this one twice: on the first micro-batch's way there, and on its
    gradient's way back.

    Args:
        num_ranks: p, ranks of the pipeline.
        virtual_stages: stages that each rank holds.
        rank: of the pipeline, from 0.
    """
    to_the_last = num_ranks - 1 - rank
    if virtual_stages == 1:
        return to_the_last + 1
    return 2 * to_the_last + (virtual_stages - 1) * num_ranks + 1


def make_forward_schedule(
    num_ranks: int, num_micro_batches: int, virtual_stages: int = 1
) -> Schedule:
    """Arrange forward passes alone, of any number of micro-batches."""
    rounds = _Rounds(num_ranks, num_micro_batches, virtual_stages)
    return _with_messages(rounds.num_stages, [rounds.forwards(rank) for rank in range(num_ranks)])


def simulate(schedule: Schedule, stages: Sequence[StageTime], message: float = 0.0) -> Timing:
    """Predict how long a step takes.

    Args:
        schedule: of the step.
        stages: how long each stage takes.
        message: how long a message is in flight; it holds up neither side.
    """
    ends = end_times(schedule, stages, message)
    duration = max(ends.values())
    busy = sum(stages[action.stage].of(action.kind) for action in ends)
    return Timing(duration, 1.0 - busy / (duration * schedule.num_ranks))


def end_times(
    schedule: Schedule, stages: Sequence[StageTime], message: float = 0.0
) -> dict[Action, float]:
    """When each computation of a step ends, counted from the start of the step; see `simulate`."""
    computations = [
        [action for action in actions if not action.is_message] for actions in schedule.actions
    ]
    return _end_times(computations, stages, message)


@dataclass(frozen=True)
class _Rounds:
    """The order in which an interleaved pipeline takes up its stages.

    A round is p micro-batches: a rank passes all of them through its first stage, then its second
    (backward: through its last, then the one before).
    """

    num_ranks: int
    num_micro_batches: int
    virtual_stages: int

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.virtual_stages

    def forwards(self, rank: int) -> list[Action]:
        return list(self._in_rounds(Kind.FORWARD, range(rank, self.num_stages, self.num_ranks)))

    def backwards(self, rank: int, kind: Kind) -> list[Action]:
        stages = range(rank, self.num_stages, self.num_ranks)
        return list(self._in_rounds(kind, stages[::-1]))

    def _in_rounds(self, kind: Kind, stages: Iterable[int]) -> Iterator[Action]:
        stages = list(stages)
        for first in range(0, self.num_micro_batches, self.num_ranks):
            last = min(first + self.num_ranks, self.num_micro_batches)
            for stage in stages:
                for micro_batch in range(first, last):
                    yield Action(kind, stage, micro_batch)


def _one_forward_one_backward(rounds: _Rounds, rank: int) -> list[Action]:
    """Forward passes until the first gradient comes back, then one of each in turn."""
    forwards, backwards = rounds.forwards(rank), rounds.backwards(rank, Kind.BACKWARD)
    most = most_in_flight(rounds.num_ranks, rounds.virtual_stages, rank)
    ahead = min(most - 1, len(forwards))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - ahead :]


def _zero_bubble(rounds: _Rounds) -> list[list[Action]]:
    """List scheduling in steps of unit time: each rank does the most urgent thing that it can.

    In order of urgency: a backward pass to an input, which other ranks wait for; a forward pass;
    the weight gradients of the longest-waiting micro-batch. Rank 0 holds the most micro-batches
    under 1F1B; no rank may hold more, and a micro-batch is held until its weight gradients are
    computed.
    """
    limit = most_in_flight(rounds.num_ranks, rounds.virtual_stages, rank=0)
    ranks = [_ZeroBubbleRank(rounds, rank, limit) for rank in range(rounds.num_ranks)]
    done: set[Action] = set()
    while any(rank.is_busy for rank in ranks):
        chosen = [rank.choose(done) for rank in ranks]
        assert any(chosen), "no rank can go on"
        done.update(action for action in chosen if action is not None)
    return [rank.order for rank in ranks]


class _ZeroBubbleRank:
    def __init__(self, rounds: _Rounds, rank: int, limit: int) -> None:
        self.order: list[Action] = []
        self._num_stages = rounds.num_stages
        self._limit = limit
        self._forwards = rounds.forwards(rank)[::-1]
        self._inputs = rounds.backwards(rank, Kind.BACKWARD_INPUT)[::-1]
        self._weights = rounds.backwards(rank, Kind.BACKWARD_WEIGHT)[::-1]

    @property
    def is_busy(self) -> bool:
        return bool(self._weights)

    def choose(self, done: set[Action]) -> Action | None:
        """Take the next action, given what all ranks have done before."""
        held = len(self._weights) - len(self._forwards)
        may_begin = held < self._limit
        for queue in (self._inputs, self._forwards if may_begin else [], self._weights):
            if queue and all(need in done for need in needs(queue[-1], self._num_stages)):
                self.order.append(queue.pop())
                return self.order[-1]
        return None


def _end_times(
    computations: Sequence[Sequence[Action]], stages: Sequence[StageTime], message: float
) -> dict[Action, float]:
    """When each computation ends, if all begin as soon as they can in their rank's order."""
    ends: dict[Action, float] = {}
    free_at = [0.0] * len(computations)
    waiting = [list(reversed(order)) for order in computations]
    while any(waiting):
        known = len(ends)
        for rank, order in enumerate(waiting):
            while order and all(need in ends for need in needs(order[-1], len(stages))):
                action = order.pop()
                ready_at = [
                    ends[need] + (message if need.stage != action.stage else 0.0)
                    for need in needs(action, len(stages))
                ]
                begin = max(free_at[rank], *ready_at) if ready_at else free_at[rank]
                free_at[rank] = ends[action] = begin + stages[action.stage].of(action.kind)
        assert len(ends) > known, "the ranks wait for one another"
    return ends


@dataclass(frozen=True)
class _Message:
    """The two actions by which one computation's result is sent and received."""

    at: float
    send: Action
    receive: Action


def _with_messages(num_stages: int, computations: Sequence[Sequence[Action]]) -> Schedule:
    """Insert the messages into the ranks' orders where a simulation with default costs puts them.

    A message follows everything that the rank has finished by the time it is sent, so that the
    receiving side waits for it in parallel with the computation that it is doing then.
    """
    num_ranks = len(computations)
    ends = _end_times(computations, [StageTime()] * num_stages, 0.0)
    messages: list[list[tuple[float, Action]]] = [[] for _ in range(num_ranks)]
    for message in sorted(_messages(ends, num_stages), key=lambda m: (m.at, m.send.stage)):
        for action in (message.send, message.receive):
            messages[action.stage % num_ranks].append((message.at, action))
    merged = []
    for order, own in zip(computations, messages, strict=True):
        actions: list[Action] = []
        sent = 0
        for action in order:
            while sent < len(own) and own[sent][0] < ends[action]:
                actions.append(own[sent][1])
                sent += 1
            actions.append(action)
        merged.append((*actions, *(message for _, message in own[sent:])))
    return Schedule(num_stages, tuple(merged))


def _messages(ends: dict[Action, float], num_stages: int) -> Iterator[_Message]:
    for action, end in ends.items():
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind is Kind.FORWARD and stage < num_stages - 1:
            yield _Message(
                end,
                Action(Kind.SEND_ACTIVATION, stage, micro_batch),
                Action(Kind.RECEIVE_ACTIVATION, stage + 1, micro_batch),
            )
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and stage > 0:
            yield _Message(
                end,
                Action(Kind.SEND_GRADIENT, stage, micro_batch),
                Action(Kind.RECEIVE_GRADIENT, stage - 1, micro_batch),
            )
