"""How each of the nine kinds of step is written in lab solutions, slips included.

A solution is a walk over `State`: a total in two columns, and the terms that are left. `write_step` is the only place that
says what a strategy does. What a join leaves behind decides what is needed next, and is seen in the steps alone: ``7:15`` (a
carry), ``7:-4`` (a ten to break), ``?75`` (a digit that is in doubt, and wrong), ``~75`` (the term behind was lost).

=================  =======================================  ======================================================
strategy           what it is good for                      elsewhere
=================  =======================================  ======================================================
sub-planning       writes down the sum hidden in words      nothing
prioritization     works out a bracket                      nothing
continuation       joins the next term, column by column    forgets a carry, a broken ten, half of a bracket
deliberation       settles a carry                          nothing
decomposition      breaks a ten                             breaks a ten that was whole (a carry is left)
validation         corrects a digit that is in doubt        spoils a right digit
self-reflection    puts a lost term back                    puts the last term in once more
summarization      joins all the rest, if it is round       forgets the ones of the rest
termination        boxes the total                          boxes it as it is
=================  =======================================  ======================================================

A worded question that is worked on without a plan loses its last term, unseen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from rsim.lab.problems import LabProblem, Term, Terms


@dataclass(frozen=True)
class Rates:
    """How often the written solutions go wrong by chance; recorded with the model."""

    slip: float = 0.5  # a join without carry or broken ten leaves a doubt or loses a term
    harm: float = 0.6  # a question read without a plan, or a whole total checked, broken or added to, is spoilt


@dataclass(frozen=True)
class State:
    """``tens`` and ``ones`` are the total's columns, settled where ones are 0 to 9; ``joined`` the last term that was joined,
    ``before`` the total it was joined to; ``right`` the digit that is in doubt, as it should be."""

    problem: LabProblem
    tens: int
    ones: int
    rest: Terms
    read: bool
    joined: Term | None = None
    before: int = 0
    right: int | None = None
    lost: Term | None = None
    done: bool = False

    @property
    def carries(self) -> bool:
        return self.ones > 9

    @property
    def borrows(self) -> bool:
        return self.ones < 0

    @property
    def doubted(self) -> bool:
        return self.right is not None

    @property
    def total(self) -> int:
        """As a hasty person reads the columns: a carry is dropped, a digit below zero is taken the other way round."""
        return 10 * self.tens + abs(self.ones) % 10

    def __str__(self) -> str:
        settled = 0 <= self.ones <= 9
        total = str(self.total) if settled else f"{self.tens}:{self.ones}"
        return "?" * self.doubted + "~" * (self.lost is not None) + total + "".join(map(str, self.rest))


def start(problem: LabProblem) -> State:
    tens, ones = divmod(problem.terms[0].b, 10)
    return State(problem, tens, ones, problem.terms[1:], read=not problem.is_worded)


def write_step(state: State, strategy: str, rng: random.Random, rates: Rates) -> tuple[str, State]:
    """The text of one step (without its strategy phrase and delimiter) and the state after it."""
    if strategy == "sub-planning" or state.read:
        state = replace(state, read=True)
    else:
        state = replace(state, read=True, rest=state.rest[:-1] if rng.random() < rates.harm else state.rest)
    if strategy == "termination":
        return f" \\boxed{{{state.total}}}", replace(state, done=True)
    shown, new = _WORK[strategy](state, rng, rates)
    if not 0 <= new.tens <= 9:  # only after something has gone wrong: there is nothing sensible to write
        shown, new = "", state
    return f" {WORDS[strategy]}{shown and ' ' + shown} so {new}", new


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
}

_Work = tuple[str, State]  # what is shown, "" where the step does nothing; and the state after it


def _plan(state: State, rng: random.Random, rates: Rates) -> _Work:
    return "", state


def _prioritize(state: State, rng: random.Random, rates: Rates) -> _Work:
    for i, term in enumerate(state.rest):
        if term.is_bracket:
            whole = Term(term.sign, term.b + term.c)
            return f"{term.body()}={whole.b}", replace(state, rest=(*state.rest[:i], whole, *state.rest[i + 1 :]))
    return "", state


def _continue(state: State, rng: random.Random, rates: Rates) -> _Work:
    if not state.rest:
        return "", state
    term, rest = state.rest[0], state.rest[1:]
    tens, ones = divmod(term.b, 10)
    before = state.total
    new = replace(
        state,
        tens=state.tens + term.sign * tens,
        ones=before % 10 + term.sign * ones,
        rest=rest,
        joined=Term(term.sign, term.b),
        before=before,
        right=None,
    )
    if 0 <= new.ones <= 9 and rng.random() < rates.slip:
        if term.sign < 0 and rest and not rest[0].is_bracket and new.lost is None:
            new = replace(new, lost=rest[0], rest=rest[1:])
        else:
            new = replace(new, ones=_beside(new.ones), right=new.ones)
    return f"{before}{term}", new


def _summarize(state: State, rng: random.Random, rates: Rates) -> _Work:
    if not state.rest:
        return "", state
    tens = state.tens + sum(term.sign * (term.b // 10) for term in state.rest)
    shown = f"{state.total}{''.join(map(str, state.rest))}"
    return shown, replace(state, tens=tens, ones=state.total % 10, rest=(), joined=None, right=None)


def _deliberate(state: State, rng: random.Random, rates: Rates) -> _Work:
    if not state.carries:
        return "", state
    return f"{state.tens}0+{state.ones}", replace(state, tens=state.tens + 1, ones=state.ones - 10)


def _decompose(state: State, rng: random.Random, rates: Rates) -> _Work:
    if state.carries or state.tens == 0 or not (state.borrows or rng.random() < rates.harm):
        return "", state
    return f"{state.tens}0{state.ones:+d}", replace(state, tens=state.tens - 1, ones=state.ones + 10, right=None)


def _validate(state: State, rng: random.Random, rates: Rates) -> _Work:
    if state.joined is None or state.carries or state.borrows or not (state.doubted or rng.random() < rates.harm):
        return "", state
    ones = _beside(state.ones) if state.right is None else state.right
    return f"{state.before}{state.joined}", replace(state, ones=ones, right=None)


def _reflect(state: State, rng: random.Random, rates: Rates) -> _Work:
    term = state.lost or state.joined
    if term is None or not (state.lost or rng.random() < rates.harm):
        return "", state
    return str(term), replace(state, rest=(term, *state.rest), lost=None)


def _beside(digit: int) -> int:
    """The digit that is taken for ``digit`` by mistake."""
    return digit + 1 if digit < 9 else 8


_WORK = {
    "sub-planning": _plan,
    "prioritization": _prioritize,
    "continuation": _continue,
    "summarization": _summarize,
    "deliberation": _deliberate,
    "decomposition": _decompose,
    "validation": _validate,
    "self-reflection": _reflect,
}
