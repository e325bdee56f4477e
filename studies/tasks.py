"""Planners trained on one task and asked about others; and one planner that learns one task after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rsim.lab.problems import FAMILIES as TASKS
from studies.arms import Arms, measure_arms
from studies.claims import ALONE, FOUND
from studies.page import Page, percent, points
from studies.stats import crossed, difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint

ISSUE = 10
LIMITS = """All tasks are sums, told in different words, and share most of their best strategies: transfer to tasks that need
other skills, and forgetting between tasks that pull the planner apart, are not tested here. Only the planner learns;
settings are those of the planner alone, tuned on all tasks together."""

_CROSS = 100_000  # sampled tokens on the one task
_EACH = 50_000  # on each of the tasks that follow each other
_SOURCES = ("story", "arithmetic")
_METHODS = {"with replay": True, "without replay": False}


def run(bench: Workbench, page: Page) -> None:
    found = {task: bench.search("climb", ["nano-s"], data=f"lab:{task}")[0] for task in TASKS}
    controls = {f"CoT, {task}": [Measurement("nano", "none", "nano-s", f"lab:{task}")] for task in TASKS}
    controls |= {f"{FOUND}, {task}": [Measurement("nano", spec, "nano-s", f"lab:{task}")] for task, spec in found.items()}
    known = measure_arms(bench, controls)
    _cross(bench, page, known)
    for method, replay in _METHODS.items():
        _continual(bench, page, known, method, replay)


def _alone(task: str, tokens: int, *more: str) -> tuple[str, ...]:
    return (*ALONE, f"train.token_budget={tokens}", f'data.train="lab:{task}"', f'data.eval="lab:{task}"', *more)


def _asked(run: Path, task: str) -> Measurement:
    return Measurement("nano", checkpoint(run, "planner", which="final"), "nano-s", f"lab:{task}")


def _row(name: str, arms: Arms, key: str) -> list[str]:
    return [name, *(percent(estimate(arms[f"{key}, {task}"]).mean) for task in TASKS)]


def _cross(bench: Workbench, page: Page, known: Arms) -> None:
    runs = {s: bench.train([Training("nano", _alone(s, _CROSS), seed) for seed in bench.seeds]) for s in _SOURCES}
    arms = {f"{s}, {task}": [_asked(r, task) for r in found] for s, found in runs.items() for task in TASKS}
    done = measure_arms(bench, arms)
    page.text(f"## Trained on one task ({_CROSS:,} tokens), asked about all (columns), before the untrained nano-s")
    rows = [_row(name, known, name) for name in ("CoT", FOUND)]
    page.table(["", *TASKS], [*rows, *(_row(f"trained on {s}", done, s) for s in _SOURCES)])
    for source in _SOURCES:
        for task in [t for t in TASKS if t != source]:
            ours = done[f"{source}, {task}"]
            for control in ("CoT", FOUND):
                lead = difference(ours, known[f"{control}, {task}"])
                goal = "interval above 0"
                page.measured(f"cross-task, {source} to {task}: minus {control}", lead, goal, met=lead.low > 0)


def _continual(bench: Workbench, page: Page, known: Arms, method: str, replay: bool) -> None:
    runs: dict[str, list[Path]] = {}
    planners = ["nano-s"] * len(bench.seeds)
    for i, task in enumerate(TASKS):
        earlier = [f"lab:{t}" for t in TASKS[:i]] if replay else []
        more = [(f"data.replay={earlier!r}", f'models.planner="{planner}"') for planner in planners]
        trainings = [Training("nano", _alone(task, _EACH, *m), s) for m, s in zip(more, bench.seeds, strict=True)]
        runs[task] = bench.train(trainings)
        planners = [checkpoint(run, "planner", which="final") for run in runs[task]]
    done = measure_arms(bench, {f"{s}, {t}": [_asked(r, t) for r in found] for s, found in runs.items() for t in TASKS})
    page.text(f"## One task after the other ({_EACH:,} tokens each), {method}: accuracy after each (rows) on all (columns)")
    rows = [_row(name, known, name) for name in ("CoT", FOUND)]
    page.table(["", *TASKS], [*rows, *(_row(f"after {task}", done, task) for task in TASKS)])
    for task in TASKS[:-1]:
        learned, final = (np.stack([m.right for m in done[f"{after}, {task}"]]).astype(float) for after in (task, TASKS[-1]))
        change = crossed(final - learned)
        goal = "a loss of 1 point at most, by its interval" if replay else ""
        what = f"continual, {method}: {task}, from when it was learned to the end"
        page.measured(what, change, goal, met=change.low >= -0.01 if replay else None)
    for task in TASKS:
        lead = difference(done[f"{TASKS[-1]}, {task}"], known[f"{FOUND}, {task}"])
        page.text(f"{task}, at the end, minus the {FOUND}: {points(lead)} points.")
        page.measured(f"continual, {method}: {task}, at the end, minus {FOUND}", lead)
