"""What a log knows of each question: a tree whose branches are strategies and whose leaves are outcomes.

Greedy arms are deterministic, so arms that begin with the same strategies share a state: after *computation* the log may know
both what stopping gives and what another check gives. A planner that chooses among the branches plays what some arm played,
and its outcome is read off the log, without a model of what would have happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from rsim.collecting.log import Log
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record
from rsim.rules import FENCE

Step = tuple[str, str]  # a strategy's name and what was written in its step


@dataclass(frozen=True)
class Outcome:
    """The end of an arm: whether its answer is right (strict), and its tokens (sampled and injected)."""

    arm: str
    right: bool
    tokens: int


@dataclass
class Node:
    """A state at which strategies were tried: the steps that led to it, and what each strategy leads to."""

    steps: tuple[Step, ...] = ()
    branches: dict[str, Node | Outcome] = field(default_factory=dict)

    def walk(self) -> Iterator[Node]:
        """This node and those behind it, the deepest first."""
        for branch in self.branches.values():
            if isinstance(branch, Node):
                yield from branch.walk()
        yield self


@dataclass(frozen=True)
class Tree:
    """One question. ``outcomes``: every arm's, by name."""

    data: str
    id: str
    root: Node
    outcomes: dict[str, Outcome]


def trees(log: Log) -> list[Tree]:
    """The questions that every arm of the log has played, in the log's order.

    One planner acts behind one system prompt: arms that have another than the first arm's are left out.

    Raises:
        UserError: the log has no such question, or the text of a step that a planner must have read is not there.
    """
    arms, texts = game_arms(log), log.texts()
    played: dict[tuple[str, str], dict[str, Record]] = {}
    for record in log.records():
        if record["arm"] in arms:
            played.setdefault((record["data"], record["id"]), {})[record["arm"]] = record
    found = [
        _tree(data, name, [(by_arm[arm], arms[arm]) for arm in arms], texts)
        for (data, name), by_arm in played.items()
        if len(by_arm) == len(arms)
    ]
    if not found:
        raise UserError(f"{log.folder}: no question that all arms have played", "collect more")
    return found


def game_arms(log: Log) -> dict[str, list[str]]:
    """The sequences of the greedy arms that are played behind the first arm's system prompt."""
    arms, own = log.header["arms"], log.system_prompt
    return {name: a["sequence"] for name, a in arms.items() if a["system_prompt"] == own and not a.get("temperature")}


def _tree(data: str, name: str, played: list[tuple[Record, list[str]]], texts: dict[tuple[str, str], list[str]]) -> Tree:
    root, outcomes = Node(), {}
    for record, sequence in played:
        outcome = Outcome(record["arm"], record["right"], record["sampled"] + record["injected"])
        outcomes[outcome.arm] = outcome
        _insert(root, _chosen(record, sequence), outcome, partial(_text, record, texts))
    return Tree(data, name, root, outcomes)


def _chosen(record: Record, sequence: list[str]) -> list[str]:
    """The strategies that the arm chose, one a step; a forced end was not chosen."""
    count = int(record["steps"]) - ("forced" in record["flags"])
    chosen = sequence + sequence[-1:] * count
    return chosen[: max(count, 1)]


def _insert(root: Node, path: list[str], outcome: Outcome, text: Callable[[int], str]) -> None:
    """Adds an arm's path. Where a server's rounding let one of two arms end earlier than the other, the first of them holds."""
    node = root
    for depth, strategy in enumerate(path[:-1]):
        branch = node.branches.get(strategy)
        if isinstance(branch, Outcome):
            return
        if branch is None:
            branch = Node((*node.steps, (strategy, text(depth))))
            node.branches[strategy] = branch
        node = branch
    node.branches.setdefault(path[-1], outcome)


def _text(record: Record, texts: dict[tuple[str, str], list[str]], depth: int) -> str:
    """What the planner reads of a step; a step that ends at its program's output is in the pieces too."""
    known = texts.get((record["id"], record["arm"]))
    if known is not None:
        return known[depth]
    if depth > 0 or not record.get("output"):
        remedy = "a planner that chooses again needs texts-*.jsonl beside the pieces: collect the log anew"
        raise UserError(f"the text of step {depth + 1} of {record['arm']} on {record['id']} is not there", remedy)
    opened = str(record["output"]).startswith(FENCE)
    return f"{record['program']}{FENCE}{chr(10) * opened}{record['output']}"
