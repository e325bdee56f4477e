"""What the game asks of a planner, learned or scripted, and what a planner's decision is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rsim.policies.strategies import StrategySet
from rsim.rules import PlayRules


@dataclass
class Decision:
    """One act of the planner.

    ``position`` indexes `Episode.planner_ids`: the token whose hidden state the head reads. ``logprob`` is under the
    sampling temperature; ``probabilities`` are all nine, in label order.
    """

    position: int
    action: int
    logprob: float
    probabilities: list[float]


class PlannerSession(Protocol):
    """The planner's side of several plays at once, each in a slot."""

    def start(self, slots: list[int], questions: list[str], openings: list[list[int] | None] | None = None) -> None:
        """``openings``: the ids with which a learned planner begins to read the questions, where they are known."""

    def decide(self, slots: list[int], uniforms: list[float], temperature: float) -> list[Decision]: ...
    def observe(self, slot: int, strategy: str, text: str) -> None: ...
    def ids(self, slot: int) -> list[int]: ...
    def length(self, slot: int) -> int:
        """Tokens that the planner's model will have read of a slot's play at its next decision."""

    def reads(self, slot: int) -> bool:
        """Whether it can read so many."""


class AnyPlanner(Protocol):
    """What the game asks of a planner, learned or scripted."""

    strategies: StrategySet
    rules: PlayRules | None  # that it was trained under, if it was trained

    @property
    def parameters(self) -> int:
        """Of its model; a rule has none."""

    @property
    def context(self) -> int:
        """How many tokens its model can read."""

    def begin(self, slots: int) -> PlannerSession: ...
