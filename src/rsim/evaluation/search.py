"""The strongest controls that need no learning: the best fixed strategy and the best fixed sequence of strategies.

Both are picked on dev problems, never on those that a claim is measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rsim.config import Config
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.protocol import Decision
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import ScriptedPlanner, ScriptedSession, one_hot
from rsim.policies.strategies import TERMINATION, StrategySet
from rsim.rewards.programs import runner_for
from rsim.rewards.rewards import score_all

Accuracy = Callable[[str], float]  # of a planner's specification, e.g. "fixed:validation"
Scores = Callable[[list[str], int], list[float]]  # the accuracies of specifications on the first so many dev problems


def best_fixed(names: tuple[str, ...], accuracy: Accuracy) -> str:
    """``fixed:NAME`` of the most accurate strategy; the first of equals."""
    return max((f"fixed:{name}" for name in names), key=accuracy)


@dataclass(frozen=True)
class SequenceSearch:
    """The best state-blind sequence found, ``sequence:A,B,...,termination``, by beam search and then by single changes.

    Every length up to ``longest`` is tried, since a prefix is scored as it is: termination follows it. Of each length all are
    scored on ``few`` problems and the best ``width`` go on; the best ``finalists`` of them are scored on ``many``. From the
    best ``starts`` of all, one place at a time is changed, added or left out, until nothing helps.
    """

    names: tuple[str, ...]
    scores: Scores
    longest: int
    width: int = 64
    finalists: int = 8
    starts: int = 4
    few: int = 60
    many: int = 500

    def best(self) -> str:
        """The specification of the sequence found."""
        return self._climbed(sorted(self._by_length(), key=lambda scored: -scored[0]))

    def climb(self, sequences: list[tuple[str, ...]]) -> str:
        """The best that single changes lead to from the best ``starts`` of ``sequences`` (without their termination)."""
        return self._climbed(self._scored(sequences, self.many))

    def _climbed(self, found: list[tuple[float, tuple[str, ...]]]) -> str:
        best = max((self._improved(start) for start in found[: self.starts]), key=lambda scored: scored[0])
        return _spec(best[1])

    def _by_length(self) -> list[tuple[float, tuple[str, ...]]]:
        """The finalists of each length with their accuracies on ``many`` problems."""
        beam: list[tuple[str, ...]] = [()]
        found = self._scored(beam, self.many)
        for _ in range(self.longest):
            grown = [(*sequence, name) for sequence in beam for name in self.names if name != TERMINATION]
            beam = [sequence for _, sequence in self._scored(grown, self.few)[: self.width]]
            found += self._scored(beam[: self.finalists], self.many)
        return found

    def _improved(self, best: tuple[float, tuple[str, ...]]) -> tuple[float, tuple[str, ...]]:
        """The first change that helps is taken, the most promising first; then again, from what it gave."""
        while True:
            bound = self._scored([best[1]], self.few)[0][0]
            likely = [changed for score, changed in self._scored(self._changes(best[1]), self.few) if score >= bound]
            better = [scored for scored in self._scored(likely, self.many) if scored[0] > best[0]]
            if not better:
                return best
            best = better[0]

    def _changes(self, sequence: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Every sequence that differs in one place."""
        changed = {sequence[:i] + sequence[i + 1 :] for i in range(len(sequence))}
        for name in self.names:
            if name != TERMINATION:
                changed |= {(*sequence[:i], name, *sequence[i + 1 :]) for i in range(len(sequence))}
                changed |= {(*sequence[:i], name, *sequence[i:]) for i in range(len(sequence) + 1)}
        return sorted(s for s in changed if s != sequence and len(s) <= self.longest)

    def _scored(self, sequences: list[tuple[str, ...]], count: int) -> list[tuple[float, tuple[str, ...]]]:
        """With their accuracies on the first ``count`` problems, the best first; of equals the first."""
        scores = self.scores([_spec(sequence) for sequence in sequences], count) if sequences else []
        return sorted(zip(scores, sequences, strict=True), key=lambda scored: -scored[0])


def _spec(sequence: tuple[str, ...]) -> str:
    return "sequence:" + ",".join([*sequence, TERMINATION])


def accuracies(
    reasoner: Reasoner, strategies: StrategySet, specs: list[str], problems: list[Problem], config: Config
) -> list[float]:
    """The greedy accuracy of each ``sequence:A,B,...`` on ``problems``."""
    found = []
    for episodes in play_sequences(reasoner, strategies, specs, problems, config):
        scores = score_all(episodes, strategies, config.rewards)
        found.append(sum(score.correct for score in scores) / len(problems))
    return found


def play_sequences(
    reasoner: Reasoner, strategies: StrategySet, specs: list[str], problems: list[Problem], config: Config
) -> list[list[Episode]]:
    """Each ``sequence:A,B,...`` on all ``problems``, greedily, all of them in the same batches."""
    sequences = [tuple(spec.removeprefix("sequence:").split(",")) for spec in specs]
    planner = _Sequences(strategies, lambda *_: [], sequences=sequences, each=len(problems))
    game = Game(reasoner, planner, config.rollout, runner_for(planner, config.rewards))
    episodes = game.play(problems * len(sequences), seed=0, greedy=True)
    return [episodes[i : i + len(problems)] for i in range(0, len(episodes), len(problems))]


@dataclass
class _Sequences(ScriptedPlanner):
    """Several sequences at once: the first ``each`` questions that begin are played by the first one, and so on."""

    sequences: list[tuple[str, ...]] = field(default_factory=list)
    each: int = 1

    def begin(self, slots: int) -> ScriptedSession:
        return _InTurn(self, slots)


class _InTurn(ScriptedSession):
    def __init__(self, planner: _Sequences, slots: int) -> None:
        super().__init__(planner, slots)
        self.all, self.each, self.begun = planner.sequences, planner.each, 0
        self.mine: list[tuple[str, ...]] = [()] * slots

    def start(self, slots: list[int], questions: list[str], openings: list[list[int] | None] | None = None) -> None:
        super().start(slots, questions)
        for slot in slots:
            self.mine[slot] = self.all[self.begun // self.each]
            self.begun += 1

    def decide(self, slots: list[int], uniforms: list[float], temperature: float) -> list[Decision]:
        left = [self.mine[slot][len(self.steps[slot]) :] for slot in slots]
        names = [sequence[0] if sequence else TERMINATION for sequence in left]
        actions = [self.planner.strategies.index(name) for name in names]
        return [Decision(-1, action, 0.0, one_hot(action, len(self.planner.strategies))) for action in actions]
