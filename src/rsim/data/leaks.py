"""Which questions two splits or sets have in common, by a hash of their normalised text."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from rsim.game.problem import Problem


def question_hash(question: str) -> str:
    """The same for questions that differ only in case, white space, punctuation or Unicode form.

    >>> question_hash("What is  2+2 ?") == question_hash("what is 2+2")
    True
    """
    plain = unicodedata.normalize("NFKC", question).casefold()
    words = re.findall(r"[^\W_]+|[-+*/^=<>|%]", plain)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]


def separate(splits: dict[str, list[Problem]]) -> dict[str, list[Problem]]:
    """The splits without overlap: what test asks leaves dev and train, what dev asks leaves train; test stays whole."""
    seen: set[str] = set()
    kept: dict[str, list[Problem]] = {}
    for split in sorted(splits, key=("test", "dev", "train").index):
        kept[split] = [p for p in splits[split] if question_hash(p.question) not in seen]
        seen |= {question_hash(p.question) for p in splits[split]}
    return kept


def shared_questions(left: list[Problem], right: list[Problem]) -> list[tuple[Problem, Problem]]:
    """Pairs of problems that ask the same question."""
    known = {question_hash(p.question): p for p in left}
    return [(known[h], p) for p in right if (h := question_hash(p.question)) in known]
