"""Tasks that the nine strategies cannot solve, and what a tenth that pays brings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rsim.discovery.failures import failures
from rsim.lab.problems import FAMILIES, OUTSIDE
from rsim.policies.strategies import load_strategies
from studies.arms import Arms, alone, measure_arms, used, write_set
from studies.growth import DECOY, best_of, decoy_of, gain_text, trials_of
from studies.page import Page, bars, percent, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint, episodes

_NINE, _LONGER, _GROWN, _ORACLE = "the nine", "the nine, trained on", "the grown set", "oracle with ten"


@dataclass(frozen=True)
class Outside:
    """A base that knows a tenth kind of step, and the task that takes it.

    ``data``: what is trained on and decides the paired tests, the lab's five families and the task; ``asked``: the task alone.
    ``text``: what the page says of both. ``trial``: changes in the config of the trials, which are held without them as well.
    ``train_size``: questions to train on (0: the preset's). ``oracle``: the lab knows what the best strategy is.
    """

    page: str
    title: str
    base: str
    strategies: str
    new: str
    task: str
    data: str
    asked: str
    text: str
    trial: tuple[str, ...] = ()
    train_size: int = 0
    oracle: bool = False


_CIPHER = Outside(
    page="outside",
    title="Tasks outside the nine",
    base="nano-x",
    strategies="lab-ten",
    new="decoding",
    task="cipher",
    data=f"lab:{'+'.join((*FAMILIES, *OUTSIDE))}",
    asked="lab:cipher",
    text="decoding, which writes the digits of a cipher (`e*bh-di=?` is `4*17-38=?`); no other step can work on one. "
    "The preset nano is trained with the nine on six families, the lab's five and cipher (13% of the questions)",
    oracle=True,
)


def run(bench: Workbench) -> Page:
    return try_tenth(bench, _CIPHER)


def try_tenth(bench: Workbench, what: Outside) -> Page:
    """Trains with the nine, lets the set grow, and measures both on the five families and on the task."""
    page = Page(what.page, what.title, bench, issue=8)
    bench.base(what.base)
    nine = load_strategies("lab").strategies
    ten = load_strategies(what.strategies)
    file = bench.out / "sets" / f"candidates-{what.page}.toml"
    candidates = write_set(file, (*nine, decoy_of(ten), ten[ten.index(what.new)]))
    page.text(f"The base {what.base} knows ten kinds of step: the lab's nine, and {what.text}. `rsim strategies grow` then "
              f"tries two candidates: {DECOY}, which has the prompts of self-reflection, and {what.new}. Each is trained for "
              "20 steps, the reasoner frozen, and held against the nine trained as long, on 500 dev problems of all "
              "six.")  # fmt: skip
    changes = tuple(f'{key}="{value}"' for key, value in (
        ("models.reasoner", what.base), ("models.planner", what.base), ("data.train", what.data), ("data.eval", what.data)
    ))  # fmt: skip
    if what.train_size:
        changes += (f"data.train_size={what.train_size}",)
    runs = bench.train([Training("nano", changes, seed) for seed in bench.seeds])
    grown = bench.grow(runs, candidates, changes=what.trial)
    plain = bench.grow(runs, candidates) if what.trial else []
    asked = {"five": "lab", what.task: what.asked}
    arms: dict[str, list[Measurement]] = {}
    for where, data in asked.items():
        arms[f"CoT, {where}"] = [alone(what.base, data)]
        arms[f"{_NINE}, {where}"] = [Measurement(checkpoint(r), data=data) for r in runs]
        arms[f"{_LONGER}, {where}"] = [Measurement(checkpoint(g / "as-it-was"), data=data) for g in grown]
        arms[f"{_GROWN}, {where}"] = [Measurement(checkpoint(best_of(g)), data=data) for g in grown]
        if what.oracle:
            own = f'models.strategies="{what.strategies}"'
            arms[f"{_ORACLE}, {where}"] = [
                Measurement("nano", "oracle", checkpoint(r, "reasoner"), data, changes=(own,)) for r in runs
            ]
    done = measure_arms(bench, arms)
    page.text("On unseen problems (five: the lab's five families):")
    page.arms(done)
    (axes,) = page.figure("bars", f"Accuracy on unseen problems of the five families and in {what.task}.")
    names = ["CoT", _NINE, _LONGER, _GROWN, *([_ORACLE] if what.oracle else [])]
    for place, where in enumerate(asked):
        found = [estimate(done[f"{name}, {where}"]) for name in names]
        bars(axes, [i + 0.38 * (place - 0.5) for i in range(len(names))], found, 0.36, where)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)
    _failures(page, done, what)
    page.text(f"The paired tests on dev problems of all six, each seed{_with(what)}:")
    _trials(page, grown, what)
    if plain:
        page.text("And without that:")
        _trials(page, plain, what, note=", without the pull")
    lost = estimate(done[f"{_NINE}, {what.task}"]).mean - estimate(done[f"{_NINE}, five"]).mean
    page.value(f"the nine: {what.task} minus the five families", lost, unit="share")
    for where in asked:
        gain = difference(done[f"{_GROWN}, {where}"], done[f"{_LONGER}, {where}"])
        page.text(f"{where}: the grown set minus the nine trained as long, {points(gain)} points; "
                  f"{what.new} is {percent(used(done[f'{_GROWN}, {where}'], what.new))} of its steps.")  # fmt: skip
        goal, least = ("at least 3 points", 0.03) if where == what.task else ("no loss over 1 point", -0.01)
        page.measured(f"{where}: the grown set minus the nine, trained as long", gain, goal=goal, met=gain.mean >= least)
    return page


def _failures(page: Page, done: Arms, what: Outside) -> None:
    failed, asked = Counter[str](), 0
    for measured in done[f"{_LONGER}, {what.task}"]:
        clusters, total = failures(measured.folder)
        failed.update({c.title: c.count for c in clusters})
        asked += total
    page.text(f"What `rsim strategies discover` says of the nine in {what.task}:")
    page.table(["how the episode failed", "share of all"], [[title, percent(n / asked)] for title, n in failed.most_common(4)])
    tried = Counter(e["strategies"][0] for m in done[f"{_GROWN}, {what.task}"] for e in episodes(m.folder) if e["strategies"])
    page.text(f"First strategies of the grown set's planner in {what.task}: "
              f"{', '.join(f'{name} {percent(n / tried.total())}' for name, n in tried.most_common(3))}.")  # fmt: skip


def _with(what: Outside) -> str:
    return f", the trials with {', '.join(f'`{change}`' for change in what.trial)}" if what.trial else ""


def _trials(page: Page, grown: list[Path], what: Outside, note: str = "") -> None:
    trials = [trials_of(folder) for folder in grown]
    rows = []
    for number, name in enumerate((DECOY, what.new)):
        mine = [trial[number] for trial in trials]
        assert all(t["strategy"] == name for t in mine)
        kept = sum(t["kept"] for t in mine)
        rows.append([name, ", ".join(gain_text(t) for t in mine), ", ".join(percent(t["used"]) for t in mine),
                     f"{kept} of {len(mine)}"])  # fmt: skip
        if note:  # a comparison, not what is claimed
            page.value(f"{name} kept, seeds{note}", kept, unit="seeds")
        else:
            page.value(f"{name} kept, seeds", kept, unit="seeds", goal="none" if name == DECOY else "all",
                       met=kept == (0 if name == DECOY else len(mine)))  # fmt: skip
    page.table(["candidate", "gain in points, and its interval", "of all steps", "kept"], rows)


LIMITS = """The tenth kind of step was in the base's pre-training, wording and all, as the nine are: a grown planner can call
for what its reasoner knows, and cannot teach it anything. The candidate was written by hand; that an LLM would write it is not
shown. Without decoding nothing works on a cipher at all, which is harsher than tasks are where the nine help little."""
