"""Is it the planner? The trained planner against every control, with the reasoner it was trained with and with another."""

from __future__ import annotations

from studies.arms import CONTROLS, Arms, alone, controls_of, grpo_runs, measure_arms, planned, plugged, rsim_runs
from studies.page import Page, bars, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Workbench, checkpoint


def run(bench: Workbench) -> Page:
    page = Page("controls", "Controls: is it the planner?", bench)
    runs = rsim_runs(bench)
    grpo, labelled = grpo_runs(bench, runs), grpo_runs(bench, runs, preset="nano-sft-grpo")
    trained = [checkpoint(r, "reasoner") for r in runs]
    own = measure_arms(bench, {
        "trained planner": [planned(r) for r in runs],
        "oracle": [Measurement(checkpoint(r), "oracle") for r in runs],
        "CoT": [Measurement(checkpoint(r), "none") for r in runs],
        **controls_of(bench, runs, trained),
    })  # fmt: skip
    base = measure_arms(bench, {
        "trained planner": [plugged(r) for r in runs],
        "oracle": [Measurement("nano", "oracle")],
        "CoT": [alone()],
        **controls_of(bench, runs, ["nano-s"] * len(runs)),
    })  # fmt: skip
    others = measure_arms(bench, {
        "rSIM": [planned(r) for r in runs],
        "GRPO alone": [Measurement(checkpoint(r)) for r in grpo],
        "fine-tuning on labelled steps, then GRPO": [Measurement(checkpoint(r)) for r in labelled],
        "base, self-consistency at rSIM's tokens": [Measurement("nano", "none", match_tokens="rSIM/0")],
        "GRPO alone, self-consistency at rSIM's tokens": [
            Measurement(checkpoint(r), match_tokens=f"rSIM/{i}") for i, r in enumerate(grpo)
        ],
    })  # fmt: skip
    page.text("## Co-trained: the reasoner of the run")
    page.arms(own)
    page.text("## Plug-in: the untrained reasoner")
    page.arms(base)
    axes = page.figure("bars", "The trained planner and the controls.", width=7.2)[0]
    for place, (use, arms) in enumerate({"co-trained": own, "plug-in": base}.items()):
        xs = [i + 0.38 * (place - 0.5) for i in range(len(arms))]
        bars(axes, xs, [estimate(arm) for arm in arms.values()], 0.36, use)
    axes.set_xticks(range(len(own)), own, rotation=30, ha="right")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)
    page.text("## Without a planner, at equal training tokens")
    page.arms(others)
    _compare(page, "co-trained", own)
    _compare(page, "plug-in", base)
    for name, arm in others.items():
        page.measured(name, estimate(arm))
    return page


def _compare(page: Page, use: str, arms: Arms) -> None:
    best = max(CONTROLS, key=lambda kind: estimate(arms[kind]).mean)
    gain = difference(arms["trained planner"], arms[best])
    page.text(f"{use.capitalize()}: the trained planner minus the best control ({best}): {points(gain)} points.")
    for name, arm in arms.items():
        page.measured(f"{use}: {name}", estimate(arm))
    page.measured(
        f"{use}: trained planner above the best control ({best})", gain, goal="at least 3 points", met=gain.mean >= 0.03
    )


LIMITS = """These are tiny models on a procedural lab whose steps were made so that the right strategy depends on the
state; a selector is worth a lot there by construction. The best fixed strategy, sequence and number of waits are picked
on 100 to 200 dev problems by search, not by an exhaustive one. The prompted control asks a model that was pre-trained
on the planner's template, but never to follow instructions."""
