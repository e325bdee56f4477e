"""What there is to gain: each arm alone, the best of them, any of them, and what their agreement is worth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rsim.collecting.log import Log
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record, bootstrap_interval, canonical


@dataclass(frozen=True)
class Row:
    """An arm, or a rule over arms, on some questions: accuracy (strict) with its 95% interval, tokens (sampled and injected)
    a question, and the share that was cut off."""

    name: str
    questions: int
    accuracy: float
    low: float
    high: float
    tokens: float
    cut: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two arms: on how many questions they give the same answer, how many of these are right, and either of them is right."""

    first: str
    second: str
    questions: int
    agree: int
    right_then: int
    either: int


@dataclass(frozen=True)
class Headroom:
    """One data set's arms, in the log's order. ``rules``: the best arm, any arm right (an oracle, at the tokens of the cheapest
    right one), and cascades."""

    name: str
    arms: list[Row]
    rules: list[Row]
    pairs: list[Pair]


Table = dict[str, dict[str, Record]]  # by question and arm


def headroom(records: list[Record], cascades: list[tuple[str, str]] | None = None) -> list[Headroom]:
    """By data set and split, over the questions that every arm has played; with several sets also over all of them.

    Raises:
        UserError: there is no such question.
    """
    sets: dict[str, Table] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        name = f"{record['data']} {record['split']}"
        sets[name][f"{name} {record['id']}"][record["arm"]] = record
    names = list(dict.fromkeys(record["arm"] for record in records))
    for name, table in sets.items():
        sets[name] = {question: arms for question, arms in table.items() if len(arms) == len(names)}
        if not sets[name]:
            raise UserError(f"{name}: no question that all arms have played", "collect more, or report logs with the same arms")
    found = [_one(name, table, names, cascades or []) for name, table in sets.items()]
    if len(found) < 2:
        return found
    everything: Table = {question: arms for table in sets.values() for question, arms in table.items()}
    total = _one("all sets", everything, names, cascades or [])
    chosen = [arms[_best(one.arms).name] for one, table in zip(found, sets.values(), strict=True) for arms in table.values()]
    total.rules.append(_row("best arm of each set", chosen))
    return [*found, total]


def of_logs(logs: list[Log]) -> list[Headroom]:
    """`headroom` of what logs hold, with the cascades that they name."""
    cascades = [tuple(pair) for log in logs for pair in log.header.get("cascades", [])]
    records = [record for log in logs for record in [*log.records(), *log.unfinished]]
    return headroom(records, list(dict.fromkeys(cascades)))


def _one(name: str, table: Table, names: list[str], cascades: list[tuple[str, str]]) -> Headroom:
    arms = [_row(arm, [played[arm] for played in table.values()]) for arm in names]
    best = _best(arms)
    right = [min(played.values(), key=lambda record: (not record["right"], _tokens(record))) for played in table.values()]
    rules = [_row(f"best arm: {best.name}", [played[best.name] for played in table.values()]), _row("any arm right", right)]
    for first, second in cascades:
        if {first, second} <= set(names):
            rules.append(_row(f"cascade: {first}, {second}", [fall(p[first], p[second]) for p in table.values()]))
    return Headroom(name, arms, rules, [_pair(first, second, table) for first, second in combinations(names, 2)])


def _best(arms: list[Row]) -> Row:
    """The most accurate; of equals the cheapest."""
    return max(arms, key=lambda row: (row.accuracy, -row.tokens))


def fall(first: Record, second: Record) -> Record:
    """The first arm's answer, or, where it has none or its program failed, the second's at the tokens of both."""
    holds = first["answer"] is not None and first.get("ran", True)
    return first if holds else second | {"injected": second["injected"] + _tokens(first)}


def _row(name: str, records: list[Record]) -> Row:
    right = [record["right"] for record in records]
    low, high = bootstrap_interval(right)
    cut = float(np.mean(["truncated" in record["flags"] for record in records]))
    return Row(name, len(records), float(np.mean(right)), low, high, float(np.mean([_tokens(r) for r in records])), cut)


def _pair(first: str, second: str, table: Table) -> Pair:
    both = [(arms[first], arms[second]) for arms in table.values()]
    same = [a for a, b in both if a["answer"] is not None and canonical(a["answer"]) == canonical(b["answer"])]
    either = sum(a["right"] or b["right"] for a, b in both)
    return Pair(first, second, len(both), len(same), sum(record["right"] for record in same), either)


def _tokens(record: Record) -> int:
    return int(record["sampled"] + record["injected"])


def as_text(found: list[Headroom]) -> str:
    """The tables for people."""
    lines = []
    for one in found:
        lines += [f"{one.name}, {one.arms[0].questions} questions", f"  {'arm':<34} right  95%             tokens    cut"]
        for row in [*one.arms, *one.rules]:
            lines.append(
                f"  {row.name:<34} {row.accuracy:6.1%} [{row.low:6.1%}, {row.high:6.1%}] {row.tokens:6.0f} {row.cut:6.1%}"
            )
        lines.append(f"  {'two arms':<34} agree  right then       either right")
        for p in one.pairs:
            pair = f"{p.first}, {p.second}"
            right = f"{p.right_then / p.agree:6.1%} ({p.right_then}/{p.agree})" if p.agree else "     -"
            lines.append(f"  {pair:<34} {p.agree / p.questions:6.1%} {right:<16} {p.either / p.questions:6.1%}")
    return "\n".join(lines)
