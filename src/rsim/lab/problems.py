"""Procedural lab problems: one expression, told in one of five ways, or in a sixth that none of the nine strategies can read.

Families: ``arithmetic`` shows the expression; ``story``, ``equation``, ``comparison`` and ``calendar`` hide it in words, so
that it has to be written down (planned) first. ``cipher`` has letters for digits; it takes a tenth strategy, ``decoding``,
and is in no mix unless asked for. The split of a problem is a function of its expression alone (a hash
bucket), so train, dev and test are disjoint by construction, also across families, seeds and machines.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from rsim.lab.expressions import Expression, Term, render, value_of

FAMILIES = ("arithmetic", "story", "equation", "comparison", "calendar")
OUTSIDE = {"cipher": 0.15}  # families that need a tenth strategy, and their weight beside the five
SPLITS = ("train", "dev", "test")

# The first share of 100 hash buckets trains, the next is for tuning the lab, the last is never looked at before evaluation.
_BUCKETS = {"train": range(80), "dev": range(80, 90), "test": range(90, 100)}

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("pens", "nuts", "cards", "eggs", "coins", "stamps", "beads", "shells")


@dataclass(frozen=True)
class ProblemMix:
    """What lab problems are made of. ``max_operations`` counts readings, brackets, products and joins together."""

    families: dict[str, float] = field(
        default_factory=lambda: {"arithmetic": 0.5, "story": 0.14, "equation": 0.12, "comparison": 0.12, "calendar": 0.12}
    )
    max_terms: int = 4
    min_operations: int = 2
    max_operations: int = 5
    product_share: float = 0.35
    bracket_share: float = 0.15
    largest_number: int = 99
    largest_factor: int = 29  # of a product or bracket, beside a factor of 2 to 9
    largest: int = 499  # of any running total


@dataclass(frozen=True)
class LabProblem:
    family: str
    question: str
    expression: Expression

    @property
    def answer(self) -> int:
        return value_of(self.expression)

    @property
    def is_worded(self) -> bool:
        return self.family != "arithmetic"

    @property
    def is_cipher(self) -> bool:
        return self.family == "cipher"


def operations(expression: Expression, *, worded: bool) -> int:
    """Number of careful steps that solve it, termination aside."""
    brackets = sum(term.is_bracket for term in expression)
    return int(worded) + 2 * brackets + sum(t.is_product for t in expression) + len(expression) - 1


def split_of(expression: Expression) -> str:
    bucket = int.from_bytes(hashlib.sha256(render(expression).encode()).digest()[:4], "big") % 100
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
        expression = _sample_expression(rng, family, mix)
        if expression is not None and split_of(expression) == split:
            yield LabProblem(family, _tell(family, expression, rng), expression)


def _sample_expression(rng: random.Random, family: str, mix: ProblemMix) -> Expression | None:
    """One candidate, or None when it breaks a limit (the caller draws again)."""
    count = rng.randint(2, mix.max_terms)
    terms: list[Term] = []
    for index in range(count):
        sign = 1 if index == 0 or rng.random() < 0.6 else -1
        terms.append(_sample_term(rng, sign, mix))
    if family == "calendar":
        terms = [Term(1, rng.randint(2, 30)), *(_calendar_term(rng, t) for t in terms[1:])]
    expression = tuple(terms)
    running = [value_of(expression[: i + 1]) for i in range(count)]
    if min(running) < 1 or max(running) > mix.largest:
        return None
    needed = operations(expression, worded=family != "arithmetic")
    return expression if mix.min_operations <= needed <= mix.max_operations else None


def _sample_term(rng: random.Random, sign: int, mix: ProblemMix) -> Term:
    draw = rng.random()
    if draw < mix.product_share:
        return Term(sign, rng.randint(11, mix.largest_factor), rng.randint(2, 9))
    if draw < mix.product_share + mix.bracket_share:
        c = rng.choice((1, -1)) * rng.randint(2, 9)
        return Term(sign, rng.randint(11, mix.largest_factor), rng.randint(2, 9), c)
    return Term(sign, rng.randint(3, mix.largest_number))


def _calendar_term(rng: random.Random, term: Term) -> Term:
    """Days stay days; products become weeks (``weeks * 7`` is written with 7 as the factor)."""
    return Term(term.sign, rng.randint(11, 29), 7) if not term.is_number else term


def _tell(family: str, expression: Expression, rng: random.Random) -> str:
    if family == "arithmetic":
        return f"{render(expression)}=?"
    if family == "cipher":
        return f"{encode(expression)}=?"
    if family == "story":
        return _tell_story(expression, rng)
    if family == "equation":
        # Everything but the first term moves to the left, where its sign turns: x - 38 = 4*17.
        rest = tuple(Term(-t.sign, t.b, t.factor, t.c) for t in expression[1:])
        return f"x{_signed(rest)}={render(expression[:1])}, x=?"
    if family == "comparison":
        cut = rng.randint(1, len(expression) - 1)
        right = tuple(Term(-t.sign, t.b, t.factor, t.c) for t in expression[cut:])
        return f"{render(expression[:cut])} minus all of {_signed(right)}, how much?"
    events = "".join(f", then {_count(t)} {'later' if t.sign > 0 else 'earlier'}" for t in expression[1:])
    return f"day {expression[0].body()}{events}, which day?"


def encode(expression: Expression) -> str:
    """The expression with a letter for each digit: ``4*17-38`` is ``e*bh-di``."""
    return render(expression).translate(str.maketrans("0123456789", "abcdefghij"))


def _signed(terms: Expression) -> str:
    return "".join(("+" if t.sign > 0 else "-") + t.body() for t in terms)


def _count(term: Term) -> str:
    return f"{term.body()} days" if term.is_number else f"{term.b} weeks"


def _tell_story(expression: Expression, rng: random.Random) -> str:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    parts = []
    for index, term in enumerate(expression):
        verb = "has" if index == 0 else rng.choice(("finds", "buys")) if term.sign > 0 else rng.choice(("gives", "loses"))
        if term.is_number:
            parts.append(f"{verb} {term.b}")
        elif term.is_product:
            parts.append(f"{verb} {term.factor} boxes of {term.b}")
        else:
            parts.append(f"{verb} {term.factor} boxes of {term.b}{term.c:+d}")
    return f"{name} {', '.join(parts)} {things}. how many?"
