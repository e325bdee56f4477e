"""Switches of the method, one at a time: what the ablation experiments have in common."""

from __future__ import annotations

from studies.arms import Arms, measure_arms, planned
from studies.page import Page, points
from studies.stats import difference, estimate
from studies.workbench import Training, Workbench


def ablate(page: Page, bench: Workbench, arms: dict[str, tuple[str, ...]], against: str, *, which: str = "best") -> Arms:
    """Trains the preset nano with each arm's changes and compares every arm with the one named ``against``.

    ``which``: the checkpoint of each run that is measured, ``best`` or ``final``.
    """
    folders = iter(bench.train([Training("nano", changes, s) for changes in arms.values() for s in bench.seeds]))
    runs = {name: [next(folders) for _ in bench.seeds] for name in arms}
    done = measure_arms(bench, {name: [planned(r, which) for r in found] for name, found in runs.items()})
    page.arms(done)
    rows = []
    for name, arm in done.items():
        flags = [m.summary["flags"] for m in arm]
        steps = [m.summary["steps"] for m in arm]
        gain = points(difference(arm, done[against])) if name != against else ""
        shares = [sum(f[key] for f in flags) / len(flags) for key in ("terminated", "forced")]
        rows.append([name, gain, f"{sum(steps) / len(steps):.2f}", *(f"{s:.1%}" for s in shares)])
    page.table(["", f"minus {against}, points", "steps / question", "ended by the planner", "forced to end"], rows)
    for name, arm in done.items():
        page.measured(name, estimate(arm))
        if name != against:
            page.measured(f"{name}, minus {against}", difference(arm, done[against]))
    return done
