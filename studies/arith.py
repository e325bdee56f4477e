"""A real model on sums of two or three numbers: SmolLM2-135M-Instruct, base, cold start, GRPO alone, rSIM, controls."""

from __future__ import annotations

import json
from pathlib import Path

from rsim.config import load_config
from rsim.runs.folder import records
from studies.arms import controls_of, measure_arms
from studies.page import Page, bars, percent, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint

_PRESET = "smollm2-arith"
_CONTROLS = ("random", "fixed", "sequence", "wait")
_SEARCHED = 32  # dev problems on which a control is picked
_NO_STAGES = ("stages.stage1.steps=0", "stages.stage2.steps=0", "train.eval_every=0")
_ALONE = 'models.planner="none"'
_BUDGET = "train.token_budget=150000"  # of rSIM and of GRPO alone, after the cold start


def run(bench: Workbench) -> Page:
    page = Page("arith", "SmolLM2-135M on sums", bench, issue=6)
    prompts = 'cold_start.teach="prompts"'  # of what GRPO begins with: it has no planner that would inject them
    starts = [Training(_PRESET, (*_NO_STAGES, *more), seed) for more in ((), (prompts,)) for seed in bench.seeds]
    done_starts = bench.train(starts)
    cold, cold_alone = done_starts[: len(bench.seeds)], done_starts[len(bench.seeds) :]
    runs = bench.train([
        Training(_PRESET, (f"models.reasoner={json.dumps(_reasoner(start))}", "cold_start.episodes=0", _BUDGET, *more), seed)
        for begun, more in ((cold, ()), (cold_alone, (_ALONE,))) for seed, start in zip(bench.seeds, begun, strict=True)
    ])  # fmt: skip
    rsim, grpo = runs[: len(bench.seeds)], runs[len(bench.seeds) :]
    data = load_config(_PRESET).data.eval

    def measured(run: str, planner: str = "", reasoner: str = "") -> Measurement:
        return Measurement(run, planner, reasoner, data)

    done = measure_arms(bench, {
        "base, CoT": [measured(_PRESET, "none")],
        "base, random planner": [measured(_PRESET, "random")],
        "cold start, random planner": [measured(_PRESET, "random", _reasoner(start)) for start in cold],
        "GRPO's cold start, CoT": [measured(_PRESET, "none", _reasoner(start)) for start in cold_alone],
        "GRPO alone": [measured(checkpoint(r)) for r in grpo],
        "rSIM": [measured(checkpoint(r)) for r in rsim],
        "rSIM's reasoner, CoT": [measured(checkpoint(r), "none") for r in rsim],
        **controls_of(bench, rsim, [checkpoint(r, "reasoner") for r in rsim], preset=_PRESET, data=data, problems=_SEARCHED,
                      kinds=_CONTROLS),
    })  # fmt: skip
    page.text("The controls play with rSIM's reasoner. The cold starts of rSIM and of GRPO alone learn the same episodes, "
              "GRPO's the injected prompts as well; both sample as many tokens after it.")  # fmt: skip
    page.arms(done)
    axes = page.figure("bars", "Accuracy on unseen sums.", width=7.2)[0]
    bars(axes, list(range(len(done))), [estimate(arm) for arm in done.values()], 0.7, "")
    axes.set_xticks(range(len(done)), done, rotation=30, ha="right")
    axes.set_ylabel("accuracy, %")
    page.text(_cold_starts(cold))
    flexible = done["base, CoT"][0].summary["flexible"]
    gain = difference(done["rSIM"], done["base, CoT"])
    best = max(_CONTROLS, key=lambda kind: estimate(done[kind]).mean)
    page.text(f"The base boxes no answer; its last number is right for {percent(flexible)} of the questions.")
    other, control = (difference(done["rSIM"], done[name]) for name in ("GRPO alone", best))
    page.text(f"rSIM minus base: {points(gain)} points; minus GRPO alone: {points(other)}; "
              f"minus the best control ({best}): {points(control)}.")  # fmt: skip
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    page.value("base, CoT: right by its last number, boxed or not", round(100 * flexible, 1), unit="%")
    page.measured("rSIM minus base, CoT", gain, goal="at least 30 points", met=gain.mean >= 0.3)
    return page


def _reasoner(start: Path) -> str:
    return str(start / "checkpoints" / "final" / "reasoner")


def _cold_starts(runs: list[Path]) -> str:
    first = [next(r for r in records(run) if r["stage"] == "cold_start") for run in runs]
    formatted = ", ".join(f"{r['cold_start/format_rate']:.0%}" for r in first)
    kept = ", ".join(f"{r['cold_start/kept']:.0f} of {r['cold_start/sampled']:.0f}" for r in first)
    return (f"Cold start: with worked examples before the question {formatted} of the episodes under the random planner were "
            f"well formatted; {kept} were wrong besides and were learned, without the examples.")  # fmt: skip


LIMITS = """A dequantised 4-bit copy of a model of 135 million parameters, on sums: nothing here speaks of larger models or of
reasoning in words. GRPO alone has the preset's learning rate, not one tuned for it. The base was told to box its answer
and does not: most of what is gained over it is the habit of doing so. The reasoner prompted to choose for itself was not
tried as a control."""
