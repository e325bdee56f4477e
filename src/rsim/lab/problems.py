"""Procedural lab problems: a sum of two-digit numbers and small brackets, shown or told in words.

Families: ``arithmetic`` shows the sum; ``story``, ``equation`` and ``calendar`` hide it in words, so that it has to be written
down (planned) first. The split of a problem is a function of its terms alone (a hash bucket), so train, dev and test are
disjoint by construction, also across families, seeds and machines.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

FAMILIES = ("arithmetic", "story", "equation", "calendar")
SPLITS = ("train", "dev", "test")

# The first share of 100 hash buckets trains, the next is for tuning the lab, the last is never looked at before evaluation.
_BUCKETS = {"train": range(80), "dev": range(80, 90), "test": range(90, 100)}

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("pens", "nuts", "cards", "eggs", "coins", "stamps", "beads", "shells")


@dataclass(frozen=True)
class Term:
    """One signed term: the number ``b``, or the bracket ``(b+c)`` when ``c`` is not zero."""

    sign: int
    b: int
    c: int = 0

    @property
    def value(self) -> int:
        return self.sign * (self.b + self.c)

    @property
    def is_bracket(self) -> bool:
        return self.c != 0

    @property
    def is_round(self) -> bool:
        return self.c == 0 and self.b % 10 == 0

    def body(self) -> str:
        return f"({self.b}+{self.c})" if self.c else str(self.b)

    def __str__(self) -> str:
        return ("+" if self.sign > 0 else "-") + self.body()


Terms = tuple[Term, ...]


def render(terms: Terms) -> str:
    """``(Term(1, 47), Term(-1, 12, 5))`` -> ``"47-(12+5)"``."""
    return "".join(map(str, terms)).removeprefix("+")


_TERM = re.compile(r"([+-]?)(?:\((\d+)\+(\d+)\)|(\d+))")


def parse(text: str) -> Terms:
    """The inverse of `render`.

    Raises:
        ValueError: ``text`` is not exactly one well-formed sum.
    """
    terms: list[Term] = []
    position = 0
    while position < len(text) or not terms:
        match = _TERM.match(text, position)
        if match is None or (terms and not match[1]):
            raise ValueError(f"{text!r} is no sum")
        sign = -1 if match[1] == "-" else 1
        terms.append(Term(sign, int(match[2] or match[4]), int(match[3] or 0)))
        position = match.end()
    return tuple(terms)


@dataclass(frozen=True)
class ProblemMix:
    """What lab problems are made of."""

    families: dict[str, float] = field(
        default_factory=lambda: {"arithmetic": 0.64, "story": 0.12, "equation": 0.12, "calendar": 0.12}
    )
    joins: tuple[float, ...] = (0.45, 0.25, 0.3)  # how often one, two, three things are to be done before the answer
    bracket_share: float = 0.15  # of the terms after the first
    tail_share: float = 0.15  # of the problems: they end in two round numbers


@dataclass(frozen=True)
class LabProblem:
    family: str
    question: str
    terms: Terms

    @property
    def answer(self) -> int:
        return sum(term.value for term in self.terms)

    @property
    def is_worded(self) -> bool:
        return self.family != "arithmetic"


def round_tail(terms: Terms) -> bool:
    """Two or more numbers are left and all are round: one step can join them."""
    return len(terms) > 1 and all(term.is_round for term in terms)


def split_of(terms: Terms) -> str:
    bucket = int.from_bytes(hashlib.sha256(render(terms).encode()).digest()[:4], "big") % 100
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def sample_problems(split: str, seed: int, mix: ProblemMix | None = None) -> Iterator[LabProblem]:
    """An endless stream of problems of ``split``; the same seed gives the same stream.

    Raises:
        ValueError: ``split`` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown lab split {split!r}: use one of {', '.join(SPLITS)}")
    mix = mix or ProblemMix()
    rng = random.Random(f"{split}:{seed}")
    families, weights = list(mix.families), list(mix.families.values())
    while True:
        family = rng.choices(families, weights)[0]
        terms = _sample_terms(rng, family, mix)
        if terms is not None and split_of(terms) == split:
            yield LabProblem(family, _tell(family, terms, rng), terms)


def _sample_terms(rng: random.Random, family: str, mix: ProblemMix) -> Terms | None:
    """One candidate, or None when a running total leaves 10 to 99 (the caller draws again)."""
    wanted = max(1, rng.choices(range(1, len(mix.joins) + 1), mix.joins)[0] - (family != "arithmetic"))
    terms = [Term(1, rng.randint(11, 89))]
    tail = rng.random() < mix.tail_share and wanted > 0
    while wanted > tail:
        sign = rng.choice((1, -1))
        if wanted - tail > 1 and rng.random() < mix.bracket_share:
            ones = rng.randint(1, 7)
            terms.append(Term(sign, 10 * rng.randint(1, 4) + ones, rng.randint(1, 9 - ones)))
            wanted -= 2
        else:
            terms.append(Term(sign, rng.randint(11, 69)))
            wanted -= 1
    if tail:
        terms += [Term(rng.choice((1, -1)), 10 * rng.randint(1, 4)) for _ in range(2)]
    running = [sum(term.value for term in terms[: i + 1]) for i in range(len(terms))]
    return tuple(terms) if len(terms) > 1 and min(running) >= 10 and max(running) <= 99 else None


def _tell(family: str, terms: Terms, rng: random.Random) -> str:
    first, rest = terms[0], terms[1:]
    if family == "arithmetic":
        return f"{render(terms)}=?"
    if family == "story":
        told = [f"{rng.choice(('finds', 'buys') if t.sign > 0 else ('gives', 'loses'))} {t.body()}" for t in rest]
        return f"{rng.choice(NAMES)} has {', '.join([first.body(), *told])} {rng.choice(THINGS)}. how many?"
    if family == "equation":  # everything but the first term moves to the left, where its sign turns: x-38=47
        return f"x{''.join(str(Term(-t.sign, t.b, t.c)) for t in rest)}={first.body()}, x=?"
    events = "".join(f", then {t.body()} days {'later' if t.sign > 0 else 'earlier'}" for t in rest)
    return f"day {first.body()}{events}, which day?"
