"""Finance end to end: SmolLM2-135M-Instruct on TAT-QA, before and after training planner and reasoner together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rsim.config import load_config
from rsim.runs.folder import records, sampled_tokens
from studies.arms import measure_arms
from studies.page import Page, percent, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint

_PRESET, _DATA = "smollm2-tatqa", "tatqa"
_LAST = 10  # steps whose training accuracy is told


def run(bench: Workbench) -> Page:
    page = Page("finance", "SmolLM2-135M on TAT-QA", bench, issue=6)
    runs = bench.train([Training(_PRESET, (), seed) for seed in bench.seeds])
    done = measure_arms(bench, {
        "before, CoT": [Measurement(_PRESET, "none", data=_DATA)],
        "before, random planner": [Measurement(_PRESET, "random", data=_DATA)],
        "after, planned": [Measurement(checkpoint(r), data=_DATA) for r in runs],
        "after, the reasoner alone, CoT": [Measurement(checkpoint(r), "none", data=_DATA) for r in runs],
    })  # fmt: skip
    longest = load_config(_PRESET).data.max_question_tokens
    page.text("Both agents are SmolLM2-135M-Instruct, all weights trained, on those questions of TAT-QA's dev set that have at "
              f"most {longest} tokens; measured on {bench.questions} questions of its test set, of any length, greedily. "
              "TAT-QA's questions with several spans are left out.")  # fmt: skip
    page.arms(done)
    page.text(" ".join(_told(run) for run in runs))
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    before, after = done["before, CoT"], done["after, planned"]
    flexible = before[0].summary["flexible"]
    page.value("before, CoT: right by its last answer, boxed or not", round(100 * flexible, 1), unit="%")
    for name in ("before, CoT", "before, random planner", "after, the reasoner alone, CoT"):
        gain = difference(after, done[name])
        page.text(f"After, planned, minus {name}: {points(gain)} points.")
        page.measured(f"after, planned, minus {name}", gain)
    return page


def _told(run: Path) -> str:
    """What a run's records say: the cold start, its steps, tokens and accuracy at the beginning and in the end."""
    lines = records(run)
    cold = next(r for r in lines if r.get("stage") == "cold_start")
    steps = [r for r in lines if "accuracy" in r]
    first, last = (float(np.mean([r["accuracy"] for r in part])) for part in (steps[:_LAST], steps[-_LAST:]))
    usage = {key.removeprefix("strategy/"): value for key, value in steps[-1].items() if key.startswith("strategy/")}
    most = sorted(usage, key=lambda name: -usage[name])[:2]
    begun = (f"Cold start: {cold['cold_start/format_rate']:.0%} of {cold['cold_start/sampled']:.0f} episodes were well "
             f"formatted, {cold['cold_start/kept']:.0f} that were wrong besides were learned.")  # fmt: skip
    trained = (f"{len(steps)} steps followed, {sampled_tokens(run):,} sampled tokens in all; accuracy while training, mean "
               f"over {_LAST} steps: {percent(first)} at first, {percent(last)} in the end.")  # fmt: skip
    shares = " and ".join(f"{percent(usage[name])} {name}" for name in most)
    return f"{begun} {trained} In the last step {shares} were injected, of all steps, forced endings included."


LIMITS = """One seed of a model of 135 million parameters, dequantised from 4 bits, trained for forty minutes on one core. It
was told to box its answer and does not before training, so some of the gain is that habit; a random planner has the box
opened for it. Trained, it answers only where the planner makes it: alone it never boxes. There is no control trained without
a planner. Answers in words must be the gold answer's words; a longer or a shorter phrase is wrong."""
