"""The one type that every data set is read into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A question and its gold answer as text; ``meta`` keeps what the source says of it (level, family, ...)."""

    question: str
    answer: str
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
