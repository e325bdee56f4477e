"""Tasks that the nine strategies cannot solve, and what a tenth that pays brings."""

from __future__ import annotations

from collections import Counter

from rsim.discovery.failures import failures
from rsim.experiments.arms import alone, measure_arms, used, write_set
from rsim.experiments.growth import DECOY, best_of, decoy_of, gain_text, trials_of
from rsim.experiments.page import Page, bars, percent, points
from rsim.experiments.stats import difference, estimate
from rsim.experiments.workbench import Measurement, Training, Workbench, checkpoint, episodes
from rsim.lab.problems import FAMILIES, OUTSIDE
from rsim.strategies import load_strategies

_BASE, _NEW, _FAMILY = "nano-x", "decoding", "cipher"
_ALL = f"lab:{'+'.join((*FAMILIES, *OUTSIDE))}"
_DATA = {"five": "lab", _FAMILY: f"lab:{_FAMILY}"}
_NINE, _LONGER, _GROWN, _ORACLE = "the nine", "the nine, trained on", "the grown set", "oracle with ten"
_TEN = 'models.strategies="lab-ten"'
_CHANGES = (f'models.reasoner="{_BASE}"', f'models.planner="{_BASE}"', f'data.train="{_ALL}"', f'data.eval="{_ALL}"')


def run(bench: Workbench) -> Page:
    page = Page("outside", "Tasks outside the nine", bench, issue=8)
    bench.base(_BASE)
    nine = load_strategies("lab").strategies
    ten = load_strategies("lab-ten")
    candidates = write_set(bench.out / "sets" / "candidates-outside.toml", (*nine, decoy_of(ten), ten[ten.index(_NEW)]))
    page.text(f"The base {_BASE} knows ten kinds of step: the lab's nine, and {_NEW}, which writes the digits of a {_FAMILY} "
              "(`e*bh-di=?` is `4*17-38=?`); no other step can work on one. The preset nano is trained with the nine on six "
              f"families, the lab's five and {_FAMILY} (13% of the questions). `rsim strategies grow` then tries two "
              f"candidates: {DECOY}, which has the prompts of self-reflection, and {_NEW}. Each is trained for 20 steps, the "
              "reasoner frozen, and held against the nine trained as long, on 500 dev problems of all six.")  # fmt: skip
    runs = bench.train([Training("nano", _CHANGES, seed) for seed in bench.seeds])
    grown = bench.grow(runs, candidates)
    arms: dict[str, list[Measurement]] = {}
    for where, data in _DATA.items():
        arms[f"CoT, {where}"] = [alone(_BASE, data)]
        arms[f"{_NINE}, {where}"] = [Measurement(checkpoint(r), data=data) for r in runs]
        arms[f"{_LONGER}, {where}"] = [Measurement(checkpoint(g / "as-it-was"), data=data) for g in grown]
        arms[f"{_GROWN}, {where}"] = [Measurement(checkpoint(best_of(g)), data=data) for g in grown]
        arms[f"{_ORACLE}, {where}"] = [
            Measurement("nano", "oracle", checkpoint(r, "reasoner"), data, changes=(_TEN,)) for r in runs
        ]
    done = measure_arms(bench, arms)
    page.text("On unseen problems (five: the lab's five families):")
    page.arms(done)
    (axes,) = page.figure("bars", "Accuracy on unseen problems of the five families and in cipher.")
    for place, where in enumerate(_DATA):
        names = ["CoT", _NINE, _LONGER, _GROWN, _ORACLE]
        found = [estimate(done[f"{name}, {where}"]) for name in names]
        bars(axes, [i + 0.38 * (place - 0.5) for i in range(len(names))], found, 0.36, where)
        axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)

    failed, asked = Counter[str](), 0
    for measured in done[f"{_LONGER}, {_FAMILY}"]:
        clusters, total = failures(measured.folder)
        failed.update({c.title: c.count for c in clusters})
        asked += total
    page.text(f"What `rsim strategies discover` says of the nine in {_FAMILY}:")
    page.table(["how the episode failed", "share of all"], [[title, percent(n / asked)] for title, n in failed.most_common(4)])
    tried = Counter(e["strategies"][0] for m in done[f"{_GROWN}, {_FAMILY}"] for e in episodes(m.folder) if e["strategies"])
    page.text(f"First strategies of the grown set's planner in {_FAMILY}: "
              f"{', '.join(f'{name} {percent(n / tried.total())}' for name, n in tried.most_common(3))}.")  # fmt: skip

    trials = [trials_of(folder) for folder in grown]
    rows = []
    for number, name in enumerate((DECOY, _NEW)):
        mine = [trial[number] for trial in trials]
        assert all(t["strategy"] == name for t in mine)
        kept = sum(t["kept"] for t in mine)
        rows.append([name, ", ".join(gain_text(t) for t in mine), ", ".join(percent(t["used"]) for t in mine),
                     f"{kept} of {len(mine)}"])  # fmt: skip
        page.value(f"{name} kept, seeds", kept, unit="seeds", goal="none" if name == DECOY else "all",
                   met=kept == (0 if name == DECOY else len(mine)))  # fmt: skip
    page.text("The paired tests on dev problems of all six, each seed:")
    page.table(["candidate", "gain in points, and its interval", "of all steps", "kept"], rows)

    lost = estimate(done[f"{_NINE}, {_FAMILY}"]).mean - estimate(done[f"{_NINE}, five"]).mean
    page.value(f"the nine: {_FAMILY} minus the five families", lost, unit="share")
    for where in _DATA:
        gain = difference(done[f"{_GROWN}, {where}"], done[f"{_LONGER}, {where}"])
        page.text(f"{where}: the grown set minus the nine trained as long, {points(gain)} points; "
                  f"{_NEW} is {percent(used(done[f'{_GROWN}, {where}'], _NEW))} of its steps.")  # fmt: skip
        goal, least = ("at least 3 points", 0.03) if where == _FAMILY else ("no loss over 1 point", -0.01)
        page.measured(f"{where}: the grown set minus the nine, trained as long", gain, goal=goal, met=gain.mean >= least)
    return page


LIMITS = f"""The tenth kind of step was in the base's pre-training, wording and all, as the nine are: a grown planner can call
for what its reasoner knows, and cannot teach it anything. The candidate was written by hand; that an LLM would write it is not
shown. Without {_NEW} nothing works on a {_FAMILY} at all, which is harsher than tasks are where the nine help little."""
