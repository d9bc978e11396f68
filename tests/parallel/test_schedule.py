"""Pipeline schedules: complete, in order, without deadlock, bounded, idle as the formulas say."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.config.pipeline_schedules import SCHEDULES, ScheduleName
from megatron_bert.parallel.actions import Action, Kind, StageTime
from megatron_bert.parallel.schedule import (
    Schedule,
    make_forward_schedule,
    make_schedule,
    simulate,
)

_BACKWARD = {Kind.BACKWARD, Kind.BACKWARD_INPUT}
_RELEASE = {Kind.BACKWARD, Kind.BACKWARD_WEIGHT}
_OTHER_SIDE = {
    Kind.RECEIVE_ACTIVATION: (Kind.SEND_ACTIVATION, -1),
    Kind.RECEIVE_GRADIENT: (Kind.SEND_GRADIENT, 1),
}


_quick = settings(derandomize=True, deadline=None, max_examples=50)


class _Case(NamedTuple):
    name: ScheduleName
    ranks: int
    micro_batches: int
    virtual: int

    def schedule(self) -> Schedule:
        return make_schedule(self.name, self.ranks, self.micro_batches, self.virtual)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table_says_what_a_schedule_does(name: ScheduleName) -> None:
    assert tuple(SCHEDULES) == get_args(ScheduleName)
    (schedule, virtual) = (SCHEDULES[name], 2 if SCHEDULES[name].interleaves else 1)
    made = make_schedule(name, 2, 4, virtual)
    kinds = {action.kind for actions in made.actions for action in actions}
    assert (Kind.BACKWARD_WEIGHT in kinds) == schedule.splits_backward
    assert (Kind.BACKWARD in kinds) != schedule.splits_backward
    if not schedule.interleaves:
        with pytest.raises(ValueError, match=f"{name} has one stage a rank, not 2"):
            make_schedule(name, 2, 4, 2)


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
    name: ScheduleName = draw(st.sampled_from(tuple(SCHEDULES)))
    ranks = draw(st.integers(2, 6))
    virtual = draw(st.integers(1, 4)) if SCHEDULES[name].interleaves else 1
    rounds = draw(st.integers(1, 4))
    return _Case(name, ranks, rounds * ranks if virtual > 1 else draw(st.integers(1, 20)), virtual)


def _of(actions: Iterable[Action], kinds: set[Kind], stage: int) -> list[int]:
    return [a.micro_batch for a in actions if a.kind in kinds and a.stage == stage]


@_quick
@given(_cases())
def test_each_stage_takes_every_micro_batch_once_and_in_order(case: _Case) -> None:
    name, ranks, micro_batches, virtual = case
    schedule = case.schedule()
    assert schedule.num_stages == ranks * virtual
    everything = list(range(micro_batches))
    for stage in range(schedule.num_stages):
        actions = schedule.actions[stage % ranks]
        assert _of(actions, {Kind.FORWARD}, stage) == everything
        assert _of(actions, _BACKWARD, stage) == everything
        assert _of(actions, _RELEASE, stage) == everything
        assert (Kind.BACKWARD in {a.kind for a in actions}) == (name != "zero_bubble")


@_quick
@given(_cases())
def test_each_rank_does_only_its_own_stages_work(case: _Case) -> None:
    schedule = case.schedule()
    for rank, actions in enumerate(schedule.actions):
        assert {action.stage % schedule.num_ranks for action in actions} == {rank}
        assert max(Counter(actions).values()) == 1


def _play(schedule: Schedule) -> list[Action]:
    """Run the ranks with messages that block both sides until both are there.

    Stricter than any real channel: what passes here passes where messages of one pair, or all of a
    rank, go through one queue.
    """
    waiting = [list(reversed(actions)) for actions in schedule.actions]
    played: list[Action] = []
    while any(waiting):
        before = len(played)
        for rank, actions in enumerate(waiting):
            while actions and not actions[-1].is_message:
                played.append(actions.pop())
            if actions and actions[-1].kind in _OTHER_SIDE:
                kind, step = _OTHER_SIDE[actions[-1].kind]
                send = Action(kind, actions[-1].stage + step, actions[-1].micro_batch)
                peer = waiting[actions[-1].peer(schedule.num_ranks)]
                if peer and peer[-1] == send:
                    assert send.peer(schedule.num_ranks) == rank
                    played += [peer.pop(), actions.pop()]
        assert len(played) > before, f"deadlock before {[a[-1] for a in waiting if a]}"
    return played


def _needs(action: Action, num_stages: int) -> set[Action]:
    stage, n = action.stage, action.micro_batch
    received = {Action(Kind.RECEIVE_GRADIENT, stage, n)} if stage < num_stages - 1 else set()
    return {
        Kind.FORWARD: {Action(Kind.RECEIVE_ACTIVATION, stage, n)} if stage > 0 else set(),
        Kind.SEND_ACTIVATION: {Action(Kind.FORWARD, stage, n)},
        Kind.RECEIVE_ACTIVATION: {Action(Kind.SEND_ACTIVATION, stage - 1, n)},
        Kind.BACKWARD: {Action(Kind.FORWARD, stage, n)} | received,
        Kind.BACKWARD_INPUT: {Action(Kind.FORWARD, stage, n)} | received,
        Kind.BACKWARD_WEIGHT: {Action(Kind.BACKWARD_INPUT, stage, n)},
        Kind.RECEIVE_GRADIENT: {Action(Kind.SEND_GRADIENT, stage + 1, n)},
        Kind.SEND_GRADIENT: set(),
    }[action.kind]


def _check_play(schedule: Schedule) -> None:
    done: set[Action] = set()
    for action in _play(schedule):
        assert _needs(action, schedule.num_stages) <= done
        if action.kind is Kind.SEND_GRADIENT:
            stage, n = action.stage, action.micro_batch
            assert {Action(kind, stage, n) for kind in _BACKWARD} & done
        done.add(action)


@_quick
@given(_cases())
def test_blocking_messages_do_not_deadlock_and_what_is_used_was_there(case: _Case) -> None:
    _check_play(case.schedule())


@_quick
@given(_cases())
def test_messages_of_two_ranks_pass_in_one_order(case: _Case) -> None:
    schedule, ranks = case.schedule(), case.ranks
    for first in range(ranks):
        for second in range(first):
            own = [_message(a) for a in schedule.actions[first] if _is_with(a, second, ranks)]
            other = [_message(a) for a in schedule.actions[second] if _is_with(a, first, ranks)]
            assert own == other


def _is_with(action: Action, rank: int, ranks: int) -> bool:
    return action.is_message and action.peer(ranks) == rank


def _message(action: Action) -> Action:
    kind, step = _OTHER_SIDE.get(action.kind, (action.kind, 0))
    return Action(kind, action.stage + step, action.micro_batch)


def _most_in_flight(actions: Iterable[Action], release: set[Kind]) -> int:
    most = held = 0
    for action in actions:
        held += (action.kind is Kind.FORWARD) - (action.kind in release)
        most = max(most, held)
    return most


@_quick
@given(_cases())
def test_no_rank_holds_more_micro_batches_than_one_forward_one_backward_does(case: _Case) -> None:
    name, ranks, micro_batches, virtual = case
    for rank, actions in enumerate(case.schedule().actions):
        # Under zero bubble all ranks may hold what rank 0 does.
        ahead = ranks - 1 - (0 if name == "zero_bubble" else rank)
        bound = ahead + 1 if virtual == 1 else 2 * ahead + (virtual - 1) * ranks + 1
        assert _most_in_flight(actions, _RELEASE) <= min(bound, micro_batches * virtual)


@_quick
@given(_cases())
def test_no_rank_receives_far_ahead_of_its_use(case: _Case) -> None:
    schedule = case.schedule()
    last = schedule.num_stages - 1
    for actions in schedule.actions:
        activations = gradients = 0
        for action in actions:
            activations += action.kind is Kind.RECEIVE_ACTIVATION
            activations -= action.kind is Kind.FORWARD and action.stage > 0
            gradients += action.kind is Kind.RECEIVE_GRADIENT
            gradients -= action.kind in _BACKWARD and action.stage < last
            assert max(activations, gradients) <= schedule.num_ranks


def _idle_share(name: ScheduleName, ranks: int, micro_batches: int, virtual: int = 1) -> float:
    schedule = make_schedule(name, ranks, micro_batches, virtual)
    times = [StageTime(1.0, 1.0, 1.0)] * schedule.num_stages
    return simulate(schedule, times).idle_share


@_quick
@given(ranks=st.integers(2, 6), micro_batches=st.integers(1, 24))
def test_one_forward_one_backward_is_idle_as_the_formula_says(
    ranks: int, micro_batches: int
) -> None:
    expected = (ranks - 1) / (micro_batches + ranks - 1)
    assert _idle_share("1f1b", ranks, micro_batches) == pytest.approx(expected)


@_quick
@given(ranks=st.integers(2, 6), rounds=st.integers(1, 4), virtual=st.integers(2, 4))
def test_interleaving_divides_the_bubble_and_zero_bubble_takes_two_thirds_of_the_rest(
    ranks: int, rounds: int, virtual: int
) -> None:
    micro_batches = ranks * rounds
    expected = (ranks - 1) / (virtual * micro_batches + ranks - 1)
    assert _idle_share("interleaved", ranks, micro_batches, virtual) == pytest.approx(expected)
    # Qi et al. 2024, table 2: (p - 1)(F + B - W) where 1F1B waits (p - 1)(F + B + W).
    expected = (ranks - 1) / (3 * virtual * micro_batches + ranks - 1)
    assert _idle_share("zero_bubble", ranks, micro_batches, virtual) == pytest.approx(expected)


@_quick
@given(ranks=st.integers(2, 6), micro_batches=st.integers(2, 24))
def test_zero_bubble_waits_less_with_one_stage_a_rank_too(ranks: int, micro_batches: int) -> None:
    assert _idle_share("zero_bubble", ranks, micro_batches) < _idle_share(
        "1f1b", ranks, micro_batches
    )


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero_bubble"])
def test_slow_stages_and_messages_take_longer(name: ScheduleName) -> None:
    schedule = make_schedule(name, 4, 8, 1 if name == "1f1b" else 2)
    even = [StageTime(1.0, 1.0, 1.0)] * schedule.num_stages
    slow = [*even[:-1], StageTime(2.0, 2.0, 2.0)]
    as_planned = simulate(schedule, even)
    assert simulate(schedule, slow).duration > as_planned.duration
    assert simulate(schedule, even, message=0.5).duration > as_planned.duration
    busy = 8 * 3.0 * schedule.num_stages / 4
    assert as_planned.duration * (1 - as_planned.idle_share) == pytest.approx(busy)


@_quick
@given(ranks=st.integers(2, 6), micro_batches=st.integers(1, 13), virtual=st.integers(1, 4))
def test_forward_passes_alone_come_in_any_number(
    ranks: int, micro_batches: int, virtual: int
) -> None:
    schedule = make_forward_schedule(ranks, micro_batches, virtual)
    _check_play(schedule)
    for stage in range(schedule.num_stages):
        actions = schedule.actions[stage % ranks]
        assert _of(actions, {Kind.FORWARD}, stage) == list(range(micro_batches))
    kinds = {action.kind for actions in schedule.actions for action in actions}
    assert kinds == {Kind.FORWARD, Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION}


def test_numbers_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds of 4 micro-batches"):
        make_schedule("interleaved", 4, 6, 2)
    with pytest.raises(ValueError, match="one stage a rank"):
        make_schedule("1f1b", 4, 8, 2)


def test_a_planner_needs_no_torch() -> None:
    code = "import sys, megatron_bert.parallel.schedule; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
