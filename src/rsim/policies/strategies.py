"""The strategy set: names, descriptions, injection prompts and evidence keywords, read from TOML.

The nine packaged strategies live in ``sets/``; in ``instruct``, for instruction-tuned models, *continuation* injects
nothing; ``acting`` adds *computation*, a step whose program is run, to these, and ``arms`` the null action and a calculator
to those; ``sentences`` has them in whole sentences, for reasoners that are trained on those, and ``code`` for programs. A
user's file may replace them, or extend them by saying ``extends = "default"`` (or another of these names) at its top; an entry
of the same name then overrides the packaged one.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from rsim.answers.prefix import open_prefix
from rsim.errors import UserError, did_you_mean
from rsim.rules import FENCE, Tool
from rsim.settings import read_toml

TERMINATION = "termination"
_OTHER: dict[str, object] = {"description": "", "repeat_free": False, "unlimited": False, "tool": ""}  # with their defaults

_SETS = Path(__file__).with_name("sets")
_LAB = Path(__file__).parents[1] / "lab"
_PACKAGED = {
    "default": _SETS / "default.toml",
    "instruct": _SETS / "instruct.toml",
    "acting": _SETS / "acting.toml",
    "arms": _SETS / "arms.toml",
    "sentences": _SETS / "sentences.toml",
    "tables": _SETS / "tables.toml",
    "code": _SETS / "code.toml",
    "lab": _LAB / "strategies.toml",
}
_FIELDS = {"name", "description", "prompts", "keywords", "repeat_free", "unlimited", "tool"}


@dataclass(frozen=True)
class Strategy:
    """One action of the planner.

    ``prompts`` are paraphrases of the text injected before the step ("" injects nothing: the reasoner goes on as it would);
    ``keywords`` are the words (matched whole, case ignored) whose presence in the sampled step counts as evidence that
    it was followed; a ``repeat_free`` strategy is left out of the planner's repeat penalty and of the reasoner's ``follow``
    reward. An ``unlimited`` one is the null action: it injects nothing and sets no limits, so that the reasoner goes on as
    it would alone, to the end of its turn. ``tool``: what acts in its step, see `rsim.rules`.
    """

    name: str
    description: str
    prompts: tuple[str, ...]
    keywords: tuple[str, ...]
    repeat_free: bool = False
    unlimited: bool = False
    tool: Tool | None = None

    def shows_evidence(self, step_text: str) -> bool:
        """Whether a step's sampled text shows this strategy (the keyword rule).

        >>> Strategy("validation", "", ("Check:",), ("check", "verify")).shows_evidence("Let me Verify: 2+2=4")
        True
        """
        return any(re.search(rf"(?<!\w){re.escape(k)}(?!\w)", step_text, re.IGNORECASE) for k in self.keywords)


@dataclass(frozen=True)
class StrategySet:
    """An ordered set of strategies; the order is the planner's label order."""

    strategies: tuple[Strategy, ...]

    @classmethod
    def load(cls, source: str | Path = "default") -> StrategySet:
        """See `load_strategies`."""
        return load_strategies(str(source))

    def save(self, path: str | Path) -> None:
        """Writes a file for ``models.strategies``. Raises `UserError` where `load` would not read it back."""
        text = to_toml(self)
        from_table(tomllib.loads(text), Path(path))
        Path(path).write_text(text, encoding="utf-8")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.strategies)

    @property
    def termination(self) -> int:
        """Index of the strategy that asks for the final answer."""
        return self.names.index(TERMINATION)

    @property
    def neutral(self) -> int:
        """Index of what a step without intervention is called in the planner's stream."""
        others = [i for i in range(len(self)) if i != self.termination]
        free = [i for i in others if self.strategies[i].repeat_free]
        return self.names.index("continuation") if "continuation" in self.names else (free or others)[0]

    @property
    def unlimited(self) -> frozenset[int]:
        """Indices of null actions: strategies that leave the reasoner alone, to the end of its turn."""
        return frozenset(i for i, s in enumerate(self.strategies) if s.unlimited)

    @property
    def tools(self) -> dict[int, Tool]:
        """The tools of the strategies that have one, by index."""
        return {i: s.tool for i, s in enumerate(self.strategies) if s.tool}

    def __len__(self) -> int:
        return len(self.strategies)

    def __getitem__(self, index: int) -> Strategy:
        return self.strategies[index]

    def index(self, name: str) -> int:
        if name not in self.names:
            raise UserError(f"unknown strategy {name!r}", did_you_mean(name, self.names))
        return self.names.index(name)


def load_strategies(source: str = "default") -> StrategySet:
    """The strategy set of a packaged name (``default``, ``instruct``, ``acting``, ``arms``, ``sentences``, ``tables``,
    ``code``, ``lab``) or of a TOML file.

    Raises:
        UserError: the file is missing or malformed, a field is unknown, a name is doubled, fewer than one prompt is
            given, a termination prompt holds a parseable box, a tool has no use, or the set has no ``termination``.
    """
    path = _PACKAGED.get(source, Path(source))
    if not path.is_file():
        raise UserError(f"strategy file not found: {source}", f"give a TOML file, or a set: {did_you_mean(source, _PACKAGED)}")
    return from_table(read_toml(path), path)


def from_table(table: dict[str, object], path: Path) -> StrategySet:
    """The set that a TOML table describes; ``path`` is what errors name. Raises as `load_strategies` does."""
    unknown = set(table) - {"extends", "strategy"}
    if unknown:
        raise UserError(f"{path}: unknown key {sorted(unknown)[0]!r}", "only 'extends' and [[strategy]] are known")
    base: tuple[Strategy, ...] = ()
    if "extends" in table:
        if table["extends"] not in tuple(_PACKAGED):
            raise UserError(f"{path}: extends = {table['extends']!r}", f"use one of {', '.join(_PACKAGED)}")
        base = load_strategies(str(table["extends"])).strategies
    entries = table.get("strategy", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: strategy is no list of tables", "write each strategy under [[strategy]]")
    own = [parse_strategy(path, entry) for entry in entries]
    names = [s.name for s in own]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: strategy {name!r} is given twice", "give each name once")
    kept = tuple(next((o for o in own if o.name == b.name), b) for b in base)
    added = tuple(o for o in own if o.name not in {b.name for b in base})
    strategies = StrategySet(kept + added)
    if TERMINATION not in strategies.names:
        raise UserError(f"{path}: no strategy named {TERMINATION!r}", "add one: it asks for the final answer")
    return strategies


def parse_strategy(path: Path, entry: dict[str, object]) -> Strategy:
    """One entry of a set; ``path`` is what errors name. Raises as `load_strategies` does."""
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path}: a [[strategy]] has no name", 'add name = "..."')
    unknown = set(entry) - _FIELDS
    if unknown:
        problem = f"{path}: strategy {name!r} has the unknown field {sorted(unknown)[0]!r}"
        raise UserError(problem, f"known fields: {', '.join(sorted(_FIELDS))}")
    prompts, keywords = entry.get("prompts"), entry.get("keywords", [])
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and (p.strip() or p == "") for p in prompts):
        raise UserError(f"{path}: strategy {name!r} needs prompts", 'add prompts = ["...", "..."]')
    if name.strip() == TERMINATION and "" in prompts:
        raise UserError(f"{path}: {TERMINATION!r} has an empty prompt", "it must ask for the final answer")
    if not isinstance(keywords, list) or not all(isinstance(k, str) and k.strip() for k in keywords):
        raise UserError(f"{path}: strategy {name!r}: keywords must be a list of words", 'e.g. keywords = ["check"]')
    if any(re.search(r"\\boxed\s*\{[^{}]", prompt) for prompt in prompts):
        remedy = "write \\boxed{} empty, or \\boxed{ at the end: else it could be read as an answer"
        raise UserError(f"{path}: a prompt of {name!r} contains a filled \\boxed{{...}}", remedy)
    description, free, unlimited, tool = (entry.get(key, other) for key, other in _OTHER.items())
    if not isinstance(description, str) or not isinstance(free, bool) or not isinstance(unlimited, bool):
        raise UserError(f"{path}: strategy {name!r}: description must be text, repeat_free and unlimited true or false")
    if unlimited and (prompts != [""] or name.strip() == TERMINATION):
        raise UserError(f"{path}: strategy {name!r} is unlimited", 'such a null action injects nothing: prompts = [""]')
    _check_tool(path, name.strip(), prompts, tool, unlimited=unlimited)
    used = cast(Tool, tool) if tool else None
    return Strategy(name.strip(), description, tuple(prompts), tuple(keywords), free, unlimited, used)


def _check_tool(path: Path, name: str, prompts: list[str], tool: object, *, unlimited: bool) -> None:
    """Raises `UserError` for a tool that is not known, or that the strategy could not use."""
    where = f"{path}: strategy {name!r}: tool = {tool!r}"
    if tool not in ("", *get_args(Tool)):
        raise UserError(where, f"use one of {', '.join(get_args(Tool))}, or leave it out")
    if tool and (unlimited or name == TERMINATION):
        raise UserError(where, "neither a null action nor termination can have a tool")
    if tool == "python" and not all(open_prefix(prompt).startswith(FENCE) for prompt in prompts):
        raise UserError(where, "each of its prompts must end in an open code block: ```python and a line break")


def to_toml(strategies: StrategySet) -> str:
    """The set as a file that `load_strategies` reads back."""

    def entry(s: Strategy) -> str:
        fields = {"name": s.name, "description": s.description, "prompts": s.prompts, "keywords": s.keywords}
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
        flags = [f"repeat_free = {str(s.repeat_free).lower()}"] + ["unlimited = true"] * s.unlimited
        flags += [f'tool = "{s.tool}"'] if s.tool else []
        return "\n".join(["[[strategy]]", *lines, *flags])

    return "\n\n".join(entry(s) for s in strategies.strategies) + "\n"
