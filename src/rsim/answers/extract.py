"""Reading answers out of text, in linear time; what they say is for `rsim.answers.reading`.

*strict* takes the one ``\\boxed{...}`` that a text holds; *flexible* takes the last box or else the last number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from rsim.answers import forms, reading
from rsim.answers.algebra import NoValueError, TooHardError
from rsim.answers.notation import UnreadableError

Mode = Literal["strict", "flexible"]

_BOX = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MAX_ANSWER = 200  # characters; whatever is longer is no number
_MAX_DIGITS = 60
_NUMBER = re.compile(
    r"-?\\[dt]?frac\{-?\d{1,20}\}\{\d{1,20}\}|-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?:\.\d+)?)?|-?\.\d+"
)
_LATEX_WRAP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")
_REPLACED = {"−": "-", "\\%": "%", "\\$": "$", "\\!": "", "\\left": "", "\\right": "", "\\ ": " ", "~": " ", "°": ""}
_AMOUNT = re.compile(  # as tables write it; the units are a closed list, so that no sentence is taken for an amount
    r"(?P<before>[(-]?\s*(?:[A-Z]{1,3}\s?)?[$€£¥]?\s*[(-]?\s*)"
    r"(?P<digits>(?:0|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*)(?:\.\d+)?|\.\d+)\s*\)?\s*"
    r"(?P<unit>%|percent|(?:(?:thousand|million|billion|trillion)s?)?\s*(?:(?:dollar|euro|pound|year|month|week|day|share|time)s?)?)"
    r"\s*\)?",
    re.IGNORECASE,
)
_MAX_LATEX = 2000
_LATEX_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\\ |\^\{?\\circ\}?|\\displaystyle")


def boxed(text: str) -> list[str]:
    """The contents of every ``\\boxed{...}`` with balanced braces and something inside, outermost ones only.

    >>> boxed(r"so \\boxed{\\frac{1}{2}} and \\boxed{} and \\boxed{7")
    ['\\\\frac{1}{2}']
    """
    found, position = [], text.find(_BOX)
    while position >= 0:
        start = position + len(_BOX)
        end = _closing_brace(text, start)
        if end < 0:
            break
        if text[start:end].strip():
            found.append(text[start:end].strip())
        position = text.find(_BOX, end)
    return found


def _closing_brace(text: str, start: int) -> int:
    """The place of the brace that closes the one before ``start``, or -1; ``\\{`` and ``\\}`` do not count."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return -1


def extract(text: str, mode: Mode) -> str | None:
    """The answer that ``text`` gives, or None.

    >>> extract("12 then \\\\boxed{7}", "strict"), extract("\\\\boxed{7} or \\\\boxed{8}", "strict")
    ('7', None)
    >>> extract("12, so 7 eggs.", "strict"), extract("12, so 7 eggs.", "flexible")
    (None, '7')
    """
    boxes = boxed(text)
    if mode == "strict":
        return boxes[0] if len(boxes) == 1 else None
    if boxes:
        return boxes[-1]
    numbers = _NUMBER.findall(text.replace("−", "-"))
    return numbers[-1] if numbers else None


def plain_text(text: str) -> str:
    """Case, white space and a final stop removed."""
    return " ".join(text.split()).casefold().rstrip(".")


def plain_latex(text: str) -> str:
    """LaTeX without what does not change its meaning: spacing, sizes, delimiters, text wrappers, degree signs.

    >>> plain_latex(r"$\\left( \\dfrac{1}{2}, 90^\\circ \\right)$") == plain_latex(r"(\\frac{1}{2},90)")
    True
    """
    if len(text) > _MAX_LATEX:
        return text
    text = _LATEX_WRAP.sub(r"\1", text.strip().strip("$"))
    text = _LATEX_NOISE.sub("", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text).rstrip(".")


def same_amount(answer: str, gold: str) -> bool:
    """Whether two texts are the same amount, the way tables write it: a number with or without its currency, its commas and
    its unit; in brackets it is negative. Units that both have must agree.

    >>> same_amount("$1,204.50", "1204.5"), same_amount("-33", "(33)"), same_amount("2.6 million", "$2.6 billion")
    (True, True, False)
    """
    given, wanted = _amount(answer), _amount(gold)
    if given is None or wanted is None:
        return False
    return given[0] == wanted[0] and (given[1] == wanted[1] or not given[1] or not wanted[1])


def _amount(text: str) -> tuple[Fraction, str] | None:
    """Value and unit, or None where the text is something else."""
    if len(text) > _MAX_ANSWER:
        return None
    text = _LATEX_WRAP.sub(r" \1 ", text)
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    found = _AMOUNT.fullmatch(text.strip().rstrip(".").replace("per cent", "percent"))
    if found is None or len(found["digits"]) > _MAX_DIGITS or text.count("(") != text.count(")"):
        return None
    value = Fraction(found["digits"].replace(",", ""))
    negative = "(" in found["before"] or "-" in found["before"]
    unit = " ".join(word.rstrip("s") for word in found["unit"].casefold().split())
    return -value if negative else value, "%" if unit == "percent" else unit


def parse_number(text: str) -> Fraction | None:
    """The value of a written number, or None: decimals, fractions, powers, a unit behind it, a name before it.

    >>> parse_number("-1,234.5"), parse_number(r"\\frac{3}{4}"), parse_number("12 eggs"), parse_number("x+1")
    (Fraction(-2469, 2), Fraction(3, 4), Fraction(12, 1), None)
    """
    try:
        form = reading.read(text)
    except (UnreadableError, NoValueError, TooHardError):
        return None
    if isinstance(form, forms.Relation) and form.name:
        return form.sides[1].rational
    return form.value.rational if isinstance(form, forms.Amount) else None
