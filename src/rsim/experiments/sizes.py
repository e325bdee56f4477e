"""Figure 3: reasoner sizes x {CoT, + GRPO, + rSIM, + a planner that was trained with another size}."""

from __future__ import annotations

from rsim.experiments.arms import alone, grpo_runs, measure_arms, planned, plugged, rsim_runs
from rsim.experiments.page import Page, bars, points
from rsim.experiments.stats import difference, estimate
from rsim.experiments.workbench import Measurement, Training, Workbench, checkpoint
from rsim.lab.pretrain import SIZES
from rsim.models import load_reasoner
from rsim.training.run_folder import sampled_tokens

# GRPO on nano-l: minutes a step.
_LARGE_STEPS = ("stages.grpo.steps=6", "train.eval_every=2", "cold_start.episodes=0")


def run(bench: Workbench) -> Page:
    page = Page("fig3", "Sizes: a small reasoner with a planner against larger ones", bench)
    names = [bench.base(name) for name in ("nano-s", "nano-m", "nano-l")]
    parameters = {name: load_reasoner(name).model.num_parameters() for name in names}
    small = rsim_runs(bench)
    medium = rsim_runs(bench, 'models.reasoner="nano-m"')
    grpo_small, grpo_medium = grpo_runs(bench, small), grpo_runs(bench, medium, 'models.reasoner="nano-m"')
    grpo_large = bench.train([Training("nano-grpo", ('models.reasoner="nano-l"', *_LARGE_STEPS), bench.seeds[0])])
    arms = {f"{name}, CoT": [alone(name)] for name in names}
    arms |= {
        "nano-s, + GRPO": [Measurement(checkpoint(r)) for r in grpo_small],
        "nano-m, + GRPO": [Measurement(checkpoint(r)) for r in grpo_medium],
        "nano-l, + GRPO (one seed)": [Measurement(checkpoint(r)) for r in grpo_large],
        "nano-s, + rSIM": [planned(r) for r in small],
        "nano-m, + rSIM": [planned(r) for r in medium],
        "nano-m, + planner of nano-s": [plugged(r, "nano-m") for r in small],
        "nano-l, + planner of nano-s": [plugged(r, "nano-l") for r in small],
        "nano-l, oracle planner": [Measurement("nano", "oracle", "nano-l")],
        "nano-s, oracle planner": [Measurement("nano", "oracle")],
    }
    done = measure_arms(bench, arms)
    page.text(_sizes(parameters, sampled_tokens(grpo_large[0])))
    page.arms(done)
    axes = page.figure("sizes", "Accuracy on unseen lab problems; bars over seeds.")[0]
    for place, method in enumerate(("CoT", "+ GRPO", "+ rSIM", "+ planner of nano-s")):
        found = {i: estimate(done[key]) for i, n in enumerate(names) for key in done if key.startswith(f"{n}, {method}")}
        bars(axes, [i + 0.2 * (place - 1.5) for i in found], list(found.values()), 0.18, method)
    axes.set_xticks(range(len(names)), [f"{n}\n{parameters[n] / 1e6:.2g} M" for n in names])
    axes.set_ylabel("accuracy, %")
    axes.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    ratio = parameters["nano-l"] / parameters["nano-s"]
    gap = difference(done["nano-l, CoT"], done["nano-s, CoT"])
    lead = difference(done["nano-s, + rSIM"], done["nano-l, CoT"])
    page.text(f"nano-s + rSIM minus the greedy CoT of nano-l ({ratio:.1f} times its size): {points(lead)} points. "
              f"CoT of nano-l minus CoT of nano-s: {points(gap)} points.")  # fmt: skip
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    page.value("nano-l / nano-s, parameters", round(ratio, 1), unit="x", goal="at least 20", met=ratio >= 20)
    void = gap.mean < 0.1
    page.measured("CoT of nano-l minus CoT of nano-s", gap, goal="at least 10 points, or the next row is void", met=not void)
    page.measured("nano-s + rSIM minus CoT of nano-l", lead, goal="at least 0", met=lead.mean >= 0 and not void)
    lift = {n: estimate(done[f"{n}, + planner of nano-s"]).mean / estimate(done[f"{n}, CoT"]).mean - 1 for n in names[1:]}
    for name, value in lift.items():
        page.value(f"{name}: relative lift by the frozen planner of nano-s, never seen in training", round(100 * value, 1),
                   unit="%", goal="at least 20%", met=value >= 0.2)  # fmt: skip
    return page


def _sizes(parameters: dict[str, int], large_tokens: int) -> str:
    rows = ", ".join(f"{name} {count / 1e6:.2f} M ({SIZES[name].steps:,} steps)" for name, count in parameters.items())
    return (
        f"Parameters and pre-training: {rows}; the same writer of documents for all, 48 documents a step. All answer the same "
        "questions with the same prompt. GRPO on nano-l had one seed, the preset's learning rate, and only "
        f"{large_tokens:,} sampled tokens."
    )


LIMITS = """The sizes differ by a factor of 22, but the largest has 8 million parameters. The bases saw different numbers of
documents (steps above), from the same writer. GRPO on nano-l is one short run that nobody tuned: read that row as a lower
bound. The lab's writer makes its most likely step often a poor one, so greedy CoT follows poor habits at every size; text
written by people need not."""
