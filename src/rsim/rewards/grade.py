"""One checker for every kind of answer: reads it strictly and flexibly, compares it with gold, and says why
when it gave up.

*strict* wants the answer in exactly one ``\\boxed{...}`` (code: in exactly one code block); *flexible* takes
the last answer that can be found. Comparison goes from cheap to dear: normalised text, exact numbers, and
only then symbolic algebra, in a worker process. Model-written code runs in a sandbox. Whatever fails counts
as wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rsim.answers.extract import (
    Mode,
    boxed,
    close_numbers,
    extract,
    parse_number,
    plain_latex,
    plain_text,
    same_amount,
)
from rsim.errors import UserError
from rsim.game.problem import Kind, Problem
from rsim.rewards.sandbox import run_tests
from rsim.rewards.symbolic import LONGEST, shared_pool

_BLOCK = re.compile(r"^```(?:python|py)?[^\S\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z'])")
_NAMED_LETTER = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?:?\s*\(?([A-J])\b")


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
    return answer, grade(problem, answer, unsafe=unsafe)


def read_answer(text: str, mode: Mode, kind: Kind) -> str | None:
    """The answer that ``text`` gives, by the kind of problem; None when there is none."""
    if kind == "code":
        blocks = _BLOCK.findall(text)
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
    return extract(text, "flexible")


def grade(problem: Problem, answer: str, *, unsafe: bool = False) -> Verdict:
    """Whether a bare ``answer`` is right."""
    kind = problem.kind
    if kind == "code":
        prefix, name = problem.meta.get("prefix", ""), problem.meta.get("entry_point")
        program = prefix + answer
        if prefix and name and f"def {name}" in answer:  # the whole function, not its body alone
            program = f"{prefix}    pass\n\n{answer}"
        shadowed = tuple(problem.meta.get("shadowed", ()))
        result = run_tests(program, problem.answer, shadowed=shadowed, unsafe=unsafe)
        return Verdict(result.passed, "code", result.failure)
    if len(answer) > LONGEST:
        return Verdict(False, failure="too long")
    if kind == "choice":
        return _grade_choice(problem, answer)
    if kind == "gym":
        outcome = shared_pool().gym_mark(problem.meta["task"], problem.meta["entry"], answer, unsafe=unsafe)
        return Verdict(outcome.same, "gym", outcome.failure)
    if plain_text(answer) == plain_text(problem.answer) != "":
        return Verdict(True, "text")
    if kind == "text":
        return Verdict(same_amount(answer, problem.answer), "text")
    gold, given = parse_number(problem.answer), parse_number(answer)
    if gold is not None and (given is not None or kind == "numeric"):
        tolerance = problem.meta.get("tolerance", 0.0)
        return Verdict(
            given is not None and close_numbers(given, gold, answer, problem.answer, tolerance), "number"
        )
    if plain_latex(answer) == plain_latex(problem.answer) != "":
        return Verdict(True, "text")
    options = {name: problem.meta[name] for name in ("decimals", "set_relations") if name in problem.meta}
    outcome = shared_pool().same(as_latex(problem.answer), as_latex(answer), **options)
    return Verdict(outcome.same, "symbolic", outcome.failure)


def _grade_choice(problem: Problem, answer: str) -> Verdict:
    """The letter, or the words of the right option.

    Raises:
        UserError: the gold answer is no letter.
    """
    if not re.fullmatch("[A-J]", problem.answer):
        raise UserError(
            f"the gold answer {problem.answer!r}", "that of a choice must be a letter from A to J"
        )
    letter = _LETTER.fullmatch(plain_latex(answer).upper())
    if letter:
        return Verdict(letter[1] == problem.answer, "choice")
    options = problem.meta.get("options", [])
    place = ord(problem.answer) - 65
    right = place < len(options) and plain_latex(answer) == plain_latex(options[place]) != ""
    return Verdict(right, "choice")


def as_latex(answer: str) -> str:
    """Marks a bare LaTeX answer as such; plain numbers and whole sentences stay as they are."""
    marked = any(sign in answer for sign in ("$", "\\boxed", "\\(", "\\["))
    bare_number = re.fullmatch(r"[\d\s.,/%+-]*", answer) is not None
    words = len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", answer))
    plain = "\\" not in answer and "^" not in answer and " " in answer.strip()
    sentence = words > 3 or (words > 0 and plain) or "\n" in answer.strip()
    return answer if marked or sentence or bare_number or parse_number(answer) is not None else f"${answer}$"
