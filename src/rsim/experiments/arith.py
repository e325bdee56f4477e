"""A real model on sums of two or three numbers: SmolLM2-135M-Instruct, base, cold start, GRPO alone, rSIM, controls."""

from __future__ import annotations

from rsim.experiments.arms import CONTROLS, controls_of, grpo_runs, measure_arms, planned
from rsim.experiments.page import Page, bars, points
from rsim.experiments.stats import difference, estimate
from rsim.experiments.workbench import Measurement, Training, Workbench, checkpoint

_PRESET = "smollm2-arith"
_NO_STAGES = ("stages.stage1.steps=0", "stages.stage2.steps=0")
_ALONE = ('models.planner="none"', "stages.stage1.steps=1000")  # until the tokens are spent


def run(bench: Workbench) -> Page:
    page = Page("arith", "SmolLM2-135M on sums", bench, issue=6)
    rsim = bench.train([Training(_PRESET, (), seed) for seed in bench.seeds])
    cold = bench.train([Training(_PRESET, _NO_STAGES, seed) for seed in bench.seeds])
    grpo = grpo_runs(bench, rsim, *_ALONE, preset=_PRESET)
    done = measure_arms(bench, {
        "base, CoT": [Measurement(_PRESET, "none")],
        "cold start, CoT": [Measurement(str(r / "checkpoints" / "final"), "none") for r in cold],
        "GRPO alone": [Measurement(checkpoint(r)) for r in grpo],
        "rSIM": [planned(r) for r in rsim],
        "rSIM's reasoner without a planner": [Measurement(checkpoint(r), "none") for r in rsim],
        **controls_of(bench, rsim, [checkpoint(r, "reasoner") for r in rsim], _PRESET),
    })  # fmt: skip
    page.arms(done)
    axes = page.figure("bars", "Accuracy on unseen sums.", width=7.2)[0]
    bars(axes, list(range(len(done))), [estimate(arm) for arm in done.values()], 0.7, "")
    axes.set_xticks(range(len(done)), done, rotation=30, ha="right")
    axes.set_ylabel("accuracy, %")
    gain = difference(done["rSIM"], done["base, CoT"])
    best = max(CONTROLS, key=lambda kind: estimate(done[kind]).mean)
    page.text(f"rSIM minus base: {points(gain)} points; minus GRPO alone at the same tokens: "
              f"{points(difference(done['rSIM'], done['GRPO alone']))}; minus the best control ({best}): "
              f"{points(difference(done['rSIM'], done[best]))}.")  # fmt: skip
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    page.measured("rSIM minus base, CoT", gain, goal="at least 30 points", met=gain.mean >= 0.3)
    return page


LIMITS = """A dequantised 4-bit copy of a model of 135 million parameters, on sums: nothing here speaks of larger models or of
reasoning in words. The controls play with rSIM's reasoner. GRPO alone has the preset's learning rate, not tuned for it."""
