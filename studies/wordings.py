"""Right answers in other wordings, and wrong ones that differ from right by little: what the checker is measured on."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rsim.answers.extract import parse_number
from rsim.game.problem import Problem

Writer = Callable[[Problem], str | None]  # a new answer from the gold one; None: this problem has no such answer

_NO_FORMULA = re.compile(r"\\[A-Za-z]+\*?|\{[a-z]*matrix\}|(?<=\\text)\{[^{}]*\}|(?<=\\mbox)\{[^{}]*\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")


def formula_parts(gold: str) -> list[tuple[str, bool]]:
    """The text cut into pieces; True: a formula's signs, False: a command's name or words."""
    parts, at = [], 0
    for found in _NO_FORMULA.finditer(gold):
        parts += [(gold[at : found.start()], True), (found[0], False)]
        at = found.end()
    return [*parts, (gold[at:], True)]


def entries(gold: str) -> list[str]:
    """The entries of a bare list or of a set; one for any other answer."""
    inner = re.sub(r"^\\\{(.*)\\\}$", r"\1", gold.strip())
    if re.search(r"[a-z]=", inner) or "\\text" in inner or re.fullmatch(r"\D*\d{1,3}(?:(?:,|,\\!|\{,\})\s?\d{3})+\D*", inner):
        return [gold]
    found, depth, at = [], 0, 0
    for place, sign in enumerate(inner):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0 and not re.match(r",\\!|,\d{3}(?!\d)", inner[place:]):
            found.append(inner[at:place].strip())
            at = place + 1
    found.append(re.sub(r"^\\,", "", inner[at:].strip()))
    return [re.sub(r"^\\[, ]\s*", "", one) for one in found]


def boxed(p: Problem) -> str | None:
    return p.answer


def dfrac(p: Problem) -> str | None:
    whole = parse_number(p.answer)
    if p.kind == "numeric" and whole is not None and re.fullmatch(r"-?\d+", p.answer):
        return f"{'-' if whole < 0 else ''}\\dfrac{{{abs(2 * int(whole))}}}{{2}}"
    text = _FRACTION.sub(lambda m: f"\\dfrac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", p.answer)
    return text if text != p.answer else None


def spaced(p: Problem) -> str | None:
    if p.kind in ("choice", "text"):
        return f"\\text{{ {p.answer} }}"
    shown = "".join(
        re.sub(r"(?<!\\)([()])", lambda m: ("\\left" if m[0] == "(" else "\\right") + m[0], re.sub(r"([+=])", r" \1\\, ", text))
        if formula
        else text
        for text, formula in formula_parts(p.answer)
    )
    level = 0
    for sign in re.findall(r"\\(?:left|right)(?![a-z])", shown):
        level += 1 if "left" in sign else -1
    return f"\\, {shown} \\;" if level == 0 and not ("[" in p.answer and "(" in p.answer) else f"\\, {p.answer} \\;"


def reordered(p: Problem) -> str | None:
    parts = entries(p.answer) if p.kind == "latex" else []
    return ", ".join(reversed(parts)) if len(parts) > 1 else None


def joined(p: Problem) -> str | None:
    parts = entries(p.answer) if p.kind == "latex" else []
    return ", ".join(parts[:-1]) + " \\text{ and } " + parts[-1] if len(parts) > 1 else None


def option(p: Problem) -> str | None:
    return p.meta["options"][ord(p.answer) - 65] if p.meta.get("options") else None


def lettered(p: Problem) -> str | None:
    words = option(p)
    return f"\\textbf{{({p.answer})}}\\ {words}" if words else f"\\text{{({p.answer})}}" if p.kind == "choice" else None


WORDINGS: dict[str, Writer] = {
    "boxed": boxed,
    "\\dfrac": dfrac,
    "spaced": spaced,
    "reordered lists": reordered,
    "\\text{and}": joined,
    "(letter) words": lettered,
}


def changed_number(text: str, change: Callable[[str], str], *, last: bool = False) -> str | None:
    """``text`` with one of the numbers of its formula changed."""
    parts = formula_parts(text)
    order = range(len(parts) - 1, -1, -1) if last else range(len(parts))
    for place in order:
        shown, formula = parts[place]
        numbers = list(re.finditer(r"\d+", shown)) if formula else []
        if numbers:
            found = numbers[-1 if last else 0]
            shown = shown[: found.start()] + change(found[0]) + shown[found.end() :]
            return "".join(text for text, _ in [*parts[:place], (shown, True), *parts[place + 1 :]])
    return None


def entry(p: Problem) -> str | None:
    """One entry left out of a list, changed in a tuple or matrix, added to a single answer."""
    if p.kind in ("choice", "text"):
        return None
    parts = entries(p.answer) if p.kind == "latex" else [p.answer]
    if len(parts) > 1:
        return ", ".join(parts[1:])
    if re.search(r"[(\[&]", p.answer):
        return changed_number(p.answer, lambda n: str(int(n) + 1), last=True)
    return f"{p.answer}, 7{len(p.answer)}1"


def sign(p: Problem) -> str | None:
    text = p.answer.strip()
    if (
        p.kind in ("choice", "text")
        or "\\pm" in text
        or text.startswith(("\\text", "\\mbox"))
        or not re.search(r"[1-9a-z]", text)
    ):
        return None
    opened = re.match(r"(?:\\left\s*)?[(\[]\s*|\\begin\{pmatrix\}\s*|[a-z]\s*=\s*|\\\{|\\\$\s*|\$\s*", text)
    at = opened.end() if opened else 0
    if re.match(r"0(?![.\d])|\\emptyset", text[at:]):  # -0 is 0
        return None
    return text[:at] + (text[at + 1 :] if text[at:].startswith("-") else "-" + text[at:])


def letter(p: Problem) -> str | None:
    """A letter behind a number; another variable in a formula."""
    if p.kind in ("choice", "text"):
        return None
    if re.fullmatch(r"[-\d.,\\!{}$%\s/]+", p.answer):
        return None if parse_number(p.answer) == 0 else f"{p.answer.strip().rstrip('.')}k"
    for place, (shown, formula) in enumerate(parts := formula_parts(p.answer)):
        found = re.search(r"(?<![A-Za-z_])[a-z](?![A-Za-z])", shown) if formula else None
        if found:
            new = "w" if found[0] != "w" else "v"
            shown = shown[: found.start()] + new + shown[found.end() :]
            return "".join(text for text, _ in [*parts[:place], (shown, True), *parts[place + 1 :]])
    return None


def base(p: Problem) -> str | None:
    found = re.fullmatch(r"(.*_\{?)(\d+)(\}?)", p.answer)
    if found and re.fullmatch(r"[\dA-F,\\!{}]+_\{?\d+\}?", p.answer):
        return f"{found[1]}{int(found[2]) + 1}{found[3]}"
    return f"{p.answer}_8" if re.fullmatch(r"\d{2,}", p.answer) and p.kind != "choice" else None


def digit(p: Problem) -> str | None:
    """The first digit of the last number, another one; not in the rounded side of ``2/3 = 0.67``, whose exact side counts."""
    if "\\approx" in p.answer[1:]:
        return None
    if p.kind in ("choice", "text") or re.search(r"\^\{?0|\D0\D*$", p.answer):
        return None
    return changed_number(p.answer, lambda n: str((int(n[0]) + 1) % 9 + 1) + n[1:], last=True)


def other_option(p: Problem) -> str | None:
    """The right letter with the words of another option; without options, another letter."""
    if p.kind == "text" and p.answer in ("True", "False"):
        return str(p.answer == "False")
    if p.kind != "choice":
        return None
    options = p.meta.get("options", [])
    other = (ord(p.answer) - 64) % max(len(options), 4)
    if options and options[other] == option(p):
        return None
    return f"({p.answer}) {options[other]}" if options else chr(65 + other)


def denied(p: Problem) -> str | None:
    return f"\\text{{not }}{p.answer}"


ALTERED: dict[str, Writer] = {
    "an entry": entry,
    "sign": sign,
    "letter": letter,
    "base": base,
    "digit": digit,
    "option": other_option,
    "denied": denied,
}


def within_tolerance(p: Problem, text: str) -> bool:
    """An altered number that the problem's tolerance allows."""
    gold, given = parse_number(p.answer), parse_number(text)
    tolerance = Fraction(p.meta.get("tolerance", 0.0))
    return bool(tolerance) and gold is not None and given is not None and abs(given - gold) <= abs(gold) * tolerance
