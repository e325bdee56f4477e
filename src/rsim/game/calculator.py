"""Recomputes the calculations that a text states, exactly.

A calculation is ``a op b = c``, or longer chains of numbers, ``+ - * /`` and ``=``; ``×``, ``÷``, LaTeX's
signs, currency signs and commas in thousands are understood. What is only a part of something larger (a
variable, a power, brackets, a unit inside) is left alone: better to miss an error than to invent one. A
result with decimals may be rounded to them.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIGNS = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    **dict.fromkeys(("\\(", "\\)", "\\[", "\\]"), "\n"),
}
_NUMBER = r"[$€£]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[$€£]?\d+(?:\.\d+)?"
_SIGNED = rf"-?(?:{_NUMBER})"
_SIDE = rf"(?:{_SIGNED})(?:[ \t]*[-+*/][ \t]*(?:{_SIGNED}))*"
# Not directly behind what would make its first number a part of something else, nor before such a thing.
_BEFORE, _AFTER = r"(?<![\w.,:)\]}^%$€£])", r"(?![\w°²³{\[!]|[.,]\d|[ \t]*[-+*/^=(\\%\d])"
_CHAIN = re.compile(rf"{_BEFORE}({_SIDE}(?:[ \t]*=[ \t]*{_SIDE})+){_AFTER}")
_PIECE = re.compile(rf"[-+*/]|{_NUMBER}")
_DIGITS = 40  # of a number, at most


def corrections(text: str) -> list[str] | None:
    """One sentence for each wrong calculation; None where there is none at all.

    >>> corrections("So 12*13 = 146 and 2 + 2 = 4."), corrections("7 / 2 = 3.5"), corrections("no sums")
    (['12*13 = 156, not 146.'], [], None)
    """
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    found, wrong = False, []
    for match in _CHAIN.finditer(text):
        if _part_of_more(text[: match.start()], match[1], text[match.end() : match.end() + 1]):
            continue
        sides = [side.strip() for side in match[1].split("=")]
        values = [_value(side) for side in sides]
        for left, right, a, b in zip(sides, sides[1:], values, values[1:], strict=False):
            if a is None or b is None or not (_calculates(left) or _calculates(right)):
                continue
            found = True
            if not _same(left, right, a, b):
                wrong.append(_sentence(left, right, a, b))
    return wrong if found else None


def _part_of_more(before: str, chain: str, after: str) -> bool:
    """Whether an operator, a bracket or the like stands before it; no bullet, no brackets around it."""
    line = before.rpartition("\n")[2].rstrip()
    if not line or line in ("-", "*", "+") or (line[-1] == "(" and after == ")"):
        return False
    minus = chain.startswith("-") and line[-1].isalnum()  # it takes away from something
    return minus or line[-1].isdigit() or line[-1] in "-+*/^(\\)"


def _calculates(side: str) -> bool:
    return re.search(r"[\d)][ \t]*[-+*/]", side) is not None


def _value(side: str) -> Fraction | None:
    """The value of numbers and operators; None for a division by zero, or numbers beyond all reason."""
    total, term, sign, operator = Fraction(0), Fraction(0), 1, "+"
    waiting = True  # for a number: a minus is its sign
    for piece in _PIECE.findall(side):
        if piece in "+-*/":
            if waiting:
                sign = -sign
            else:
                operator, waiting = piece, True
            continue
        digits = piece.lstrip("$€£").replace(",", "")
        if len(digits) > _DIGITS:
            return None
        number = sign * Fraction(digits)
        if operator in "+-":
            total, term = total + term, number if operator == "+" else -number
        elif operator == "*":
            term *= number
        elif number == 0:
            return None
        else:
            term /= number
        sign, waiting = 1, False
    return total + term


def _same(left: str, right: str, a: Fraction, b: Fraction) -> bool:
    """Equal, or one side is a number that is the other, rounded to the decimals that it is written with."""
    if a == b:
        return True
    for written, other in ((right, left), (left, right)):
        decimals = re.fullmatch(r"-?[$€£]?[\d,]+\.(\d+)", written)
        if decimals and _calculates(other) and abs(a - b) <= Fraction(1, 2 * 10 ** len(decimals[1])):
            return True
    return False


def _sentence(left: str, right: str, a: Fraction, b: Fraction) -> str:
    if not _calculates(right):
        return f"{left} = {_shown(a)}, not {right}."
    if not _calculates(left):
        return f"{right} = {_shown(b)}, not {left}."
    return f"{left} = {_shown(a)}, but {right} = {_shown(b)}."


def _shown(value: Fraction) -> str:
    """A whole number or a decimal; one that does not end is cut after four places and says so."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    while rest > 1 and places <= 12 and (rest % 2 == 0 or rest % 5 == 0):
        rest, places = rest // (10 if rest % 10 == 0 else 2 if rest % 2 == 0 else 5), places + 1
    sign, ends = "-" if value < 0 else "", rest == 1 and places <= 12
    places = places if ends else 4
    scaled = abs(value.numerator) * 10**places // value.denominator
    digits = str(scaled).rjust(places + 1, "0")
    return f"{sign}{digits[:-places]}.{digits[-places:]}{'' if ends else '...'}"
