"""Continual learning: one planner goes over a sequence of tasks, with and without replay, and is asked about all after each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from studies.arms import alone, measure_arms
from studies.page import Page, percent
from studies.stats import crossed, estimate
from studies.workbench import Measured, Measurement, Training, Workbench

ISSUE = 4
LIMITS = """The tasks share their arithmetic and most of their best strategies; forgetting between tasks that pull the
planner apart is not tested. Only the planner learns."""

TASKS = ("arithmetic", "story", "equation", "calendar")
_SIX_STEPS = ("stages.stage1.steps=6", "stages.stage2.steps=0", "cold_start.episodes=0", "train.eval_every=2")
_PLANNER_ONLY = ("stages.stage1.train_reasoner=false", *_SIX_STEPS)
_METHODS = {"with replay": True, "without replay": False}


def run(bench: Workbench, page: Page) -> None:
    runs = {method: _sequence(bench, replay) for method, replay in _METHODS.items()}
    arms = {f"CoT, {task}": [alone(data=f"lab:{task}")] for task in TASKS}
    for method, by_task in runs.items():
        for i, after in enumerate(TASKS):
            for task in TASKS:
                arms[f"{method}, {i}, {task}"] = [
                    Measurement("nano", str(folder / "checkpoints" / "final" / "planner"), "nano-s", f"lab:{task}")
                    for folder in by_task[after]
                ]
    done = measure_arms(bench, arms)
    page.text(
        f"Tasks in order: {', '.join(TASKS)}. Six steps of planner-only training on each (nano-s is frozen); "
        "with replay, a quarter of the questions come from earlier tasks. The last weights are measured."
    )
    for method in _METHODS:
        page.text(f"## {method.capitalize()}: accuracy on each task (columns) after each stage (rows)")
        rows = [["CoT", *(percent(estimate(done[f"CoT, {task}"]).mean) for task in TASKS)]]
        rows += [
            [f"after {after}", *(percent(estimate(done[f"{method}, {i}, {task}"]).mean) for task in TASKS)]
            for i, after in enumerate(TASKS)
        ]
        page.table(["", *TASKS], rows)
        _forgetting(page, method, done)


def _sequence(bench: Workbench, replay: bool) -> dict[str, list[Path]]:
    """The runs of every seed, task by task: each begins with the planner of the one before."""
    runs: dict[str, list[Path]] = {}
    planners = ["nano-s"] * len(bench.seeds)
    for i, task in enumerate(TASKS):
        earlier = [f"lab:{t}" for t in TASKS[:i]] if replay else []
        data = (f'data.train="lab:{task}"', f'data.eval="lab:{task}"', f"data.replay={earlier!r}")
        trainings = [
            Training("nano", (*_PLANNER_ONLY, *data, f'models.planner="{planner}"'), seed)
            for planner, seed in zip(planners, bench.seeds, strict=True)
        ]
        runs[task] = bench.train(trainings)
        planners = [str(folder / "checkpoints" / "final" / "planner") for folder in runs[task]]
    return runs


def _forgetting(page: Page, method: str, done: dict[str, list[Measured]]) -> None:
    last = len(TASKS) - 1
    for i, task in enumerate(TASKS[:-1]):
        learned, final = done[f"{method}, {i}, {task}"], done[f"{method}, {last}, {task}"]
        change = crossed(np.stack([m.right for m in final]).astype(float) - np.stack([m.right for m in learned]))
        goal = "a loss of 1 point at most" if method == "with replay" else ""
        met = change.mean >= -0.01 if goal else None
        page.measured(f"{method}: {task}, from when it was learned to the end", change, goal, met)
    ahead = [
        estimate(done[f"{method}, {i}, {task}"]).mean - estimate(done[f"CoT, {task}"]).mean for i, task in enumerate(TASKS[1:])
    ]
    what = f"{method}: forward transfer, points above CoT on a task before its own training (mean)"
    page.value(what, round(100 * sum(ahead) / len(ahead), 1), "points")
    end = [estimate(done[f"{method}, {last}, {task}"]).mean for task in TASKS]
    page.value(f"{method}: mean accuracy on all tasks at the end", round(100 * sum(end) / len(end), 1), unit="%")
