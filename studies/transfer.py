"""Figure 4: the frozen planner as a plug-in, across model families and task families."""

from __future__ import annotations

from rsim.lab.problems import FAMILIES
from rsim.policies.strategies import load_strategies
from studies.arms import alone, measure_arms, plugged, rsim_runs, used
from studies.page import Page, bars, gain, percent
from studies.stats import difference, estimate
from studies.workbench import Measurement, Workbench

ISSUE = 4
LIMITS = """All tasks are sums, told in different words, and all reasoners were pre-trained on text by the same writer:
transfer to reasoners with other habits, or to tasks that need other skills, is not tested here."""

_REASONERS = ("nano-s", "nano-m", "nano-llama")
_TRAINED_ON = ("story", "arithmetic")


def run(bench: Workbench, page: Page) -> None:
    reasoners = [bench.base(name) for name in _REASONERS]
    runs = rsim_runs(bench)
    arms: dict[str, list[Measurement]] = {}
    for name in reasoners:
        for family in FAMILIES:
            arms[f"{name}, {family}, CoT"] = [alone(name, f"lab:{family}")]
            arms[f"{name}, {family}, planner"] = [plugged(r, name, f"lab:{family}") for r in runs]
    sources = {s: rsim_runs(bench, f'data.train="lab:{s}"', f'data.eval="lab:{s}"') for s in _TRAINED_ON}
    for source, trained in sources.items():
        for family in FAMILIES:
            arms[f"from {source}, {family}"] = [plugged(r, "nano-s", f"lab:{family}") for r in trained]
    done = measure_arms(bench, arms)
    page.text("## Other reasoners, task by task")
    page.text(
        "The planners were trained with nano-s (Qwen2 architecture, words as tokens) on all tasks. nano-llama has "
        "Llama's architecture and another tokenizer, which spells the strategies' prompts."
    )
    rows = []
    for name in reasoners:
        for method in ("CoT", "planner"):
            cells = [estimate(done[f"{name}, {family}, {method}"]) for family in FAMILIES]
            rows.append([f"{name}, {method}", *(percent(e.mean) for e in cells)])
    page.table(["", *FAMILIES], rows)
    caption = "CoT (left bars) and the same frozen planners (right bars) on each task."
    axes = page.figure("families", caption, len(reasoners), 7.2)
    for ax, name in zip(axes, reasoners, strict=True):
        for place, method in enumerate(("CoT", "planner")):
            found = [estimate(done[f"{name}, {family}, {method}"]) for family in FAMILIES]
            bars(ax, [i + 0.38 * (place - 0.5) for i in range(len(FAMILIES))], found, 0.36, method)
        ax.set_xticks(range(len(FAMILIES)), FAMILIES, rotation=40, ha="right")
        ax.set_title(name)
        ax.set_ylim(0, 130)  # room for the legend
        ax.set_yticks(range(0, 101, 20))
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(frameon=False, loc="upper left", ncols=2)
    page.text("## Other tasks: planners trained on one task alone, with nano-s")
    rows = [["CoT", *(percent(estimate(done[f"nano-s, {family}, CoT"]).mean) for family in FAMILIES)]]
    rows += [[f"trained on {s}", *(percent(estimate(done[f"from {s}, {f}"]).mean) for f in FAMILIES)] for s in _TRAINED_ON]
    page.table(["", *FAMILIES], rows)
    page.text("What these planners choose on story problems, as shares of all steps (mean over seeds):")
    names = sorted(load_strategies("lab").names, key=lambda n: -used(done["from story, story"], n))
    rows = [[f"trained on {s}", *(percent(used(done[f"from {s}, story"], n)) for n in names)] for s in _TRAINED_ON]
    page.table(["", *names], rows)
    for name in reasoners[1:]:
        for family in FAMILIES:
            cot, ours = done[f"{name}, {family}, CoT"], done[f"{name}, {family}, planner"]
            page.measured(f"{name}, {family}: frozen planner minus CoT", difference(ours, cot))
    for source in _TRAINED_ON:
        for family in [f for f in FAMILIES if f != source]:
            cot, ours = done[f"nano-s, {family}, CoT"], done[f"from {source}, {family}"]
            lift = estimate(ours).mean / max(estimate(cot).mean, 1e-9) - 1
            page.text(f"{source} to {family}: {gain(ours, cot)} points, {100 * lift:+.0f}% relative.")
            what = f"cross-task, {source} to {family}: relative lift over CoT"
            page.value(what, round(100 * lift, 1), "%", goal="at least 15%", met=lift >= 0.15)
