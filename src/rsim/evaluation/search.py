"""The strongest controls that need no learning: the best fixed strategy and the best fixed sequence of strategies.

Both are picked on dev problems, never on those that a claim is measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rsim.policies.strategies import TERMINATION

Accuracy = Callable[[str], float]  # of a planner's specification, e.g. "fixed:validation"
Scores = Callable[[list[str], int], list[float]]  # the accuracies of specifications on the first so many dev problems


def best_fixed(names: tuple[str, ...], accuracy: Accuracy) -> str:
    """``fixed:NAME`` of the most accurate strategy; the first of equals."""
    return max((f"fixed:{name}" for name in names), key=accuracy)


@dataclass(frozen=True)
class SequenceSearch:
    """The best state-blind sequence, ``sequence:A,B,...,termination``, by beam search and then by single changes.

    Every length up to ``longest`` is tried, since a prefix is scored as it is: termination follows it. Of each length all are
    scored on ``few`` problems and the best ``width`` go on; the best ``finalists`` of them are scored on ``many``. From the
    best of all, one place at a time is changed, added or left out, until nothing helps.
    """

    names: tuple[str, ...]
    scores: Scores
    longest: int
    width: int = 64
    finalists: int = 8
    few: int = 60
    many: int = 500

    def best(self) -> str:
        """The specification of the sequence found."""
        found = self._improved(max(self._by_length(), key=lambda scored: scored[0]))
        return _spec(found[1])

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
