"""The arms that studies of trainings share: runs, controls, and switches of the method one at a time."""

from __future__ import annotations

from pathlib import Path

from studies.page import Page, gain
from studies.stats import difference, estimate
from studies.workbench import SEARCHED, Measured, Measurement, Training, Workbench, checkpoint

# None of them takes a trained decision where it belongs.
CONTROLS = ("random", "fixed", "sequence", "shuffled", "prompted", "prompted:bare", "wait")

Arms = dict[str, list[Measured]]


def measure_arms(bench: Workbench, arms: dict[str, list[Measurement]]) -> Arms:
    """All evaluations of all arms at once; an arm has one evaluation, or one for each seed.

    A measurement that matches the tokens of another names it as ``ARM/NUMBER``.
    """
    flat = {f"{arm}/{i}": m for arm, measurements in arms.items() for i, m in enumerate(measurements)}
    done = bench.measure(flat)
    return {arm: [done[f"{arm}/{i}"] for i in range(len(measurements))] for arm, measurements in arms.items()}


def controls_of(
    bench: Workbench,
    runs: list[Path],
    reasoners: list[str],
    *,
    preset: str = "nano",
    data: str = "lab",
    problems: int = 0,
    kinds: tuple[str, ...] = CONTROLS,
) -> dict[str, list[Measurement]]:
    """The controls for each run's planner and the reasoner beside it in ``reasoners``; picked on dev problems where there is
    something to pick: on ``problems`` of them, or as many as `SEARCHED` says."""
    searched = [kind for kind in kinds if kind in SEARCHED]
    specs: dict[str, list[str]] = {
        "random": ["random"] * len(runs),
        **{kind: bench.search(kind, reasoners, preset, problems) for kind in searched},
        "shuffled": [f"shuffled:{checkpoint(run, 'planner')}" for run in runs],
        "prompted": ["prompted"] * len(runs),
        "prompted:bare": ["prompted:bare"] * len(runs),
    }
    return {
        kind: [Measurement(preset, spec, reasoner, data) for spec, reasoner in zip(specs[kind], reasoners, strict=True)]
        for kind in kinds
    }


def ablate(page: Page, bench: Workbench, arms: dict[str, tuple[str, ...]], against: str) -> Arms:
    """Trains the preset nano with each arm's changes and compares every arm's last checkpoints with those of the one
    named ``against``."""
    folders = iter(bench.train([Training("nano", changes, s) for changes in arms.values() for s in bench.seeds]))
    runs = {name: [next(folders) for _ in bench.seeds] for name in arms}
    last = {name: [Measurement(checkpoint(r, which="final")) for r in found] for name, found in runs.items()}
    done = measure_arms(bench, last)
    page.arms(done)
    rows = []
    for name, arm in done.items():
        flags = [m.summary["flags"] for m in arm]
        steps = [m.summary["steps"] for m in arm]
        shares = [sum(f[key] for f in flags) / len(flags) for key in ("terminated", "forced")]
        more = gain(arm, done[against]) if name != against else ""
        rows.append([name, more, f"{sum(steps) / len(steps):.2f}", *(f"{s:.1%}" for s in shares)])
    page.table(["", f"minus {against}, points", "steps / question", "ended by the planner", "forced to end"], rows)
    for name, arm in done.items():
        page.measured(name, estimate(arm))
        if name != against:
            page.measured(f"{name}, minus {against}", difference(arm, done[against]))
    return done
