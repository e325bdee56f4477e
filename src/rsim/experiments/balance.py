"""Balanced exploration: even use of the strategies, or an entropy target, in place of the fixed penalty on repeats."""

from __future__ import annotations

from rsim.experiments.ablation import ablate
from rsim.experiments.arms import used
from rsim.experiments.page import Page, percent
from rsim.experiments.stats import difference
from rsim.experiments.workbench import Workbench
from rsim.strategies import load_strategies

_PRESET = "penalty on repeats (the preset)"
_FREE = "rewards.penalty=0"
_ARMS: dict[str, tuple[str, ...]] = {
    _PRESET: (),
    "neither": (_FREE,),
    "even use, weight 0.05": (_FREE, "objective.usage_weight=0.05"),
    "even use, weight 0.2": (_FREE, "objective.usage_weight=0.2"),
    "entropy target of 1 nat": (_FREE, "objective.planner_entropy=0.05", "objective.entropy_target=1.0"),
}


def run(bench: Workbench) -> Page:
    page = Page("balance", "Balanced exploration", bench, issue=8)
    done = ablate(page, bench, _ARMS, _PRESET)
    names = load_strategies("lab").names
    shares_of = {arm: {name: used(measured, name) for name in names} for arm, measured in done.items()}
    page.text("Share of all steps, greedy, on unseen problems, mean over seeds:")
    page.table(["", *shares_of], [[name, *(percent(shares[name]) for shares in shares_of.values())] for name in names])
    axes = page.figure("usage", "Share of each strategy in all steps.", width=7.2)[0]
    for place, (arm, shares) in enumerate(shares_of.items()):
        xs = [i + 0.16 * (place - 2) for i in range(len(names))]
        axes.bar(xs, [100 * shares[name] for name in names], 0.15, label=arm)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("share of steps, %")
    axes.legend(frameon=False, fontsize=7)
    for arm, shares in shares_of.items():
        lost = -difference(done[arm], done[_PRESET]).mean if arm != _PRESET else 0.0
        even = max(shares.values()) <= 0.5 and min(shares.values()) >= 0.02 and lost <= 0.01
        page.value(f"{arm}: largest share of a strategy", round(max(shares.values()), 3), unit="share")
        page.value(f"{arm}: smallest share of a strategy", round(min(shares.values()), 3), unit="share",
                   goal="2% to 50% for all, at most 1 point of accuracy lost", met=even)  # fmt: skip
    return page


LIMITS = """On the nano lab some strategies have hardly a use, so even use is not what a good planner of this lab does; whether
it helps where all nine are useful cannot be seen here. The weights were not tuned."""
