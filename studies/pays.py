"""A planner that was fitted to logs of a frozen LLM, beside what else the same tokens buy.

Cross-fitted on these logs, at several prices of tokens (none is picked); and, where there are logs of test questions,
read off those.

Greedy arms are deterministic, so what a planner, a cascade or a vote gets on a question is known once every arm has played
it. Whatever has to be picked (the price, the best arm, that of each set) is picked on the logs that are fitted to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rsim.collecting.fit import best_arm, blind, flat, null_arm, played, read, standings_of, unfitted
from rsim.collecting.headroom import fall
from rsim.collecting.log import Log
from rsim.collecting.regression import Choices, Mask, cross_fitted, fit
from rsim.collecting.tree import Outcome
from rsim.evaluation.evaluate import Record, canonical
from studies.ledger import Row
from studies.stats import Estimate, crossed

ISSUE = 11
_PRICES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of a thousand tokens, in right answers
_MARGIN, _SET_MARGIN = 0.02, 0.04  # what "not inferior" may lose, over all and on a data set
_ROUTER = "router"  # an arm whose answer is the name of another
_SIZES = (50, 100, 200, 350, 500)  # questions a set, of the learning curve
Key = tuple[str, str]  # data set and question's id
Folders = Annotated[list[str], typer.Option(metavar="LOG", help="repeatable")]
More = Annotated[list[str] | None, typer.Option(metavar="LOG", help="repeatable")]


@dataclass(frozen=True)
class Played:
    """What a policy gets on the test questions: right or not, and tokens (sampled and injected), ``[questions]``."""

    right: np.ndarray
    tokens: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def cost(self) -> float:
        return float(self.tokens.mean())


def run(log: Folders, test: More = None, votes: More = None, planner: str = "smollm2-135m") -> Iterator[Row]:
    """``votes``: logs of sampled arms of the null action on the test questions."""
    fitted, tests = [Log(Path(one)) for one in log], [Log(Path(one)) for one in test or []]
    reader = unfitted(planner, fitted[0])
    free = read(reader, fitted)
    yield from _cross_fitted(free, _by_question(fitted))
    if not tests:
        return
    asked = read(reader, tests)
    keys = [(tree.data, tree.id) for tree in asked.trees]
    if set(keys) & {(tree.data, tree.id) for tree in free.trees}:
        raise ValueError("test questions are among those that are fitted to")
    table, sampled = _by_question(tests), _by_question([Log(Path(one)) for one in votes or []])
    alone = null_arm(asked)
    cot = _arm(asked, alone)
    others = _controls(free, asked, [table[key] for key in keys], alone)
    others |= _votes([[table[key][alone], *sampled.get(key, {}).values()] for key in keys], [table[key] for key in keys], alone)
    yield from _rows("chain of thought", cot, cot)
    for name, arm in others.items():
        yield from _rows(name, arm, cot)
    prices = {"accuracy": 0.0, "economy": _cheapest(free)}
    for setting, price in prices.items():
        yield Row(f"{setting}: price of a thousand tokens, picked on the fitted logs", price, "right answers")
        at = replace(free, price=price)
        ours = _fitted(at, asked)
        yield from _rows(f"{setting}: planner", ours, cot)
        yield from _rows(f"{setting}: question-only planner", _fitted(flat(at), flat(asked)), cot)
        yield from _rows(f"{setting}: blind planner", _fitted(blind(at), blind(asked)), cot)
        gain = _minus(ours, _fitted(flat(at), flat(asked)))
        yield _difference(f"{setting}: planner minus question-only planner", gain)
        if setting == "economy":
            yield _goal("economy: tokens, in those of chain of thought", ours.cost / cot.cost, "at most 0.6x", 0.6)
            yield _harmless("economy: planner minus chain of thought", ours.right - cot.right, [data for data, _ in keys])
        else:
            yield from _accurate(ours, cot, others)
        within = float(np.mean(_of_sets(ours.right - cot.right, [data for data, _ in keys])))
        yield Row(f"{setting}: gain over chain of thought within sets (mean of the sets' gains)", within, "share")
    yield from _without_a_set(free, asked, cot, prices)
    yield from _curve(free, asked, cot)


def _cross_fitted(free: Choices, table: dict[Key, dict[str, Record]]) -> Iterator[Row]:
    """Each question's planner, and whatever a control picks, comes from the other folds' questions."""
    sets = [tree.data for tree in free.trees]
    arms = {name: _played([tree.outcomes[name] for tree in free.trees]) for name in free.trees[0].outcomes}
    cot = arms[null_arm(free)]
    for data, count in Counter(sets).items():
        yield Row(f"cross-fitted: questions of {data}", count)
        own = np.array(sets) == data
        for name, arm in arms.items():
            yield _share(f"{data}, {name}: accuracy", Played(arm.right[own], arm.tokens[own]))
            yield Row(f"{data}, {name}: tokens a question", float(arm.tokens[own].mean()))
    cascades = _cascades([table[tree.data, tree.id] for tree in free.trees], list(arms), null_arm(free))
    for name, arm in (arms | cascades).items():
        yield from _rows(f"cross-fitted, {name}", arm, cot)
        if arm is not cot:
            yield _difference(f"cross-fitted, {name} minus chain of thought", _minus(arm, cot))
    for price in _PRICES[::2]:
        at, where = replace(free, price=price), f"cross-fitted at {price:g} a thousand tokens"
        ours = _played(cross_fitted(at)[0])
        rivals = {
            "best arm of each set": _played(best_arm(at, by_set=True)),
            "question-only planner": _played(cross_fitted(flat(at))[0]),
        }
        for name, policy in {"planner": ours, **rivals}.items():
            yield from _rows(f"{where}: {name}", policy, cot)
        for name, rival in {"chain of thought": cot, **rivals}.items():
            yield _difference(f"{where}: planner minus {name}", _minus(ours, rival))
        within = float(np.mean(_of_sets(ours.right - cot.right, sets)))
        yield Row(f"{where}: gain over chain of thought within sets (mean of the sets' gains)", within, "share")


def _played(ends: list[Outcome]) -> Played:
    return Played(np.array([float(end.right) for end in ends]), np.array([end.tokens for end in ends]))


def _by_question(logs: list[Log]) -> dict[Key, dict[str, Record]]:
    found: dict[Key, dict[str, Record]] = {}
    for log in logs:
        for record in log.records():
            found.setdefault((record["data"], record["id"]), {})[record["arm"]] = record
    return found


def _arm(asked: Choices, name: str) -> Played:
    return _played([tree.outcomes[name] for tree in asked.trees])


def _fitted(choices: Choices, asked: Choices, some: Mask | None = None) -> Played:
    """The planner that is fitted to ``choices`` (to ``some`` of its questions) on the questions of ``asked``."""
    every = np.ones(len(choices.trees), dtype=bool) if some is None else some
    return _played(played(asked, fit(choices, every)))


def _of(records: list[Record]) -> Played:
    tokens = [record["sampled"] + record["injected"] for record in records]
    return Played(np.array([float(record["right"]) for record in records]), np.array(tokens))


def _controls(free: Choices, asked: Choices, table: list[dict[str, Record]], alone: str) -> dict[str, Played]:
    """Arms and rules; those that are picked are picked on ``free``."""
    names = list(asked.trees[0].outcomes)
    worth = {name: np.mean([tree.outcomes[name].right for tree in free.trees]) for name in names}
    best = max(names, key=lambda name: float(worth[name]))
    sets = {tree.data for tree in free.trees}
    of_set = {
        data: max(names, key=lambda n: sum(tree.outcomes[n].right for tree in free.trees if tree.data == data)) for data in sets
    }
    rng = np.random.default_rng(0)
    rules: dict[str, Callable[[int, dict[str, Record]], Record]] = {
        f"best single arm ({best})": lambda i, arms: arms[best],
        "best arm of each set": lambda i, arms: arms[of_set.get(asked.trees[i].data, best)],
        "random arm": lambda i, arms: arms[names[rng.integers(len(names))]],
    }
    if all(_ROUTER in arms for arms in table):
        rules["prompted router"] = lambda i, arms: _routed(arms, names, alone)
    found = {name: _of([rule(i, arms) for i, arms in enumerate(table)]) for name, rule in rules.items()}
    return found | _cascades(table, names, alone)


def _cascades(table: list[dict[str, Record]], names: list[str], alone: str) -> dict[str, Played]:
    """Each program; the null action's arm where it fails."""
    programs = [name for name in names if name != alone and "ran" in table[0][name]]
    return {
        f"cascade ({one}, {alone} where it fails)": _of([fall(arms[one], arms[alone]) for arms in table]) for one in programs
    }


def _routed(arms: dict[str, Record], names: list[str], alone: str) -> Record:
    """The arm that the model itself named when it was asked which one to take, at the cost of asking; none of them: the null
    action."""
    said = arms[_ROUTER]
    named = str(said["answer"] or "").strip().lower()
    picked = arms[named if named in names else alone]
    return picked | {key: picked[key] + said[key] for key in ("sampled", "injected")}


def _votes(samples: list[list[Record]], table: list[dict[str, Record]], alone: str) -> dict[str, Played]:
    """Self-consistency over 2, 3, ... chains of thought, the greedy one first; and chain of thought with a program, a further
    sample deciding where they differ. A tie goes to the answer that came first."""
    most = min(len(votes) for votes in samples)
    found = {f"self-consistency, {n} chains": _of([_vote(votes[:n]) for votes in samples]) for n in range(2, most + 1)}
    program = next((name for name in table[0] if "ran" in table[0][name]), None)
    if program and most > 1:
        both = [[arms[alone], arms[program]] for arms in table]
        votes = [pair if _same(*pair) else [*pair, own[1]] for pair, own in zip(both, samples, strict=True)]
        found["vote of chain of thought, program and a third where they differ"] = _of([_vote(v) for v in votes])
    return found


def _same(a: Record, b: Record) -> bool:
    return a["answer"] is not None and b["answer"] is not None and canonical(a["answer"]) == canonical(b["answer"])


def _vote(votes: list[Record]) -> Record:
    answers = [canonical(v["answer"]) for v in votes if v["answer"] is not None]
    won = Counter(answers).most_common(1)[0][0] if answers else None
    winner = next((v for v in votes if v["answer"] is not None and canonical(v["answer"]) == won), votes[0])
    return winner | {"sampled": sum(v["sampled"] + v["injected"] for v in votes), "injected": 0}


def _cheapest(free: Choices) -> float:
    """The price at which the cross-fitted planner is not inferior and needs the fewest tokens."""
    held = {}
    for price in _PRICES:
        row = next(r for r in reversed(standings_of(replace(free, price=price))[0]) if r.name == "planner")
        if row.low > -_MARGIN:
            held[price] = row.tokens
    return min(held, key=lambda price: held[price]) if held else 0.0


def _accurate(ours: Played, cot: Played, others: dict[str, Played]) -> Iterator[Row]:
    limit = 1.5 * cot.cost
    yield _goal("accuracy: tokens, in those of chain of thought", ours.cost / cot.cost, "at most 1.5x", 1.5)
    lead = _minus(ours, cot)
    met = lead.mean >= 0.06 and lead.low > 0.02
    yield _difference("accuracy: planner minus chain of thought", lead, "at least 6 points, interval above 2", met)
    for kind, least in (("best single arm", 0.03), ("cascade", 0.03), ("vot", 0.0)):
        wanted = {n: arm for n, arm in others.items() if n.startswith(kind) or (kind == "vot" and "vote" in n)}
        wanted |= {n: arm for n, arm in others.items() if kind == "vot" and n.startswith("self-consistency")}
        fair = {n: arm for n, arm in wanted.items() if kind != "vot" or arm.cost <= limit}
        if not fair:
            continue
        best = max(fair, key=lambda name: fair[name].accuracy)
        lead = _minus(ours, fair[best])
        goal = f"at least {100 * least:.0f} points, interval above 0" if least else "interval above 0"
        yield _difference(f"accuracy: planner minus {best}", lead, goal, lead.mean >= least and lead.low > 0)


def _without_a_set(free: Choices, asked: Choices, cot: Played, prices: dict[str, float]) -> Iterator[Row]:
    """Fitted to the other sets, asked on the one that was left out."""
    data = np.array([tree.data for tree in free.trees])
    there = np.array([tree.data for tree in asked.trees])
    for setting, price in prices.items():
        at = replace(free, price=price)
        inside = _fitted(at, asked)
        for left_out in dict.fromkeys(there):
            if len(set(data)) < 2:
                return
            outside, own = _fitted(at, asked, data != left_out), there == left_out
            gain = [float((p.right - cot.right)[own].mean()) for p in (outside, inside)]
            acts = float((outside.tokens != cot.tokens)[own].mean())
            what = f"{setting}, {left_out} left out"
            lost = (outside.right - cot.right)[own]
            yield _harmless(f"{what}: planner minus chain of thought", lost, [left_out] * len(lost))
            yield Row(f"{what}: share of questions at which it acts", acts, "share")
            yield Row(f"{what}: gain, of that with the set among the fitted", _ratio(*gain), "x", "at least 0.5x")


def _ratio(part: float, whole: float) -> float | str:
    return part / whole if whole > 0 else "no gain to keep"


def _curve(free: Choices, asked: Choices, cot: Played) -> Iterator[Row]:
    """The accuracy setting, fitted to the first questions of each set."""
    place: Counter[str] = Counter()
    rank = []
    for tree in free.trees:
        rank.append(place[tree.data])
        place[tree.data] += 1
    for size in [s for s in _SIZES if s <= min(place.values())]:
        lead = _minus(_fitted(free, asked, np.array(rank) < size), cot)
        yield _difference(f"accuracy: fitted to {size} questions a set, minus chain of thought", lead)


def _of_sets(gains: np.ndarray, data: list[str]) -> list[float]:
    """The mean gain of each data set."""
    return [float(gains[np.array(data) == one].mean()) for one in dict.fromkeys(data)]


def _harmless(what: str, gains: np.ndarray, data: list[str]) -> Row:
    """Not inferior: over all, and no data set loses much."""
    lead = crossed(gains[None])
    goal = f"not inferior: interval above {-100 * _MARGIN:.0f} points, no set's estimate below {-100 * _SET_MARGIN:.0f}"
    return _difference(what, lead, goal, lead.low > -_MARGIN and min(_of_sets(gains, data)) >= -_SET_MARGIN)


def _minus(a: Played, b: Played) -> Estimate:
    return crossed((a.right - b.right)[None])


def _rows(name: str, arm: Played, cot: Played) -> Iterator[Row]:
    yield _share(f"{name}: accuracy", arm)
    yield Row(f"{name}: tokens a question, in those of chain of thought", arm.cost / cot.cost, "x", seeds=[0])


def _share(what: str, arm: Played) -> Row:
    e = crossed(arm.right[None])
    return Row(what, e.mean, "share", seeds=[0], interval=[e.low, e.high])


def _difference(what: str, e: Estimate, goal: str = "", met: bool | None = None) -> Row:
    return Row(what, e.mean, "share", goal, met, seeds=[0], interval=[e.low, e.high])


def _goal(what: str, value: float, goal: str, most: float) -> Row:
    return Row(what, value, "x", goal, value <= most, seeds=[0])
