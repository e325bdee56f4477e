"""Balanced exploration: even use of the strategies, or an entropy target, in place of the fixed penalty on repeats."""

from __future__ import annotations

from dataclasses import replace

from rsim.policies.strategies import load_strategies
from studies.arms import Arms, ablate, measure_arms, planned, used
from studies.page import Page, percent, points
from studies.stats import difference, estimate
from studies.workbench import Training, Workbench

ISSUE = 8
LIMITS = """On the nano lab some strategies have hardly a use, so even use is not what a good planner of this lab does; whether
it helps where all nine are useful cannot be seen here. The weight of the pull, 0.03, was picked after a look
at 0.02 and 0.05 with seed 0. An earlier estimate of the pull, at weights 0.05 and 0.2, left five strategies without use."""

_PRESET, _LONG = "penalty on repeats (the preset)", "penalty on repeats, four times as long"
_GOAL = "2% to 50% for all, at most 1 point of accuracy lost"
_FREE = "rewards.penalty=0"
_LONGER = "stages.stage1.steps=32", "stages.stage2.steps=24"
_ARMS: dict[str, tuple[str, ...]] = {
    _PRESET: (),
    "neither": (_FREE,),
    "entropy target of 1 nat": (_FREE, "objective.planner_entropy=0.05", "objective.entropy_target=1.0"),
    _LONG: _LONGER,
    "even use, four times as long": (_FREE, "objective.usage_weight=0.03", *_LONGER),
}


def run(bench: Workbench, page: Page) -> None:
    taken = ablate(page, bench, _ARMS, _PRESET, which="final")
    runs = {name: bench.train([Training("nano", changes, s) for s in bench.seeds]) for name, changes in _ARMS.items()}
    drawn = measure_arms(
        bench, {name: [replace(planned(r, "final"), drawn=True) for r in found] for name, found in runs.items()}
    )
    page.text(
        "Runs are measured where they end: their best checkpoint by held-out accuracy is that of the fourth or eighth "
        "step as a rule."
    )
    page.text(
        "Above, each decision is the planner's likeliest strategy. The pull towards even use acts on what the planner "
        "would draw, so here are both: the likeliest strategy taken (*greedy*), and strategies drawn by their "
        "probabilities, as in training (*drawn*); the reasoner is greedy in both. Points are those against the greedy "
        "preset that was trained as long."
    )
    rows = []
    for name in _ARMS:
        like = taken[_LONG if _LONGER[0] in _ARMS[name] else _PRESET]
        for how, arms in (("greedy", taken), ("drawn", drawn)):
            shares, more = _shares(arms, name), difference(arms[name], like)
            least, most = min(shares.values()), max(shares.values())
            itself = arms[name] is like
            shown = ["" if itself else points(more), percent(least), percent(most)]
            rows.append([f"{name}, {how}", percent(estimate(arms[name]).mean), *shown])
            page.value(f"{name}, {how}: largest share of a strategy", round(most, 3), "share")
            met = most <= 0.5 and least >= 0.02 and (itself or more.mean >= -0.01)
            page.value(f"{name}, {how}: smallest share of a strategy", round(least, 3), "share", _GOAL, met)
            if how == "drawn":
                page.measured(f"{name}, drawn: accuracy", estimate(arms[name]))
    page.table(["", "accuracy", "minus the preset, points", "rarest strategy", "most used strategy"], rows)
    for how, arms in (("greedy", taken), ("drawn", drawn)):
        page.text(f"Share of all steps, {how}, on unseen problems, mean over seeds:")
        shares_of = {name: _shares(arms, name) for name in _ARMS}
        names = load_strategies("lab").names
        page.table(["", *shares_of], [[s, *(percent(shares[s]) for shares in shares_of.values())] for s in names])
    axes = page.figure("usage", "Share of each strategy in all steps, drawn.", width=7.2)[0]
    for place, (arm, shares) in enumerate(shares_of.items()):
        xs = [i + 0.16 * (place - 2) for i in range(len(names))]
        axes.bar(xs, [100 * shares[name] for name in names], 0.15, label=arm)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("share of steps, %")
    axes.legend(frameon=False, fontsize=7)


def _shares(arms: Arms, arm: str) -> dict[str, float]:
    """Each strategy's share of all steps."""
    return {name: used(arms[arm], name) for name in load_strategies("lab").names}
