"""Does GRPO alone collapse on the smallest model? Long runs, untuned and tuned, against rSIM at the same tokens."""

from __future__ import annotations

from pathlib import Path

from rsim.runs.folder import records
from studies.arms import measure_arms
from studies.page import Page
from studies.stats import estimate
from studies.workbench import Measurement, Training, Workbench

ISSUE = 4
LIMITS = """The reasoner is nano-s, the demo's, not nano-xs, the lab's smallest. Collapse depends on the learning rate, the
length of the run and the task; here it was looked for at two rates and one budget. No KL term, entropy bonus or other
remedy was tried for either side."""

_BUDGET = 1_000_000
_ARMS = {
    "GRPO alone, learning rate 1e-3": ("nano-grpo", ("train.reasoner_lr=1e-3",)),
    "GRPO alone, learning rate 1e-4": ("nano-grpo", ("train.reasoner_lr=1e-4",)),
    "rSIM, reasoner at 1e-3": ("nano", ("train.reasoner_lr=1e-3", "stages.stage1.steps=24", "stages.stage2.steps=1000")),
    "rSIM, reasoner at 1e-4": ("nano", ("train.reasoner_lr=1e-4", "stages.stage1.steps=24", "stages.stage2.steps=1000")),
}


def run(bench: Workbench, page: Page) -> None:
    common = (f"train.token_budget={_BUDGET}", "train.eval_every=8", "checkpoint.save_every=16")
    trainings = [Training(preset, (*changes, *common), s) for preset, changes in _ARMS.values() for s in bench.seeds]
    folders = iter(bench.train(trainings))
    runs = {name: [next(folders) for _ in bench.seeds] for name in _ARMS}
    page.text(
        f"Every run samples {_BUDGET:,} tokens. The table gives the *last* weights, not the best ones, on unseen problems."
    )
    done = measure_arms(bench, {n: [Measurement(str(r / "checkpoints" / "final")) for r in rs] for n, rs in runs.items()})
    page.arms(done)
    left, right = page.figure("curves", "Every run; one line a seed.", 2, 7.2)
    for number, (name, found) in enumerate(runs.items()):
        for i, folder in enumerate(found):
            lines = records(folder)
            tokens = {r["step"]: r["sampled_tokens"] / 1e6 for r in lines if "sampled_tokens" in r}
            evaluated = [(tokens[r["step"]], r["eval/accuracy"]) for r in lines if "eval/accuracy" in r and r["step"] in tokens]
            entropy = [(tokens[r["step"]], r["reasoner/entropy"]) for r in lines if "reasoner/entropy" in r]
            label = name if i == 0 else None
            for axes, points in ((left, evaluated), (right, entropy)):
                axes.plot([x for x, _ in points], [y for _, y in points], color=f"C{number}", lw=1, label=label)
    left.set_title("held-out accuracy, greedy")
    right.set_title("reasoner's entropy, nats per token")
    left.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.set_xlabel("million sampled tokens")
    for name, found in runs.items():
        page.measured(f"{name}: accuracy of the last weights", estimate(done[name]))
        lost = [_fall(folder) for folder in found]
        what = f"{name}: largest fall of held-out accuracy below its best, by the end"
        page.value(what, round(100 * max(lost), 1), "points")


def _fall(folder: Path) -> float:
    """How far a run's last held-out accuracy lies below its best."""
    reached = [r["eval/accuracy"] for r in records(folder) if "eval/accuracy" in r]
    return float(max(reached) - reached[-1])
