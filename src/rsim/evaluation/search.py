"""The strongest controls that need no learning: the best fixed strategy and the best fixed sequence of strategies.

Both are picked on dev problems, never on those that a claim is measured on.
"""

from __future__ import annotations

from collections.abc import Callable

from rsim.policies.strategies import TERMINATION

Accuracy = Callable[[str], float]  # of a planner's specification, e.g. "fixed:validation"


def best_fixed(names: tuple[str, ...], accuracy: Accuracy) -> str:
    """``fixed:NAME`` of the most accurate strategy; the first of equals."""
    return max((f"fixed:{name}" for name in names), key=accuracy)


def best_sequence(names: tuple[str, ...], accuracy: Accuracy, width: int = 3, longest: int = 6) -> str:
    """``sequence:A,B,...,termination`` by beam search: grow by one strategy at a time, before termination, and keep the
    ``width`` best of each length."""
    ending = f"sequence:{TERMINATION}"
    beam = [(accuracy(ending), ending)]
    best = beam[0]
    for _ in range(longest):
        grown = {
            f"{sequence.removesuffix(TERMINATION)}{name},{TERMINATION}"
            for _, sequence in beam
            for name in names
            if name != TERMINATION
        }
        beam = sorted(((accuracy(s), s) for s in sorted(grown)), key=lambda scored: -scored[0])[:width]
        best = max(best, beam[0], key=lambda scored: scored[0])
    return best[1]
