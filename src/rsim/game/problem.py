"""The one type that every data set is read into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["numeric", "latex", "choice", "text", "code", "gym"]


@dataclass(frozen=True)
class Problem:
    """A question and its gold answer as text.

    ``kind`` says how an answer is checked (`rsim.rewards.grade`): *numeric* and *latex* by value, *choice* by
    letter, *text* by words, *code* by running ``answer``, a Python program of tests, *gym* by the verifier of
    its reasoning-gym task. ``meta`` keeps what the source says of the problem (level, subject, options, ...);
    ``meta["tolerance"]`` is the relative error that a numeric answer may have.
    """

    question: str
    answer: str
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    kind: Kind = "numeric"


def generated_split(question: str) -> str:
    """The split that a generated question belongs to, by its exact text: 80% train, 10% dev, 10% test.

    Questions differ by a single sign in some tasks (grids, emoji), so nothing is normalised.
    """
    bucket = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 100
    return "train" if bucket < 80 else "dev" if bucket < 90 else "test"
