"""The actions of a pipeline's ranks: what each of them needs, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """What an action does; a message belongs to the stage that sends or receives it."""

    FORWARD = auto()
    BACKWARD = auto()
    BACKWARD_INPUT = auto()
    BACKWARD_WEIGHT = auto()
    SEND_ACTIVATION = auto()
    RECEIVE_ACTIVATION = auto()
    SEND_GRADIENT = auto()
    RECEIVE_GRADIENT = auto()


_TOWARDS_NEXT_STAGE = {Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT}
_TOWARDS_PREVIOUS_STAGE = {Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT}


@dataclass(frozen=True)
class Action:
    """One thing that a rank does for one micro-batch in one of its stages."""

    kind: Kind
    stage: int
    micro_batch: int

    @property
    def is_message(self) -> bool:
        """Whether it sends or receives."""
        return self.kind in _TOWARDS_NEXT_STAGE or self.kind in _TOWARDS_PREVIOUS_STAGE

    @property
    def is_sent(self) -> bool:
        """Whether it is the sending side of a message."""
        return self.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)

    def peer(self, num_ranks: int) -> int:
        """The rank that a message goes to or comes from."""
        assert self.is_message
        step = 1 if self.kind in _TOWARDS_NEXT_STAGE else -1
        return (self.stage + step) % num_ranks


def needs(action: Action, num_stages: int) -> Iterator[Action]:
    """Yield the computations, on this rank or another, whose results a computation needs."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD:
        if stage > 0:
            yield Action(Kind.FORWARD, stage - 1, micro_batch)
    elif action.kind is Kind.BACKWARD_WEIGHT:
        yield Action(Kind.BACKWARD_INPUT, stage, micro_batch)
    else:
        yield Action(Kind.FORWARD, stage, micro_batch)
        if stage < num_stages - 1:
            yield Action(action.kind, stage + 1, micro_batch)


@dataclass(frozen=True)
class StageTime:
    """How long a stage takes for one micro-batch, in any unit."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0

    @property
    def total(self) -> float:
        """A whole pass, there and back."""
        return self.forward + self.backward_input + self.backward_weight

    def of(self, kind: Kind) -> float:
        """The time of a computation."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward_input + self.backward_weight,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
        }[kind]
