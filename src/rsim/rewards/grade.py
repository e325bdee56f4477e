"""One checker for every kind of answer: reads it strictly and flexibly, compares it with gold, and says why
when it gave up.

*strict* wants the answer in exactly one ``\\boxed{...}`` (code: in exactly one code block); *flexible* takes
the last answer that can be found. Comparison goes from cheap to dear: normalised text, exact numbers, and
only then symbolic algebra, in a worker process. Model-written code runs in a sandbox. Whatever fails counts
as wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rsim.answers import forms, reading, units
from rsim.answers.algebra import NoValueError, TooHardError
from rsim.answers.extract import Mode, boxed, extract, parse_number, plain_latex, plain_text, same_amount
from rsim.answers.notation import UnreadableError
from rsim.errors import UserError
from rsim.game.problem import Kind, Problem
from rsim.rewards.code import code_blocks, run_answer
from rsim.rewards.symbolic import LONGEST, shared_pool

# What math-verify may be asked: it takes a part of whatever it does not know for the whole.
_KNOWN = re.compile(r"[\x00-\x7f−–π√°×·÷≤≥≠∞∪∈±²³½¼¾’]*")
_FORMULA = re.compile(
    rf"(?:\\[A-Za-z]+|(?<![A-Za-z\\])[A-Za-z]{{1,3}}(?![A-Za-z])|(?![A-Za-z]){_KNOWN.pattern[:-1]})*"
)
_VAGUE = re.compile(r"\\(?:approx|sim|not|neq?|text|mbox)(?![A-Za-z])|[≈≠%:]|\d'")
_SIGN = re.compile(r"[=<>]|\\(?:le|ge|lt|gt|in|leq|geq)(?![A-Za-z])")
# Of a whole text: it holds words or formulas; its last words deny what they name.
_SENTENCE = re.compile(r"^\d{4,},\d+$|(?<![\\A-Za-z])[A-Za-z]{2,}|[$\n]|\\boxed|\\\[|\\\(")
_DENIED = re.compile(
    r"(?i)(?:\bnot|\bnever|n't)\s+(?:\w+\s+)?\S+\s*$"
    r"|\b(?:at (?:least|most)|(?:less|more|greater|fewer) than)\s+\S+\s*$"
    r"|\b(?:or (?:more|less)|(?:is|are) (?:wrong|incorrect|false|not))\W*$"
)
_PROSE = re.compile(
    r"^\d{4,},\d+$|\b(?i:so|is|it|we|an|of|to|at|by|if|as)\s|\n|.\$.|.\\[(\[]"
    r"|(?<![\\A-Za-z{])[A-Za-z']{2,}[.,:]?\s+(?:[A-Za-z]{2}|[$\\])|(?<![\\A-Za-z{])[A-Za-z']{3,}[.,:]?\s+-?\d"
)
# "A dog" and "I think" name no option.
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z'])(?!(?<=[AI]) [a-z])")
_NAMED_LETTER = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?:?\s*\(?([A-J])\b")
_CHOSEN = re.compile(
    r"(?:(?:the )?(?:answer|option|choice)(?: is)?:? ?)?(\(?)([a-j])(\)?)(?:([.:,]?) ?(.+))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Verdict:
    """``right`` and how it was found: ``text``, ``number``, ``symbolic``, ``choice``, ``code`` or ``gym``;
    ``failure`` says why the checker gave up, if it did."""

    right: bool
    how: str = ""
    failure: str = ""


def check(
    problem: Problem, text: str, mode: Mode = "strict", *, unsafe: bool = False
) -> tuple[str | None, Verdict]:
    """Reads the answer out of ``text``, a model's final words, and judges it.

    Returns:
        what was read (None: no answer) and the verdict.

    >>> from rsim.game.problem import Problem
    >>> check(Problem("6*7?", "42"), "so it is \\\\boxed{42.0}")
    ('42.0', Verdict(right=True, how='number', failure=''))
    """
    answer = read_answer(text, mode, problem.kind)
    if (
        mode == "flexible"
        and problem.kind == "gym"
        and not boxed(text)
        and parse_number(problem.answer) is not None
    ):
        answer = extract(text, "flexible") or answer  # the task's verifier would take the whole text
    if answer is None:
        return None, Verdict(False)
    loose = mode == "flexible" and extract(text, "strict") is None
    return answer, grade(problem, answer, unsafe=unsafe, loose=loose)


def read_answer(text: str, mode: Mode, kind: Kind) -> str | None:
    """The answer that ``text`` gives, by the kind of problem; None when there is none."""
    if kind == "code":
        blocks = code_blocks(text)
        if mode == "strict":
            return blocks[0] if len(blocks) == 1 else None
        return blocks[-1] if blocks else text or None
    found = extract(text, "strict")
    if found is not None or mode == "strict":
        return found
    if kind == "choice":
        found_answers = boxed(text) or _NAMED_LETTER.findall(text) or _LETTER.findall(text)
        return found_answers[-1] if found_answers else None
    if kind == "latex" or (kind in ("text", "gym") and "\\boxed" not in text):
        return text.strip() or None  # no box or several: the comparison itself looks for the last expression
    whole = text.strip()
    if "\\boxed" not in whole and _DENIED.search(whole):
        return None
    if "\\boxed" in whole or _is_prose(whole) or not reading.readable(whole):
        return extract(text, "flexible")
    return whole


def grade(problem: Problem, answer: str, *, unsafe: bool = False, loose: bool = False) -> Verdict:
    """Whether a bare ``answer`` is right; ``loose``: it is a text in which an answer has to be found."""
    kind = problem.kind
    if kind == "code":
        result = run_answer(problem, answer, unsafe=unsafe)
        return Verdict(result.passed, "code", result.failure)
    if len(answer) > LONGEST:
        return Verdict(False, failure="too long")
    if kind == "choice":
        return _grade_choice(problem, answer)
    if kind == "gym":
        outcome = shared_pool().gym_mark(problem.meta["task"], problem.meta["entry"], answer, unsafe=unsafe)
        return Verdict(outcome.same, "gym", outcome.failure)
    if kind == "text":
        shown, gold = (plain_text(plain_latex(text)) for text in (answer, problem.answer))
        return Verdict(shown == gold != "" or same_amount(answer, problem.answer), "text")
    return _grade_formula(problem, answer, loose=loose)


def _grade_formula(problem: Problem, answer: str, *, loose: bool) -> Verdict:
    """By normal forms, which decide nearly everything, and by math-verify where they do not.

    Args:
        loose: ``answer`` is a whole text; math-verify looks for the last expression in it.
    """
    exactly = plain_latex(answer) == plain_latex(problem.answer) != ""
    if exactly or (problem.kind == "numeric" and plain_text(answer) == plain_text(problem.answer) != ""):
        return Verdict(True, "text")
    options: dict[str, Any] = {
        name: problem.meta[name] for name in ("decimals", "set_relations") if name in problem.meta
    }
    if not options:
        decided = _by_form(problem, answer)
        if decided is not None and not (loose and not decided.right and _is_prose(answer)):
            return decided
    if loose:
        askable = _SENTENCE.search(answer) is not None and not _DENIED.search(answer)
    else:
        askable = _may_ask(problem.answer, answer) or len(problem.answer) > 100  # gold is a whole solution
    if not options and not (askable and _KNOWN.fullmatch(problem.answer)):
        return Verdict(False, "text")
    return _by_algebra(problem.answer, answer, options, whole=loose or bool(options))


def _is_prose(text: str) -> bool:
    """Two words in a row, a formula among words, a decimal comma."""
    return _PROSE.search(text) is not None


def _may_ask(gold: str, answer: str) -> bool:
    """Whether math-verify may compare two bare answers: formulas with the same relations in them."""
    if not _FORMULA.fullmatch(answer) or _VAGUE.search(gold + answer):
        return False
    signs = [sorted(_SIGN.findall(text)) for text in (gold, answer)]
    return signs[0] == signs[1] and not ("," in answer and signs[0])


def _by_algebra(gold: str, answer: str, options: dict[str, Any], *, whole: bool) -> Verdict:
    """By math-verify. It rounds to six decimals, so that two small numbers are the same to it; of two
    formulas it has to find their quotient to be 1 as well."""
    outcome = shared_pool().same(as_latex(gold), as_latex(answer), **options)
    if outcome.same and not whole and not re.search(r"[,=<>]|\\(?:le|ge|in|begin)", gold + answer):
        zero = parse_number(gold) == 0
        quotient = f"$10^{{30}}({answer})$" if zero else f"$\\frac{{{gold}}}{{{answer}}}$"
        outcome = shared_pool().same("$0$" if zero else "$1$", quotient.replace("$$", "$"))
    return Verdict(outcome.same, "symbolic", outcome.failure)


def _by_form(problem: Problem, answer: str) -> Verdict | None:
    """The verdict where both answers have a normal form; None: algebra has to tell."""
    try:
        gold = _gold_form(problem.answer)
    except (NoValueError, UnreadableError, TooHardError):
        return None
    try:
        given = reading.read(answer)
    except NoValueError:
        return Verdict(False, "number")
    except UnreadableError as error:
        return Verdict(False, "text") if error.prose else None
    except TooHardError:
        return None
    right = forms.same(gold, given, problem.meta.get("tolerance", 0.0))
    scale = units.MAGNITUDES.get(problem.meta.get("scale", ""))
    if right is False and scale and isinstance(given, forms.Amount):  # the question asks for millions
        return _by_form(replace(problem, answer=f"{problem.answer} {problem.meta['scale']}", meta={}), answer)
    return None if right is None else Verdict(right, "number")


@lru_cache(maxsize=10_000)
def _gold_form(text: str) -> forms.Form:
    """Of a gold answer that is a solution, its boxes are read."""
    boxes = boxed(text)
    return reading.read(", ".join(boxes) if boxes else text)


def _grade_choice(problem: Problem, answer: str) -> Verdict:
    """The letter, or the words of the right option.

    Raises:
        UserError: the gold answer is no letter.
    """
    if not re.fullmatch("[A-J]", problem.answer):
        raise UserError(
            f"the gold answer {problem.answer!r}", "that of a choice must be a letter from A to J"
        )
    options = [plain_latex(option) for option in problem.meta.get("options", [])]
    place, shown = ord(problem.answer) - 65, plain_latex(answer)
    chosen = _CHOSEN.fullmatch(shown)
    if shown in options and not (len(shown) == 1 and chosen):
        return Verdict(place < len(options) and shown == options[place], "choice")
    if not chosen or (chosen[1] and not chosen[3]) or (chosen[5] and not (chosen[3] or chosen[4])):
        return Verdict(False, "choice")
    words = chosen[5] or ""
    said = {words, plain_latex(words), (chosen[4] or "") + words} - {""}
    agrees = place < len(options) and options[place] in said
    other = not agrees and not said.isdisjoint(options)
    several = re.search(r"\b[A-J]\)|\bor\b|^[A-J]\b", words) is not None and not agrees
    return Verdict(chosen[2].upper() == problem.answer and not other and not several, "choice")


def as_latex(answer: str) -> str:
    """Marks a bare LaTeX answer as such; plain numbers and whole sentences stay as they are."""
    marked = any(sign in answer for sign in ("$", "\\boxed", "\\(", "\\["))
    bare_number = re.fullmatch(r"[\d\s.,/%+-]*", answer) is not None
    words = len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", answer))
    plain = "\\" not in answer and "^" not in answer and " " in answer.strip()
    sentence = words > 3 or (words > 0 and plain) or "\n" in answer.strip()
    return answer if marked or sentence or bare_number or parse_number(answer) is not None else f"${answer}$"
