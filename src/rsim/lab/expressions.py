"""Integer expressions of the lab: sums of numbers, products and bracketed products.

An expression is a tuple of signed terms. It is the whole working state of a lab solution: every step rewrites it until
one number is left. Everything here is exact integer arithmetic on immutable values; nothing knows about strategies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One signed term: ``b`` (factor 1), ``factor*b``, or ``factor*(b+c)`` when ``c`` is not zero."""

    sign: int
    b: int
    factor: int = 1
    c: int = 0

    @property
    def value(self) -> int:
        return self.sign * self.factor * (self.b + self.c)

    @property
    def is_number(self) -> bool:
        return self.factor == 1 and self.c == 0

    @property
    def is_product(self) -> bool:
        return self.factor != 1 and self.c == 0

    @property
    def is_bracket(self) -> bool:
        return self.c != 0

    def body(self) -> str:
        if self.is_number:
            return str(self.b)
        if self.is_product:
            return f"{self.factor}*{self.b}"
        return f"{self.factor}*({self.b}{self.c:+d})"


Expression = tuple[Term, ...]


def number(value: int, sign: int = 1) -> Term:
    return Term(sign, value)


def value_of(expression: Expression) -> int:
    return sum(term.value for term in expression)


def render(expression: Expression) -> str:
    """``(Term(1, 17, 4), Term(-1, 38))`` -> ``"4*17-38"``."""
    signed = "".join(("+" if term.sign > 0 else "-") + term.body() for term in expression)
    return signed.removeprefix("+")


_TERM = re.compile(r"([+-]?)(?:(\d+)\*\((\d+)([+-]\d+)\)|(\d+)\*(\d+)|(\d+))")


def parse(text: str) -> Expression | None:
    """The inverse of `render`; None when ``text`` is not exactly one well-formed expression."""
    terms: list[Term] = []
    position = 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or (position > 0 and not match.group(1)):
            return None
        sign = -1 if match.group(1) == "-" else 1
        if match.group(2):
            terms.append(Term(sign, int(match.group(3)), int(match.group(2)), int(match.group(4))))
        elif match.group(5):
            terms.append(Term(sign, int(match.group(6)), int(match.group(5))))
        else:
            terms.append(Term(sign, int(match.group(7))))
        position = match.end()
    return tuple(terms) or None


def replace(expression: Expression, index: int, width: int, new: Term) -> Expression:
    """``expression`` with the ``width`` terms from ``index`` on replaced by ``new``."""
    return (*expression[:index], new, *expression[index + width :])


# --- calculation as a careful and as a hasty person does it -------------------------------------------------------


def place_parts(value: int) -> list[int]:
    """``138`` -> ``[100, 30, 8]``; zero has the one part 0."""
    digits = str(value)
    parts = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits)]
    return [p for p in parts if p] or [0]


def careful_sum(left: int, sign: int, right: int) -> tuple[str, int]:
    """``68 + 38`` place by place: ``("68+30=98+8=106", 106)``."""
    text, total = str(left), left
    for part in place_parts(right):
        total += sign * part
        text += f"{'+' if sign > 0 else '-'}{part}={total}"
    return text, total


def careful_product(factor: int, b: int) -> tuple[str, int]:
    """``6 * 13`` in parts: ``("6*13=60+18=78", 78)``."""
    parts = [factor * part for part in place_parts(b)]
    text = f"{factor}*{b}=" + "+".join(map(str, parts))
    return (text if len(parts) == 1 else f"{text}={sum(parts)}"), sum(parts)


def careful_pair(left: Term, right: Term) -> tuple[str, int]:
    """Both terms worked out carefully and then joined: ``4*17+38`` -> ``("4*17=40+28=68;68+30=98+8=106", 106)``."""
    texts, values = [], []
    for term in (left, right):
        value = term.factor * (term.b + term.c)
        if not term.is_number:
            texts.append(careful_product(term.factor, term.b + term.c)[0])
        values.append(value)
    text, total = careful_sum(values[0], right.sign, values[1])
    return ";".join([*texts, text]), total


def carryless_sum(left: int, sign: int, right: int) -> int:
    """Digit by digit, carries dropped; a digit that would need a borrow is taken the other way round."""
    width = max(len(str(left)), len(str(right)))
    digits = zip(str(left).zfill(width), str(right).zfill(width), strict=True)
    return int("".join(str((int(x) + int(y)) % 10 if sign > 0 else abs(int(x) - int(y))) for x, y in digits))


def carryless_product(factor: int, b: int) -> int:
    """``6 * 13`` with the carry of the ones dropped: 68."""
    tens, ones = divmod(b, 10)
    return factor * tens * 10 + (factor * ones) % 10
