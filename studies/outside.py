"""A task that the nine strategies cannot solve, and a set that grows: a tenth strategy that pays stays, a decoy does not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsim.lab.problems import FAMILIES, OUTSIDE
from rsim.policies.strategies import load_strategies
from studies.arms import Arms, alone, measure_arms, used, write_set
from studies.page import Page, percent, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint, episodes

ISSUE = 8
LIMITS = """The tenth kind of step was in the base's pre-training, wording and all, as the nine are: a grown planner can call
for what its reasoner knows, and cannot teach it anything. The candidate was written by hand; that an LLM would write it is not
shown. Without decoding nothing works on a cipher at all, which is harsher than tasks are where the nine help little."""

_DECOY, _NEW = "second-look", "decoding"  # the decoy says what self-reflection says
_BASE, _SIX = "nano-x", f"lab:{'+'.join((*FAMILIES, *OUTSIDE))}"
_NINE, _LONGER, _GROWN, _ORACLE = "the nine", "the nine, trained on", "the grown set", "oracle with ten"
_ASKED = {"five": "lab", "cipher": "lab:cipher"}
_TASK = f"""The base {_BASE} knows ten kinds of step: the lab's nine, and decoding, which writes the digits of a cipher
(`e*bh-di=?` is `4*17-38=?`); no other step can work on one. The preset nano is trained with the nine on six families, the
lab's five and cipher (13% of the questions). `rsim strategies grow` then tries two candidates: {_DECOY}, which has the prompts
of self-reflection, and {_NEW}. Each is trained for 20 steps, the reasoner frozen, and held against the nine trained as long, on
500 dev problems of all six."""


def run(bench: Workbench, page: Page) -> None:
    """Trains with the nine, lets the set grow, and measures both on the five families and on the cipher."""
    bench.base(_BASE)
    page.text(_TASK)
    models = (f'models.reasoner="{_BASE}"', f'models.planner="{_BASE}"')
    changes = (*models, f'data.train="{_SIX}"', f'data.eval="{_SIX}"')
    runs = bench.train([Training("nano", changes, seed) for seed in bench.seeds])
    grown = bench.grow(runs, _candidates(bench.out / "sets" / "candidates-outside.toml"))
    arms: dict[str, list[Measurement]] = {}
    for where, data in _ASKED.items():
        arms[f"CoT, {where}"] = [alone(_BASE, data)]
        arms[f"{_NINE}, {where}"] = [Measurement(checkpoint(r), data=data) for r in runs]
        arms[f"{_LONGER}, {where}"] = [Measurement(checkpoint(g / "as-it-was"), data=data) for g in grown]
        arms[f"{_GROWN}, {where}"] = [Measurement(checkpoint(_best_of(g)), data=data) for g in grown]
        arms[f"{_ORACLE}, {where}"] = [_oracle(r, data) for r in runs]
    done = measure_arms(bench, arms)
    page.text("On unseen problems (five: the lab's five families):")
    page.arms(done)
    names = ("CoT", _NINE, _LONGER, _GROWN, _ORACLE)
    groups = {where: {name: done[f"{name}, {where}"] for name in names} for where in _ASKED}
    page.bars("Accuracy on unseen problems of the five families and in cipher.", groups)
    _first_strategies(page, done)
    _trials(page, grown)
    lost = estimate(done[f"{_NINE}, cipher"]).mean - estimate(done[f"{_NINE}, five"]).mean
    page.value("the nine: cipher minus the five families", lost, "share")
    for where, goal, least in (("five", "no loss over 1 point", -0.01), ("cipher", "at least 3 points", 0.03)):
        lead = difference(done[f"{_GROWN}, {where}"], done[f"{_LONGER}, {where}"])
        share = percent(used(done[f"{_GROWN}, {where}"], _NEW))
        page.text(
            f"{where}: the grown set minus the nine trained as long, {points(lead)} points; {_NEW} is {share} of its steps."
        )
        page.measured(f"{where}: the grown set minus the nine, trained as long", lead, goal, met=lead.mean >= least)


def _candidates(file: Path) -> str:
    """The file of the nine and two candidates: self-reflection by another name, which can add nothing, and the new one."""
    ten = load_strategies("lab-ten")
    decoy = replace(ten[ten.index("self-reflection")], name=_DECOY)
    return write_set(file, (*load_strategies("lab").strategies, decoy, ten[ten.index(_NEW)]))


def _oracle(run: Path, data: str) -> Measurement:
    return Measurement("nano", "oracle", checkpoint(run, "reasoner"), data, changes=('models.strategies="lab-ten"',))


def _best_of(folder: Path) -> Path:
    """The run of the last candidate that `grow` kept, or of the set as it was."""
    kept = [number for number, trial in enumerate(_trials_of(folder), 1) if trial["kept"]]
    return folder / (f"trial-{kept[-1]}" if kept else "as-it-was")


def _trials_of(folder: Path) -> list[dict[str, Any]]:
    """What came of each candidate, as `discovery.grow` wrote it."""
    found: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
    return found


def _first_strategies(page: Page, done: Arms) -> None:
    tried = Counter(e["strategies"][0] for m in done[f"{_GROWN}, cipher"] for e in episodes(m.folder) if e["strategies"])
    most = ", ".join(f"{name} {percent(n / tried.total())}" for name, n in tried.most_common(3))
    page.text(f"First strategies of the grown set's planner in cipher: {most}.")


def _trials(page: Page, grown: list[Path]) -> None:
    trials, rows = [_trials_of(folder) for folder in grown], []
    for number, name in enumerate((_DECOY, _NEW)):
        mine = [trial[number] for trial in trials]
        assert all(t["strategy"] == name for t in mine)
        kept, wanted = sum(t["kept"] for t in mine), 0 if name == _DECOY else len(mine)
        gains = ", ".join(_gained(**t["result"]) for t in mine)
        rows.append([name, gains, ", ".join(percent(t["used"]) for t in mine), f"{kept} of {len(mine)}"])
        page.value(f"{name} kept, seeds", kept, "seeds", goal="all" if wanted else "none", met=kept == wanted)
    page.text("The paired tests on dev problems of all six, each seed:")
    page.table(["candidate", "gain in points, and its interval", "of all steps", "kept"], rows)


def _gained(difference: float, low: float, high: float, **more: Any) -> str:
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
