"""A strategy set that grows: one of the lab's nine is withheld, and given back among candidates that must pay to stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsim.policies.strategies import Strategy, StrategySet, load_strategies
from studies.arms import measure_arms, used, write_set
from studies.page import Page, percent, points
from studies.stats import difference
from studies.workbench import Measurement, Training, Workbench, checkpoint

_WITHHELD = ("deliberation", "sub-planning")
DECOY = "second-look"  # says what self-reflection says
_WITHOUT, _LONGER, _GROWN = "without {}", "without {}, trained on", "grown by {}"


def run(bench: Workbench) -> Page:
    page = Page("growth", "A strategy set that grows", bench, issue=8)
    page.text(f"The preset nano is trained with eight of the lab's nine strategies. `rsim strategies grow` then tries two "
              f"candidates: {DECOY}, which has the prompts of self-reflection and can add nothing, and the one that was "
              "withheld. Each is trained for 20 steps, the reasoner frozen, and held against the eight trained as long, on 500 "
              "dev problems.")  # fmt: skip
    grown: dict[str, list[Path]] = {}
    arms: dict[str, list[Measurement]] = {}
    for name in _WITHHELD:
        eight, candidates = _sets(bench.out / "sets", name)
        runs = bench.train([Training("nano", (f"models.strategies={json.dumps(eight)}",), seed) for seed in bench.seeds])
        grown[name] = bench.grow(runs, candidates)
        arms[_WITHOUT.format(name)] = [Measurement(checkpoint(r)) for r in runs]
        arms[_LONGER.format(name)] = [Measurement(checkpoint(folder / "as-it-was")) for folder in grown[name]]
        arms[_GROWN.format(name)] = [Measurement(checkpoint(best_of(folder))) for folder in grown[name]]
    done = measure_arms(bench, arms)
    page.text("On unseen problems:")
    page.arms(done)
    rows = []
    for name in _WITHHELD:
        trials = [trials_of(folder) for folder in grown[name]]
        for number, candidate in enumerate((DECOY, name)):
            mine = [trial[number] for trial in trials]
            assert all(t["strategy"] == candidate for t in mine)
            kept = f"{sum(t['kept'] for t in mine)} of {len(mine)}"
            rows.append([name, candidate, ", ".join(map(gain_text, mine)), ", ".join(percent(t["used"]) for t in mine), kept])
    page.text("The paired tests on dev problems, each seed:")
    page.table(["withheld", "candidate", "gain in points, and its interval", "of all steps", "kept"], rows)
    for name in _WITHHELD:
        found, before = done[_GROWN.format(name)], done[_LONGER.format(name)]
        gain = difference(found, before)
        page.text(f"{name}: {points(gain)} points over the eight trained as long; {percent(used(found, name))} of all steps.")
        page.measured(f"the set grown by {name}, minus the set without it, trained as long", gain,
                      goal="at least 3 points", met=gain.mean >= 0.03)  # fmt: skip
    for row in rows:
        page.value(f"{row[0]} withheld: {row[1]} kept, seeds", int(row[4].split()[0]), unit="seeds",
                   goal="none" if row[1] == DECOY else "all",
                   met=int(row[4].split()[0]) == (0 if row[1] == DECOY else len(bench.seeds)))  # fmt: skip
    return page


def _sets(folder: Path, withheld: str) -> tuple[str, str]:
    """The files of the eight and of the candidates."""
    nine = load_strategies("lab")
    eight = tuple(s for s in nine.strategies if s.name != withheld)
    candidates = (*eight, decoy_of(nine), nine[nine.index(withheld)])
    return write_set(folder / f"without-{withheld}.toml", eight), write_set(folder / f"candidates-{withheld}.toml", candidates)


def decoy_of(strategies: StrategySet) -> Strategy:
    """A candidate that can add nothing: self-reflection by another name."""
    return replace(strategies[strategies.index("self-reflection")], name=DECOY)


def best_of(folder: Path) -> Path:
    """The run of the last candidate that `grow` kept, or of the set as it was."""
    kept = [number for number, trial in enumerate(trials_of(folder), 1) if trial["kept"]]
    return folder / (f"trial-{kept[-1]}" if kept else "as-it-was")


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """What came of each candidate, as `discovery.grow` wrote it."""
    found: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
    return found


def gain_text(trial: dict[str, Any]) -> str:
    """In points, with its interval."""
    result = trial["result"]
    return f"{100 * result['difference']:+.1f} [{100 * result['low']:+.1f}, {100 * result['high']:+.1f}]"


LIMITS = """The candidate that helps was withheld before: the reasoner's base knows that kind of step from its pre-training, and
its wording too. A strategy that the base has never seen would have to be learned by the reasoner. Failures were not clustered
and no LLM wrote the candidates here: what is shown is the trial, not the proposal."""
