"""Two evaluations of the same questions, question by question."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from rsim.errors import UserError
from rsim.evaluation.evaluate import bootstrap_interval, vote
from rsim.runs.folder import json_lines


@dataclass
class Comparison:
    """``difference`` is A's accuracy minus B's, with its paired 95% bootstrap interval; ``only_a`` and ``only_b`` count the
    questions that one alone got right, and ``p`` is the exact two-sided McNemar test of them."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    questions: int
    only_a: int
    only_b: int
    p: float


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Compares two folders that `rsim.evaluate` wrote, A and B, question by question.

    Raises:
        UserError: a folder is no evaluation, or the two are not about the same questions.
    """
    a, b = _outcomes(Path(first)), _outcomes(Path(second))
    if a.keys() != b.keys():
        remedy = "evaluate both with the same --data, --split, --limit and --seed"
        raise UserError(f"{first} and {second} are not about the same questions", remedy)
    pairs = [(a[q], b[q]) for q in a]
    low, high = _interval([float(x) - float(y) for x, y in pairs])
    only_a, only_b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    count = len(pairs)
    mean_a, mean_b = sum(x for x, _ in pairs) / count, sum(y for _, y in pairs) / count
    return Comparison(mean_a, mean_b, mean_a - mean_b, low, high, count, only_a, only_b, mcnemar(only_a, only_b))


def _interval(differences: list[float]) -> tuple[float, float]:
    """Where all are alike the bootstrap has no spread: as far as Wilson's interval goes beyond a share of 0 or 1.

    >>> _interval([0.0] * 10), _interval([1.0] * 10)
    ((-0.277..., 0.277...), (0.722..., 1.0))
    """
    if len(set(differences)) > 1:
        return bootstrap_interval(differences)
    beyond = bootstrap_interval([False] * len(differences))[1]
    return max(-1.0, differences[0] - beyond), min(1.0, differences[0] + beyond)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that so uneven a split comes from a fair coin.

    >>> mcnemar(0, 0), mcnemar(5, 0)
    (1.0, 0.0625)
    """
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**n))


def _outcomes(folder: Path) -> dict[tuple[int, str], bool]:
    path = folder / "episodes.jsonl"
    if not path.is_file() or not (folder / "summary.json").is_file():
        raise UserError(f"{folder} holds no finished evaluation", "give two folders that rsim eval wrote")
    by_question: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for record in json_lines(path):
        by_question[record["index"], record["question"]].append(record)
    return {question: vote(records)["correct"] for question, records in by_question.items()}
