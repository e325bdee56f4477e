"""How each of the nine kinds of step is written in lab solutions, slips included.

A solution is a walk over `State`. `write_step` is the only place that says what a strategy does: what it is good at, what it
cannot do, and at which stated rate (`Rates`) it goes wrong. No strategy is good everywhere:

=================  ====================================================================================
sub-planning       writes the expression hidden in a worded question; nothing else to do later
prioritization     works out the first bracket
decomposition      works out the first product in parts
deliberation       joins the first two numbers place by place
summarization      joins all numbers at once, in the head; nothing while products are left
continuation       joins the next two terms in the head, brackets and products included
validation         works the last calculation out again and corrects it
self-reflection    reads the question again and adds the part that was overlooked
termination        boxes the value; while there is work left, the running total after one hasty join
decoding           a tenth: writes the digits of a cipher; nothing to do elsewhere
=================  ====================================================================================

A worded question that is worked on without a plan is read hastily: its last part is overlooked at `Rates.misread`.
A cipher that was not decoded cannot be worked on at all: steps leave it as it is, and what is boxed is a guess.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from rsim.lab.expressions import (
    Expression,
    Term,
    careful_pair,
    careful_product,
    careful_sum,
    carryless_product,
    carryless_sum,
    number,
    place_parts,
    render,
    value_of,
)
from rsim.lab.expressions import (
    replace as replace_terms,
)
from rsim.lab.problems import LabProblem, encode


@dataclass(frozen=True)
class Rates:
    """Shares of steps that go wrong in the written solutions; every one is a free choice, recorded with the model."""

    misread: float = 0.7  # a worded question used without a plan: its last part is overlooked
    head_slip: float = 0.3  # a calculation in the head that needs a carry drops it
    bracket_slip: float = 0.5  # a bracket joined in the head is multiplied out for its first number only
    careful_slip: float = 0.04  # a calculation in parts drops a carry at the end
    catch: float = 0.95  # validation and self-reflection notice what is wrong


@dataclass(frozen=True)
class Calculation:
    """The last calculation: where its result stands and how to do it again."""

    index: int
    redo: str
    right: int


@dataclass(frozen=True)
class State:
    problem: LabProblem
    expression: Expression
    read: bool  # the expression has been written down (always true for arithmetic)
    overlooked: bool = False
    last: Calculation | None = None
    done: bool = False

    @property
    def slipped(self) -> bool:
        return self.last is not None and self.expression[self.last.index].b != self.last.right

    @property
    def right(self) -> bool:
        """Nothing has gone wrong so far."""
        return value_of(self.expression) == self.problem.answer


def start(problem: LabProblem) -> State:
    return State(problem, problem.expression, read=not problem.is_worded)


def write_step(state: State, strategy: str, rng: random.Random, rates: Rates) -> tuple[str, State]:
    """The text of one step (without its strategy phrase and delimiter) and the state after it."""
    if state.problem.is_cipher and not state.read:
        return _face_cipher(state, strategy, rng)
    if strategy == "sub-planning" and not state.read:
        state = replace(state, read=True)
        return _so("plan", state.expression), replace(state, last=None)
    if not state.read:
        overlook = rng.random() < rates.misread
        expression = state.expression[:-1] if overlook else state.expression
        state = replace(state, read=True, overlooked=overlook, expression=expression)
    if strategy == "termination":
        return f" \\boxed{{{_final_value(state, rng, rates)}}}", replace(state, done=True)
    if strategy == "validation":
        return _validate(state, rng, rates)
    if strategy == "self-reflection":
        return _reflect(state, rng, rates)
    work = _WORK[strategy](state.expression, rng, rates) if strategy in _WORK else None
    word = WORDS[strategy]
    if work is None:
        return _so(word, state.expression), replace(state, last=None)
    shown, expression, calculation = work
    return _so(f"{word} {shown}", expression), replace(state, expression=expression, last=calculation)


def _face_cipher(state: State, strategy: str, rng: random.Random) -> tuple[str, State]:
    if strategy == "decoding":
        return _so("digits", state.expression), replace(state, read=True)
    if strategy == "termination":
        return f" \\boxed{{{rng.randint(1, 99)}}}", replace(state, done=True)
    return f" {WORDS[strategy]} so {encode(state.expression)}", state


# The word each kind of step opens with; also its evidence keyword.
WORDS = {
    "self-reflection": "back",
    "decomposition": "parts",
    "deliberation": "slowly",
    "validation": "check",
    "summarization": "total",
    "prioritization": "first",
    "sub-planning": "plan",
    "continuation": "next",
    "decoding": "digits",
}

_Work = tuple[str, Expression, Calculation]


def _so(shown: str, expression: Expression) -> str:
    return f" {shown} so {render(expression)}"


def _settle(expression: Expression, index: int, width: int, sign: int, result: int, right: int) -> tuple[int, Expression]:
    """Puts ``result`` in place of ``width`` terms; a slip that would let the sum run below zero is noticed and not made."""
    new = replace_terms(expression, index, width, number(result, sign))
    if result < 0 or any(value_of(new[: i + 1]) < 0 for i in range(len(new))):
        return right, replace_terms(expression, index, width, number(right, sign))
    return result, new


def _decompose(expression: Expression, rng: random.Random, rates: Rates) -> _Work | None:
    for index, term in enumerate(expression):
        if term.is_product:
            redo, right = careful_product(term.factor, term.b)
            result = right
            if rng.random() < rates.careful_slip and redo.count("=") == 2:
                tens, ones = map(int, redo.split("=")[1].split("+"))
                result = carryless_sum(tens, 1, ones)
            result, new = _settle(expression, index, 1, term.sign, result, right)
            return _with_result(redo, result), new, Calculation(index, redo, right)
    return None


def _deliberate(expression: Expression, rng: random.Random, rates: Rates) -> _Work | None:
    if len(expression) < 2 or not (expression[0].is_number and expression[1].is_number):
        return None
    left, right = expression[0].b, expression[1]
    redo, correct = careful_sum(left, right.sign, right.b)
    if correct < 0:  # an earlier slip left too little to take from: nothing sensible to write
        return None
    result = correct
    if rng.random() < rates.careful_slip:
        last_part = place_parts(right.b)[-1]
        result = carryless_sum(correct - right.sign * last_part, right.sign, last_part)
    result, new = _settle(expression, 0, 2, 1, result, correct)
    return _with_result(redo, result), new, Calculation(0, redo, correct)


def _with_result(calculation: str, result: int) -> str:
    return f"{calculation.rpartition('=')[0]}={result}"


def _prioritize(expression: Expression, rng: random.Random, rates: Rates) -> _Work | None:
    for index, term in enumerate(expression):
        if term.is_bracket:
            inner = term.b + term.c
            new = replace_terms(expression, index, 1, Term(term.sign, inner, term.factor))
            redo, _ = careful_sum(term.b, 1 if term.c > 0 else -1, abs(term.c))
            return redo, new, Calculation(index, redo, inner)
    return None


def _summarize(expression: Expression, rng: random.Random, rates: Rates) -> _Work | None:
    if len(expression) < 2 or not all(term.is_number for term in expression):
        return None
    if any(value_of(expression[: i + 1]) < 0 for i in range(len(expression))):
        return None
    correct = value_of(expression)
    hasty = _hasty_total(expression) if rng.random() < rates.head_slip else correct
    result, new = _settle(expression, 0, len(expression), 1, hasty, correct)
    redo = ";".join(_chain(expression))
    return f"{render(expression)}={result}", new, Calculation(0, redo, correct)


def _continue(expression: Expression, rng: random.Random, rates: Rates) -> _Work | None:
    if len(expression) == 1:
        term = expression[0]
        if term.is_number:
            return None
        result = _hasty_value(term, rng, rates)
        redo, correct = careful_product(term.factor, term.b + term.c)
        return f"{term.body()}={result}", (number(result),), Calculation(0, redo, correct)
    left, right = expression[:2]
    redo, correct = careful_pair(left, right)
    if correct < 0:
        return None
    left_value, right_value = _hasty_value(left, rng, rates), _hasty_value(right, rng, rates)
    slip = rng.random() < rates.head_slip
    result = carryless_sum(left_value, right.sign, right_value) if slip else left_value + right.sign * right_value
    result, new = _settle(expression, 0, 2, 1, result, correct)
    return f"{render((left, right))}={result}", new, Calculation(0, redo, correct)


_WORK = {
    "decomposition": _decompose,
    "deliberation": _deliberate,
    "prioritization": _prioritize,
    "summarization": _summarize,
    "continuation": _continue,
}


def _validate(state: State, rng: random.Random, rates: Rates) -> tuple[str, State]:
    last = state.last
    if last is None:
        return _so("check ok", state.expression), state
    if state.slipped and rng.random() < rates.catch:
        term = state.expression[last.index]
        expression = replace_terms(state.expression, last.index, 1, replace(term, b=last.right))
        return _so(f"check {last.redo} fixed", expression), replace(state, expression=expression, last=None)
    return _so("check ok" if state.slipped else f"check {last.redo} ok", state.expression), replace(state, last=None)


def _reflect(state: State, rng: random.Random, rates: Rates) -> tuple[str, State]:
    if state.overlooked and rng.random() < rates.catch:
        missing = state.problem.expression[-1]
        expression = (*state.expression, missing)
        shown = f"back {'+' if missing.sign > 0 else '-'}{missing.body()} missing"
        return _so(shown, expression), replace(state, expression=expression, overlooked=False, last=None)
    return _so("back ok", state.expression), replace(state, last=None)


def _final_value(state: State, rng: random.Random, rates: Rates) -> int:
    """The value that is boxed: the number that is left, or the running total after one last hasty join."""
    work = _continue(state.expression, rng, rates)
    first = (work[1] if work else state.expression)[0]
    return first.b if first.is_number else _hasty_value(first, rng, rates)


def _hasty_value(term: Term, rng: random.Random, rates: Rates) -> int:
    """The size of one term, worked out in the head."""
    if term.is_bracket and rng.random() < rates.bracket_slip:
        return max(term.factor * term.b + term.c, 1)
    if term.is_product and rng.random() < rates.head_slip:
        return carryless_product(term.factor, term.b)
    return term.factor * (term.b + term.c)


def _hasty_total(expression: Expression) -> int:
    total = expression[0].b
    for term in expression[1:]:
        total = carryless_sum(total, term.sign, term.b)
    return total


def _chain(expression: Expression) -> list[str]:
    texts, total = [], expression[0].b
    for term in expression[1:]:
        text, total = careful_sum(total, term.sign, term.b)
        texts.append(text)
    return texts
