"""A planner that has become sure goes on to another task: as it is, and reopened (`rsim.training.entropy_reset`)."""

from __future__ import annotations

from pathlib import Path

from rsim.policies.planner import Planner
from rsim.training.entropy_reset import flatten
from studies.arms import alone, measure_arms
from studies.page import Page
from studies.stats import difference
from studies.workbench import Measurement, Training, Workbench

_FIRST, _SECOND = "arithmetic", "story"
_SHARPER = 10.0  # times its logits
_NATS = 1.0
_PLANNER_ONLY = ("stages.stage1.steps=6", "stages.stage1.train_reasoner=false", "stages.stage2.steps=0",
                 "cold_start.episodes=0", "train.eval_every=2")  # fmt: skip
_ARMS = {"less sure, as it is": 0.0, "sure, as it is": 0.0, f"sure, reopened at {_NATS:g} nat": _NATS}
_BEGINS_SURE = [arm for arm in _ARMS if arm.startswith("sure")]


def run(bench: Workbench) -> Page:
    page = Page("reopen", "A sure planner goes on to another task", bench, issue=8)
    first = bench.train([Training("nano", (*_PLANNER_ONLY, *_task(_FIRST)), seed) for seed in bench.seeds])
    planners = [run_ / "checkpoints" / "final" / "planner" for run_ in first]
    sure = [_sharpened(planner, bench.out / "sure" / run_.name) for planner, run_ in zip(planners, first, strict=True)]
    begun = {arm: sure if arm in _BEGINS_SURE else planners for arm in _ARMS}
    runs = bench.train([
        Training("nano", (*_PLANNER_ONLY, *_task(_SECOND), f'models.planner="{planner}"', *_reopened(nats)), seed)
        for arm, nats in _ARMS.items() for planner, seed in zip(begun[arm], bench.seeds, strict=True)
    ])  # fmt: skip
    count = len(bench.seeds)
    after = {arm: runs[i * count : (i + 1) * count] for i, arm in enumerate(_ARMS)}

    def plugged(planner: Path, task: str) -> Measurement:
        return Measurement("nano", str(planner), "nano-s", f"lab:{task}")

    done = measure_arms(bench, {
        f"CoT, {_SECOND}": [alone(data=f"lab:{_SECOND}")],
        f"before, {_SECOND}": [plugged(p, _SECOND) for p in sure],
        **{f"{arm}, {task}": [plugged(r / "checkpoints" / "final" / "planner", task) for r in after[arm]]
           for arm in _ARMS for task in (_SECOND, _FIRST)},
    })  # fmt: skip
    page.text(
        f"A planner learns {_FIRST} for six steps, nano-s is frozen. Its logits times {_SHARPER:g} stand for long training: it "
        f"chooses the same greedily and hardly ever tries anything else. Then it learns {_SECOND} for six steps: as it was "
        f"before it was sharpened, sharpened, and sharpened with `train.entropy_reset={_NATS:g}`. Greedy accuracy on unseen "
        f"problems of both tasks."
    )
    page.arms(done)
    kept, opened = (done[f"{arm}, {_SECOND}"] for arm in _BEGINS_SURE)
    gain = difference(opened, kept)
    page.measured(f"{_SECOND}: reopened minus as it is", gain, goal="above 0", met=gain.low > 0)
    never = done[f"{next(iter(_ARMS))}, {_SECOND}"]
    page.measured(f"{_SECOND}: reopened minus one that was never sure", difference(opened, never))
    return page


def _task(name: str) -> tuple[str, str]:
    return f'data.train="lab:{name}"', f'data.eval="lab:{name}"'


def _reopened(nats: float) -> tuple[str, ...]:
    return (f"train.entropy_reset={nats}",) if nats else ()


def _sharpened(source: Path, target: Path) -> Path:
    """The planner in ``source``, as sure as long training makes one."""
    if not target.is_dir():
        planner = Planner.from_pretrained(source)
        flatten(planner, 1 / _SHARPER)
        planner.save_pretrained(target)
    return target


LIMITS = """How sure the planner is was set by hand here, not learned: in six steps of this lab none becomes so sure. The two
tasks have the same best strategies for much of their work. What reopening costs on tasks that were learned before, where they
pull the planner apart, is not tested."""
