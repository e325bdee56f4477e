"""Step-level credit against outcome-only credit: how many sampled tokens the planner needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rsim.experiments.arms import measure_arms
from rsim.experiments.page import Page
from rsim.experiments.stats import difference, estimate
from rsim.experiments.workbench import Measurement, Training, Workbench, checkpoint
from rsim.training.run_folder import records

_BUDGET = 300_000
# The planner alone, from a random head, with the base reasoner: nothing else moves the accuracy.
_COMMON = (
    'models.planner_head="random"', "cold_start.episodes=0", "stages.stage1.train_reasoner=false", "stages.stage1.steps=1000",
    "stages.stage2.steps=0", f"train.token_budget={_BUDGET}", "train.eval_every=4", "data.eval_size=150", "train.save_every=50",
)  # fmt: skip
_OUTCOME, _SMALL = "outcome only", "outcome only, small steps"
_DISTINCT = 'train.branch_by="distinct"'
# Each step samples about as many tokens in every arm, and half of that in the small ones.
_ARMS = {
    _OUTCOME: ("train.questions=8", "train.group=8"),
    "step level, other strategies": ("train.questions=8", "train.group=4", "train.branches=3", _DISTINCT),
    "step level, any state": ("train.questions=8", "train.group=4", "train.branches=3"),
    "step level, the least sure state": ("train.questions=8", "train.group=4", "train.branches=3", 'train.branch_at="entropy"'),
    "step level, other strategies, small steps": ("train.questions=4", "train.group=4", "train.branches=3", _DISTINCT),
    _SMALL: ("train.questions=4", "train.group=8"),
}


def run(bench: Workbench) -> Page:
    page = Page("credit", "Step-level credit", bench, issue=8)
    trainings = [Training("nano", (*changes, *_COMMON), s) for changes in _ARMS.values() for s in bench.seeds]
    folders = iter(bench.train(trainings))
    runs = {name: [next(folders) for _ in bench.seeds] for name in _ARMS}
    done = measure_arms(bench, {name: [Measurement(checkpoint(r)) for r in rs] for name, rs in runs.items()})
    page.text(f"The planner alone is trained, from a random head, with the reasoner's frozen base, on {_BUDGET:,} sampled "
              "tokens. Outcome only: 8 episodes of each of 8 questions a step. Step level: 4 episodes, and 3 continuations "
              "from one state of each (`train.branches = 3`); what they share is not sampled again. *Other strategies*: they "
              "begin with strategies that differ from each other and from the episode's (`train.branch_by = \"distinct\"`). "
              "Small steps have 4 questions.")  # fmt: skip
    axes = page.figure("curves", "Mean over seeds; the bands span the seeds.", width=6.4)[0]
    for name, found in runs.items():
        _curve(axes, name, found)
    axes.set_xlabel("thousand sampled tokens")
    axes.set_ylabel("held-out accuracy, greedy, %")
    axes.legend(frameon=False)
    page.arms(done)
    goal = float(np.mean([_reached(r)[1][-1] for r in runs[_OUTCOME]]))
    needed = {name: [_tokens_to(r, goal) for r in found] for name, found in runs.items()}
    least = min(float(np.mean(needed[name])) for name in (_OUTCOME, _SMALL))
    page.table(
        ["", f"tokens until held-out accuracy is {goal:.1%}, each seed", "mean, against the better of outcome only"],
        [[name, ", ".join(f"{n:,}" for n in each), f"{np.mean(each) / least:.2f}"]
         for name, each in needed.items()],
    )  # fmt: skip
    page.text(f"{goal:.1%} is what outcome-only credit has in the end, mean over seeds. A run that does not get there counts "
              "with its whole budget.")  # fmt: skip
    for name, arm in done.items():
        page.measured(f"{name}: accuracy", estimate(arm))
        tokens = round(float(np.mean(needed[name])))
        page.value(f"{name}: tokens until held-out accuracy is outcome-only credit's final one", tokens, unit="tokens")
        if name not in (_OUTCOME, _SMALL):
            share = float(np.mean(needed[name])) / least
            page.value(f"{name}: these tokens, over those of the better of outcome only", round(share, 2), unit="x",
                       goal="at most 0.5", met=share <= 0.5)  # fmt: skip
            page.measured(f"{name} minus {_OUTCOME}", difference(arm, done[_OUTCOME]))
    return page


def _reached(run: Path) -> tuple[list[int], list[float]]:
    """Sampled tokens and held-out accuracy at each evaluation."""
    lines = records(run)
    tokens = {r["step"]: r["sampled_tokens"] for r in lines if "sampled_tokens" in r}
    evaluated = [(tokens.get(r["step"], 0), r["eval/accuracy"]) for r in lines if "eval/accuracy" in r]
    return [t for t, _ in evaluated], [a for _, a in evaluated]


def _tokens_to(run: Path, accuracy: float) -> int:
    return next((t for t, a in zip(*_reached(run), strict=True) if a >= accuracy), _BUDGET)


def _curve(axes: Axes, name: str, runs: list[Path]) -> None:
    """Against tokens, which differ a little between seeds: values in between are interpolated."""
    grid = np.linspace(0, _BUDGET, 60)
    values = np.array([np.interp(grid, *_reached(r)) for r in runs])
    line = axes.plot(grid / 1e3, 100 * values.mean(0), label=name)[0]
    axes.fill_between(grid / 1e3, 100 * values.min(0), 100 * values.max(0), color=line.get_color(), alpha=0.15, lw=0)


LIMITS = """The reasoner is frozen and tiny, and an episode has a handful of decisions: with longer episodes, outcome-only
credit should have a harder time. One number of continuations and one state for each episode were tried; neither arm's
learning rate was tuned for it. Greedy accuracy jumps while the planner is unsure, so tokens to an accuracy are rough. Tokens
are those of the reasoner; the planner reads the inherited steps again."""
