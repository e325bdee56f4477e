"""Figure 3: reasoner sizes x {CoT, + GRPO, + rSIM, + a planner that was trained with another size}."""

from __future__ import annotations

from rsim.lab.pretrain import SIZES
from rsim.policies.loading import load_reasoner
from studies.arms import alone, grpo_runs, measure_arms, planned, plugged, rsim_runs
from studies.page import Page, gain, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Workbench, checkpoint

ISSUE = 4
LIMITS = """The sizes differ by a factor of 25, but the largest has 1.7 million parameters, and each saw as many documents
as its row says. The lab's writer is hasty with long sums, and none of the three learnt to do them in the head (nano-s gets 1%
right, nano-m 3%), so the CoT of nano-s and nano-m is the same, and more size alone would not lift it; text written by people
need not be so. Training at 3e-4 does not suit nano-m either: the frozen planner alone does more for it than either training."""

_NAMES = ("nano-xs", "nano-s", "nano-m")
# The preset's rate shakes a reasoner this small (held-out accuracy falls again); picked on dev problems, seed 0.
_SLOWER = "train.reasoner_lr=1e-4"
_METHODS = ("CoT", "+ GRPO", "+ rSIM", "+ planner of nano-xs")


def run(bench: Workbench, page: Page) -> None:
    parameters = {name: load_reasoner(bench.base(name)).model.num_parameters() for name in _NAMES}
    changes = {
        "nano-xs": ('models.reasoner="nano-xs"', 'models.planner="nano-xs"', _SLOWER),
        "nano-s": (),
        "nano-m": ('models.reasoner="nano-m"',),
    }
    rsim = {name: rsim_runs(bench, *changes[name]) for name in _NAMES}
    arms = {f"{name}, CoT": [alone(name)] for name in _NAMES}
    for name in _NAMES:
        arms[f"{name}, + GRPO"] = [Measurement(checkpoint(r)) for r in grpo_runs(bench, rsim[name], *changes[name][:1])]
    slower = grpo_runs(bench, rsim["nano-xs"], 'models.reasoner="nano-xs"', _SLOWER)
    arms["nano-xs, + GRPO, rate 1e-4"] = [Measurement(checkpoint(r)) for r in slower]
    arms |= {f"{name}, + rSIM": [planned(r) for r in rsim[name]] for name in _NAMES}
    arms |= {f"{name}, + planner of nano-xs": [plugged(r, name) for r in rsim["nano-xs"]] for name in _NAMES}
    arms |= {f"{name}, oracle planner": [Measurement("nano", "oracle", name)] for name in _NAMES}
    done = measure_arms(bench, arms)
    page.text(_sizes(parameters))
    page.arms(done)
    methods = {m: {name: done[f"{name}, {m}"] for name in _NAMES} for m in _METHODS}
    page.bars("Accuracy on unseen lab problems; bars over seeds.", methods)
    small, large = _NAMES[0], _NAMES[-1]
    ratio = parameters[large] / parameters[small]
    gap = difference(done[f"{large}, CoT"], done[f"{small}, CoT"])
    lead = difference(done[f"{small}, + rSIM"], done[f"{large}, CoT"])
    trained = gain(done[f"{small}, + rSIM"], done[f"{large}, + GRPO"])
    page.text(
        f"{small} + rSIM minus the greedy CoT of {large} ({ratio:.1f} times its size): {points(lead)} points. CoT of "
        f"{large} minus CoT of {small}: {points(gap)} points. {small} + rSIM minus {large} + GRPO: {trained} points."
    )
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    page.value(f"{large} / {small}, parameters", round(ratio, 1), unit="x", goal="at least 20", met=ratio >= 20)
    void = gap.mean < 0.1
    page.measured(f"CoT of {large} minus CoT of {small}", gap, goal="at least 10 points, or the next row is void", met=not void)
    page.measured(f"{small} + rSIM minus CoT of {large}", lead, goal="at least 0", met=lead.mean >= 0 and not void)
    for name in _NAMES[1:]:
        lift = estimate(done[f"{name}, + planner of nano-xs"]).mean / estimate(done[f"{name}, CoT"]).mean - 1
        what = f"{name}: relative lift by the frozen planner of nano-xs, never seen in training"
        page.value(what, round(100 * lift, 1), "%", goal="at least 20%", met=lift >= 0.2)


def _sizes(parameters: dict[str, int]) -> str:
    rows = ", ".join(f"{name} {count / 1e6:.2f} M ({SIZES[name].steps:,} steps)" for name, count in parameters.items())
    return (
        f"Parameters and pre-training: {rows}; the same documents in the same order for all, 48 a step. All answer the same "
        "questions with the same prompt. rSIM on nano-xs has a planner of nano-xs too; on the others it has nano-s. "
        "GRPO sampled the tokens that the rSIM run of its size did. Learning rates of the reasoner: the preset's 3e-4, but "
        "1e-4 for rSIM on nano-xs; GRPO on nano-xs is shown with both."
    )
