"""Figure 5: training curves for a small and a large planner, and for the two ways to begin a planner's head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rsim.runs.folder import records
from studies.arms import measure_arms, planned, rsim_runs
from studies.page import Page
from studies.stats import estimate
from studies.workbench import Workbench

_LONGER = ("stages.stage1.steps=12", "stages.stage2.steps=8", "train.eval_every=2")


def run(bench: Workbench) -> Page:
    page = Page("fig5", "Training curves: a small and a large planner", bench)
    bench.base("nano-m")
    arms = {
        "nano-s, head of names": rsim_runs(bench, *_LONGER),
        "nano-m, head of names": rsim_runs(bench, *_LONGER, 'models.planner="nano-m"'),
        "nano-s, random head": rsim_runs(bench, *_LONGER, 'models.planner_head="random"'),
    }
    done = measure_arms(bench, {name: [planned(r) for r in runs] for name, runs in arms.items()})
    page.text("Reasoner nano-s; planner nano-s (0.37 M parameters) or nano-m (1.7 M). 12 steps at lambda 0.7, then 8 at 0.3. "
              "The planner's head begins with the base's own output rows of the strategies' names, or at random.")  # fmt: skip
    left, right = page.figure("curves", "Mean over seeds; the bands span the seeds.", 2, 7.2)
    for name, runs in arms.items():
        _curve(left, name, runs, "eval/accuracy")
        _curve(right, name, runs, "planner/return")
    left.set_title("held-out accuracy, greedy")
    right.set_title("planner's return, sampled")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step")
    page.arms(done)
    for name, runs in arms.items():
        page.measured(f"{name}: accuracy after training", estimate(done[name]))
        steps = [_steps_to(r, 0.9) for r in runs]
        page.value(f"{name}: steps until held-out accuracy is 90% (slowest seed)", max(steps), unit="steps")
        seconds = np.median([r["seconds"] for run_ in runs for r in records(run_) if "seconds" in r])
        page.value(f"{name}: seconds per step (median)", round(float(seconds), 1), unit="s")
    return page


def _curve(axes: Axes, name: str, runs: list[Path], key: str) -> None:
    series = [{r["step"]: r[key] for r in records(run) if key in r} for run in runs]
    steps = sorted(set.intersection(*(set(s) for s in series)))
    values = np.array([[s[step] for step in steps] for s in series])
    line = axes.plot(steps, values.mean(0), label=name)[0]
    axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0)


def _steps_to(run: Path, accuracy: float) -> int:
    """The first step whose held-out accuracy is so high; one more than were made where none is."""
    evaluated = [(r["step"], r["eval/accuracy"]) for r in records(run) if "eval/accuracy" in r]
    return int(next((step for step, reached in evaluated if reached >= accuracy), evaluated[-1][0] + 1))


LIMITS = """Both planners read the same short text; on tasks where choosing takes knowledge, the larger one may gain
more. The head of names helps here because the bases were pre-trained on the planner's template; on an LLM that was not,
it is a prior of unknown worth."""
