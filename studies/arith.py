"""A real model on sums of two or three numbers: SmolLM2-135M-Instruct, base, cold start, GRPO alone, rSIM, controls."""

from __future__ import annotations

import json
from pathlib import Path

from rsim.config import load_config
from rsim.runs.folder import records
from studies.arms import controls_of, measure_arms
from studies.page import Page, gain, percent
from studies.stats import difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint

ISSUE = 6
LIMITS = """A dequantised 4-bit copy of a model of 135 million parameters, on sums: nothing here speaks of larger models or of
reasoning in words. GRPO alone has the preset's learning rate, not one tuned for it. The base was told to box its answer
and does not: a part of what is gained over it is the habit of doing so. The reasoner prompted to choose for itself was not
tried as a control."""

_PRESET = "smollm2-arith"
_CONTROLS = ("random", "fixed", "sequence", "wait")
_SEARCHED = 32  # dev problems on which a control is picked
_NO_STAGES = ("stages.stage1.steps=0", "stages.stage2.steps=0", "train.eval_every=0")
_ALONE = 'models.planner="none"'
_BUDGET = "train.token_budget=150000"  # of rSIM and of GRPO alone, after the cold start


def run(bench: Workbench, page: Page) -> None:
    prompts = 'cold_start.teach="prompts"'  # of what GRPO begins with: it has no planner that would inject them
    starts = bench.train([Training(_PRESET, (*_NO_STAGES, *more), seed) for more in ((), (prompts,)) for seed in bench.seeds])
    cold, cold_alone = starts[: len(bench.seeds)], starts[len(bench.seeds) :]
    begun = [(start, more) for begun, more in ((cold, ()), (cold_alone, (_ALONE,))) for start in begun]
    seeds = [*bench.seeds, *bench.seeds]
    runs = bench.train([_goes_on(start, more, seed) for (start, more), seed in zip(begun, seeds, strict=True)])
    rsim, grpo = runs[: len(bench.seeds)], runs[len(bench.seeds) :]
    data = load_config(_PRESET).data.eval

    def measured(run: str, planner: str = "", reasoner: str = "") -> Measurement:
        return Measurement(run, planner, reasoner, data)

    reasoners = [checkpoint(r, "reasoner") for r in rsim]
    arms = {
        "base, CoT": [measured(_PRESET, "none")],
        "base, random planner": [measured(_PRESET, "random")],
        "cold start, random planner": [measured(_PRESET, "random", _reasoner(start)) for start in cold],
        "GRPO's cold start, CoT": [measured(_PRESET, "none", _reasoner(start)) for start in cold_alone],
        "GRPO alone": [measured(checkpoint(r)) for r in grpo],
        "rSIM": [measured(checkpoint(r)) for r in rsim],
        "rSIM's reasoner, CoT": [measured(checkpoint(r), "none") for r in rsim],
    }
    arms |= controls_of(bench, rsim, reasoners, preset=_PRESET, data=data, problems=_SEARCHED, kinds=_CONTROLS)
    done = measure_arms(bench, arms)
    page.text(
        "The controls play with rSIM's reasoner. The cold starts of rSIM and of GRPO alone learn the same episodes, "
        "GRPO's the injected prompts as well; both sample as many tokens after it."
    )
    page.arms(done)
    page.bars("Accuracy on unseen sums.", {"": done})
    page.text(_cold_starts(cold))
    flexible = done["base, CoT"][0].summary["flexible"]
    best = max(_CONTROLS, key=lambda kind: estimate(done[kind]).mean)
    base, other, control = (gain(done["rSIM"], done[name]) for name in ("base, CoT", "GRPO alone", best))
    page.text(f"The base boxes no answer; its last number is right for {percent(flexible)} of the questions.")
    page.text(
        f"rSIM minus base: {base} points; minus GRPO alone: {other}; "
        f"minus the best control with rSIM's reasoner ({best}): {control}."
    )
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    page.value("base, CoT: right by its last number, boxed or not", round(100 * flexible, 1), unit="%")
    gained = difference(done["rSIM"], done["base, CoT"])
    page.measured("rSIM minus base, CoT", gained, goal="at least 30 points", met=gained.mean >= 0.3)


def _goes_on(start: Path, more: tuple[str, ...], seed: int) -> Training:
    begins = f"models.reasoner={json.dumps(_reasoner(start))}"
    return Training(_PRESET, (begins, "cold_start.episodes=0", _BUDGET, *more), seed)


def _reasoner(start: Path) -> str:
    return str(start / "checkpoints" / "final" / "reasoner")


def _cold_starts(runs: list[Path]) -> str:
    first = [next(r for r in records(run) if r["stage"] == "cold_start") for run in runs]
    formatted = ", ".join(f"{r['cold_start/format_rate']:.0%}" for r in first)
    kept = ", ".join(f"{r['cold_start/kept']:.0f} of {r['cold_start/sampled']:.0f}" for r in first)
    return (
        f"Cold start: with worked examples before the question {formatted} of the episodes under the random planner were "
        f"well formatted; {kept} were wrong besides and were learned, without the examples."
    )
