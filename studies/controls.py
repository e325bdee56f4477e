"""Is it the planner? The trained planner against every control, with the reasoner it was trained with and with another."""

from __future__ import annotations

from studies.arms import CONTROLS, Arms, alone, controls_of, grpo_runs, measure_arms, planned, plugged, rsim_runs
from studies.page import Page, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Workbench, checkpoint

ISSUE = 4
LIMITS = """These are tiny models on a procedural lab whose steps were made so that the right strategy depends on the
state; a selector is worth a lot there by construction. The best fixed strategy, sequence and number of waits are picked
on 100 to 200 dev problems by search, not by an exhaustive one. The prompted control asks a model that was pre-trained
on the planner's template, but never to follow instructions."""


def run(bench: Workbench, page: Page) -> None:
    runs = rsim_runs(bench)
    grpo, labelled = grpo_runs(bench, runs), grpo_runs(bench, runs, preset="nano-sft-grpo")
    own = {
        "trained planner": [planned(r) for r in runs],
        "oracle": [Measurement(checkpoint(r), "oracle") for r in runs],
        "CoT": [Measurement(checkpoint(r), "none") for r in runs],
    }
    base = {
        "trained planner": [plugged(r) for r in runs],
        "oracle": [Measurement("nano", "oracle")],
        "CoT": [alone()],
    }
    voting = [Measurement(checkpoint(r), match_tokens=f"rSIM/{i}") for i, r in enumerate(grpo)]
    others = {
        "rSIM": [planned(r) for r in runs],
        "GRPO alone": [Measurement(checkpoint(r)) for r in grpo],
        "fine-tuning on labelled steps, then GRPO": [Measurement(checkpoint(r)) for r in labelled],
        "base, self-consistency at rSIM's tokens": [Measurement("nano", "none", match_tokens="rSIM/0")],
        "GRPO alone, self-consistency at rSIM's tokens": voting,
    }
    trained = [checkpoint(r, "reasoner") for r in runs]
    uses = {
        "co-trained": measure_arms(bench, own | controls_of(bench, runs, trained)),
        "plug-in": measure_arms(bench, base | controls_of(bench, runs, ["nano-s"] * len(runs))),
    }
    done = measure_arms(bench, others)
    page.text("## Co-trained: the reasoner of the run")
    page.arms(uses["co-trained"])
    page.text("## Plug-in: the untrained reasoner")
    page.arms(uses["plug-in"])
    page.bars("The trained planner and the controls.", uses)
    page.text("## Without a planner, at equal training tokens")
    page.arms(done)
    for use, arms in uses.items():
        _compare(page, use, arms)
    for name, arm in done.items():
        page.measured(name, estimate(arm))


def _compare(page: Page, use: str, arms: Arms) -> None:
    best = max(CONTROLS, key=lambda kind: estimate(arms[kind]).mean)
    lead = difference(arms["trained planner"], arms[best])
    page.text(f"{use.capitalize()}: the trained planner minus the best control ({best}): {points(lead)} points.")
    for name, arm in arms.items():
        page.measured(f"{use}: {name}", estimate(arm))
    what = f"{use}: trained planner above the best control ({best})"
    page.measured(what, lead, "at least 3 points", met=lead.mean >= 0.03)
