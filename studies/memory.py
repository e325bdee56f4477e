"""Peak memory of a GRPO step against the tokens of an episode: rsim, rsim with gradient checkpointing, TRL in its two modes.

Each measurement is a process of its own (`studies.step`), loading and optimiser states included. Of rsim's two modes: what
``rsim plan`` foretells of the memory, and what checkpointing costs in time (medians of steps). ``--long``: besides, a step of
planner and reasoner, both of the model, with four episodes of so many tokens and checkpointing (half an hour at 4,096).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from rsim.config import Config
from rsim.policies.loading import load_reasoner
from rsim.training.cost import plan, this_machine
from studies.ledger import Row
from studies.step import step_config
from studies.workload import in_child
from studies.workload import questions as made_up

ISSUE = 3
_GIB = 2**30
_SIDES: dict[str, dict[str, Any]] = {
    "rsim": {"side": "rsim"},
    "rsim, gradient checkpointing": {"side": "rsim", "checkpointing": True},
    "TRL": {"side": "trl"},
    "TRL, gradient checkpointing": {"side": "trl", "checkpointing": True},
}


def run(
    model: str = "smollm2-135m",
    questions: int = 2,
    group: int = 8,
    tokens: tuple[int, int] = (64, 256),
    rounds: int = 3,
    trl: bool = True,
    long: int = 0,
) -> Iterator[Row]:
    asked = statistics.mean(len(load_reasoner(model, weights=False).prompt_ids(q)) for q in made_up(20))
    for length in tokens:
        common = {"model": model, "count": questions, "group": group, "tokens": length}
        seconds: dict[str, list[float]] = {}
        for name, settings in _SIDES.items():
            if trl or settings["side"] == "rsim":
                found = in_child("studies.step", settings | common)
                yield Row(f"peak memory of a step, {length} tokens an episode: {name}", round(found["peak"], 2), "GiB")
                seconds[name] = [statistics.median(found["seconds"])]
            if settings["side"] == "rsim":
                checkpointing = settings.get("checkpointing", False)
                yield _foretold(f"{length} tokens an episode: {name}", found, common, round(asked), checkpointing)
        plain, checkpointed = (seconds[name] for name in list(_SIDES)[:2])
        for _ in range(rounds - 1):  # in turn
            for kept, name in ((plain, "rsim"), (checkpointed, "rsim, gradient checkpointing")):
                kept.append(statistics.median(in_child("studies.step", _SIDES[name] | common)["seconds"]))
        slower = statistics.median(b / a for a, b in zip(plain, checkpointed, strict=True))
        what = f"gradient checkpointing: time of a step, {length} tokens an episode"
        yield Row(what, round(slower, 2), "x", "at most 1.25", slower <= 1.25)
    if long:
        common = {"model": model, "count": 1, "group": 4, "tokens": long, "pair": True}
        found = in_child("studies.step", {"side": "rsim", "steps": 1, "checkpointing": True} | common)
        what = f"a pair's step, 4 episodes of {long} tokens, gradient checkpointing"
        yield Row(f"peak memory of {what}", round(found["peak"], 2), "GiB", "below 24 GiB", found["peak"] < 24)
        yield Row(f"sampled tokens of an episode of {what}", round(found["tokens"]))
        yield Row(f"seconds of {what}", round(found["seconds"][0]), "s")
        yield _foretold(what, found, common, round(asked), True)


def _foretold(what: str, found: dict[str, Any], common: dict[str, Any], question: int, checkpointing: bool) -> Row:
    """`rsim plan`'s memory against what was measured."""
    config: Config = step_config("", **common, checkpointing=checkpointing)
    cost = plan(config, this_machine(config), 1, tokens=common["tokens"], question=question)
    share = cost.memory / _GIB / found["peak"]
    return Row(f"memory foretold over measured: {what}", round(share, 2), goal="within 15%", met=0.85 <= share <= 1.15)
