"""Failed episodes of an evaluation, gathered by what went wrong.

Simplified: two things are told apart, how the episode ended and the last strategy before its answer; nothing is embedded or
learned. That says where a planner runs aground, not why.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsim.errors import UserError
from rsim.policies.strategies import TERMINATION

_SHOWN = 3  # episodes of a cluster, the shortest ones: they are read by people and by LLMs


@dataclass(frozen=True)
class Cluster:
    """Episodes that failed alike. ``ending``: how; ``after``: the last strategy before the answer, "" where there was none."""

    ending: str
    after: str
    count: int
    examples: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        return f"{self.ending}, after {self.after or 'nothing'}"


def failures(evaluation: Path) -> tuple[list[Cluster], int]:
    """The clusters of an evaluation's failed episodes, largest first, and how many episodes it has in all.

    Raises:
        UserError: the folder holds no evaluation, or one without a planner.
    """
    file = evaluation / "episodes.jsonl"
    if not file.is_file():
        raise UserError(f"{evaluation} holds no episodes.jsonl", "give a folder that rsim eval wrote")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half-written
    if not all("strategies" in record for record in records):
        raise UserError(f"{evaluation} is no evaluation", "give a folder that rsim eval wrote, not a run's")
    if not any(record["strategies"] for record in records):
        raise UserError(f"{evaluation} was played without a planner", "evaluate one: rsim eval RUN --out FOLDER")
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if not record["correct"]:
            found[_ending(record), _after(record["strategies"])].append(record)
    clusters = [
        Cluster(ending, after, len(members), tuple(sorted(members, key=_length)[:_SHOWN]))
        for (ending, after), members in found.items()
    ]
    return sorted(clusters, key=lambda c: (-c.count, c.title)), len(records)


def as_text(record: dict[str, Any]) -> str:
    """An episode for reading: question, steps with their strategies, what came out and what was right."""
    steps = "\n".join(f"[{step['strategy']}]{step['text']}".rstrip() for step in record["steps"])
    return f"Question: {record['question']}\n{steps}\nAnswer: {record['predicted']} (right: {record['answer']})"


def _ending(record: dict[str, Any]) -> str:
    if "truncated" in record["flags"]:
        return "cut off"
    if record["predicted"] is not None:
        return "wrong answer" if "forced" not in record["flags"] else "wrong answer when forced to end"
    return "the reasoner stopped without an answer" if "reasoner_ended" in record["flags"] else "no answer"


def _after(strategies: list[str]) -> str:
    working = [name for name in strategies if name != TERMINATION]
    return working[-1] if working else ""


def _length(record: dict[str, Any]) -> tuple[int, int]:
    return record["sampled_tokens"], record["index"]
