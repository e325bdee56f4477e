"""LaTeX and plain notation as tokens: spellings that mean the same become one, and words are told from products of letters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rsim.answers import units

_SIGNS = str.maketrans(
    dict(zip("−–×·⋅∙÷∕⁄＞＜＝，（）’′", "--****///><=,()''", strict=True))
    | dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{n}" for n in range(10)), strict=True))
    | dict(zip("½¼¾⅓⅔", (f"\\frac{n} " for n in (12, 14, 34, 13, 23)), strict=True))
    | {"π": "\\pi ", "√": "\\sqrt ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∞": "\\infty ", "°": "^\\circ ", "∪": "\\cup "}
    | {
        "≈": "\\approx ",
        "∈": "\\in ",
        "±": "\\pm ",
        "∅": "\\emptyset ",
        "θ": "\\theta ",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
    }
)
_SPACES = r"\\(?:displaystyle|textstyle|limits|nonumber|hfill|thinspace|medspace|quad|qquad)(?![A-Za-z])|\\[,!;: ]|~"
_TEXT = r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|mbox|emph|operatorname|textnormal|rm|bf|it)\s*\{([^{}]*)\}"
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\\\"), "¶"),  # a matrix's new row
    (re.compile(r"\\\$"), "§"),  # a dollar; a bare $ opens and closes formulas
    (re.compile(r"<sup>(.*?)</sup>"), r"^{\1}"),
    (re.compile(r"\{,\}|,\\!\s*|\\,(?=\d{3}(?!\d))|(?<=\d),\\,(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<![\d.,/^_}])\d{1,3}(?: \d{3})+(?![\d/])"), lambda m: m[0].replace(" ", "")),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?:[lr]?)(?![A-Za-z])\.?"), ""),
    (re.compile(_SPACES), " "),
    (re.compile(r"\\\(|\\\)|\\\[|\\\]"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"), r"\\text{ degree}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:leq|leqslant|le)(?![A-Za-z])|<="), "≤"),
    (re.compile(r"\\(?:geq|geqslant|ge)(?![A-Za-z])|>="), "≥"),
    (re.compile(r"\\(?:neq|ne)(?![A-Za-z])|!="), "≠"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])"), r"\1*10^{\2}"),
    (re.compile(_TEXT), lambda m: "⟦" + re.sub(r"\s*,\s*", "⟧,⟦", m[1]) + "⟧"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])|(?<=\d)pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])sqrt(?![A-Za-z])"), r"\\sqrt"),
    (re.compile(r"\{\s*\}"), ""),
]  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)|(?P<words>⟦[^⟦⟧]*⟧)|(?P<command>\\[A-Za-z]+|\\[{}|\\])"
    r"|(?P<letters>[A-Za-z]+)|(?P<sign>[^\s\w]|_))"
)
_TOKEN_IN_BRACKETS = re.compile(_TOKEN.pattern.replace(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)", r"\d+"))  # (100,101) is a pair
_JOINING = {"and", "or"}


class UnreadableError(ValueError):
    """Not an answer in any form that is known here. ``prose``: it holds words, so that no part of it may be taken for it."""

    def __init__(self, prose: bool = False) -> None:
        super().__init__("prose" if prose else "unknown notation")
        self.prose = prose


@dataclass(frozen=True)
class Token:
    kind: str  # number, words, command, letters, sign
    text: str
    spaced: bool  # white space stands before it


def normal(text: str) -> str:
    text = text.translate(_SIGNS).strip()
    while "\\boxed{" in text or "\\fbox{" in text:
        shorter = re.sub(r"\\f?box(?:ed)?\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 ", text)
        if shorter == text:
            raise UnreadableError
        text = shorter
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = text.replace("$", "§" if text.count("$") % 2 else " ")
    text = re.sub(r"^\s*(?:\\approx|=)", "", text).strip().rstrip(".").strip()
    return re.sub(r"(?i)^⟦?(?:the )?(?:final )?answer(?: is)?:?\s*⟧?(?=.)", "", text)


def tokens(text: str) -> list[Token]:
    found: list[Token] = []
    at, level = 0, 0
    while at < len(text):
        match = (_TOKEN if level <= 0 else _TOKEN_IN_BRACKETS).match(text, at)
        if match is None:
            if text[at:].strip():
                raise UnreadableError
            break
        kind = str(match.lastgroup)
        shown, spaced = match[kind], match.start(kind) > at
        level += {"(": 1, "[": 1, "\\{": 1, ")": -1, "]": -1, "\\}": -1}.get(shown, 0)
        at = match.end()
        if kind == "words":
            words = shown[1:-1].strip(" \n,;()")
            if words.lower() in _JOINING or words == "":
                kind, shown = ("sign", ",") if words else ("", "")
            else:
                shown = words
        if kind == "letters":
            found += _of_letters(shown, spaced, found)
        elif kind:
            found.append(Token(kind, shown, spaced))
    return found


def _of_letters(run: str, spaced: bool, before: list[Token]) -> list[Token]:
    """A run of letters: a joining word, a unit, a word, or a product of variables."""
    if run.lower() in _JOINING:
        return [Token("sign", ",", spaced)]
    if len(run) == 1 or units.is_product(run):
        return [Token("letters", letter, spaced and i == 0) for i, letter in enumerate(run)]
    return [Token("words", run, spaced)]
