"""Cost-aware planning: a price for tokens in the planner's reward; and how well the planner's confidence is calibrated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from rsim.policies.strategies import load_strategies
from studies.ablation import ablate
from studies.arms import measure_arms, planned, write_set
from studies.page import Page, percent, points
from studies.stats import difference, estimate
from studies.workbench import Measured, Training, Workbench, episodes

_PRICES = (0.0, 0.1, 0.3, 0.6)
_FREE = "a continuation without a prompt"
_IN_THE_HEAD = {
    "sums in the head": "sequence:sub-planning,prioritization,decomposition,decomposition,summarization,termination",
    "all in the head": "sequence:sub-planning,prioritization,continuation,continuation,continuation,termination",
}
_GATES = (0.5, 0.7, 0.9, 0.99)
_BINS = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)


def run(bench: Workbench) -> Page:
    page = Page("cost", "What planning costs, and how sure the planner is", bench, issue=8)
    names = {price: "free tokens (the preset)" if not price else f"{price:g} for 100 tokens" for price in _PRICES}
    arms: dict[str, tuple[str, ...]] = {name: (f"rewards.token_price={p}",) if p else () for p, name in names.items()}
    arms[_FREE] = (f"models.strategies={json.dumps(_free_continuation(bench.out / 'sets'))}",)
    done = ablate(page, bench, arms, names[0.0], which="final")
    page.text("Runs are measured where they end, not at their best checkpoint by held-out accuracy, which knows no price.")
    left, right = page.figure("curves", "Accuracy against tokens; and how often the planner is right when it is sure.", 2, 7.2)
    for name, arm in done.items():
        e = estimate(arm)
        left.errorbar(
            _tokens(arm), 100 * e.mean, yerr=[[100 * (e.mean - e.low)], [100 * (e.high - e.mean)]], fmt="o", label=name
        )
    left.set_xlabel("tokens a question, sampled and injected")
    left.set_ylabel("accuracy, %")
    left.legend(frameon=False, fontsize=7)
    sure, right_share, count = _reliability(done[names[0.0]])
    right.plot([0, 100], [0, 100], color="0.7", lw=0.8)
    right.plot([100 * s for s in sure], [100 * r for r in right_share], "o-")
    right.set_xlabel("the planner's probability of what it chose, %")
    right.set_ylabel("episodes answered right, %")
    page.text("Decisions of the planner that pays nothing for tokens, by its probability of what it chose (greedy), and "
              "the share of their episodes that were answered right:")  # fmt: skip
    page.table(
        ["", "decisions", "mean probability", "answered right"],
        [[f"{low:.0%} to {high:.0%}", f"{n:,}", percent(s), percent(r)]
         for low, high, n, s, r in zip(_BINS, _BINS[1:], count, sure, right_share, strict=False) if n],
    )  # fmt: skip
    total = sum(count)
    error = sum(n * abs(s - r) for n, s, r in zip(count, sure, right_share, strict=True) if n) / total
    page.value("expected calibration error of the planner's confidence", round(error, 3), unit="share")
    _gates(page, bench, done[names[0.0]])
    _shorter(page, bench, done[names[0.0]])
    base = _tokens(done[names[0.0]])
    for name, arm in done.items():
        saved = 1 - _tokens(arm) / base
        page.value(f"{name}: tokens a question", round(_tokens(arm), 1), unit="tokens")
        if name != names[0.0]:
            lost = -difference(arm, done[names[0.0]]).mean
            page.value(f"{name}: tokens saved", round(100 * saved, 1) + 0.0, unit="%",  # no -0
                       goal="30% fewer, at most 1 point of accuracy lost", met=saved >= 0.3 and lost <= 0.01)  # fmt: skip
    return page


def _gates(page: Page, bench: Workbench, free: list[Measured]) -> None:
    """The planner that pays nothing for tokens, with a gate: below it nothing is injected."""
    runs = bench.train([Training("nano", (), seed) for seed in bench.seeds])
    gates = {gate: [replace(planned(r, "final"), changes=(f"rollout.gate={gate}",)) for r in runs] for gate in _GATES}
    done = {0.0: free} | {float(gate): arm for gate, arm in measure_arms(bench, {str(g): m for g, m in gates.items()}).items()}
    rows = []
    for gate, arm in done.items():
        found, lost = estimate(arm), difference(arm, free)
        rows.append([f"{gate:.0%}" if gate else "none", percent(found.mean), points(lost) if gate else "",
                     percent(_injected(arm, gate)), f"{_tokens(arm):.0f}"])  # fmt: skip
        if gate:
            page.measured(f"gate at {gate:.0%}: accuracy", found)
    page.text("The same planner with a gate (`rollout.gate`): where its choice is less likely than that, nothing is injected, "
              "and the reasoner goes on by itself.")  # fmt: skip
    page.table(["gate", "accuracy", "minus no gate, points", "decisions that are injected", "tokens / question"], rows)


def _shorter(page: Page, bench: Workbench, free: list[Measured]) -> None:
    """The reasoner that was trained with the planner, led by others."""
    runs = bench.train([Training("nano", (), seed) for seed in bench.seeds])
    others = {"the lab's oracle": "oracle"} | _IN_THE_HEAD
    done = measure_arms(
        bench, {name: [replace(planned(r, "final"), planner=spec) for r in runs] for name, spec in others.items()}
    )
    sequences = "; ".join(f"*{name}*: {spec.removeprefix('sequence:')}" for name, spec in _IN_THE_HEAD.items())
    page.text("Other ways with the same reasoner: the lab's oracle, and sequences, the same for all questions, that join "
              f"numbers in the head ({sequences}).")  # fmt: skip
    rows = [["the planner", percent(estimate(free).mean), f"{_tokens(free):.0f}"]]
    for name, arm in done.items():
        rows.append([name, percent(estimate(arm).mean), f"{_tokens(arm):.0f}"])
        page.measured(f"{name}: accuracy", estimate(arm))
    page.table(["", "accuracy", "tokens / question"], rows)


def _injected(arm: list[Measured], gate: float) -> float:
    """The share of the planner's decisions that reach the gate."""
    return float(np.mean([c >= gate for c, _ in _decisions(arm)]))


def _free_continuation(folder: Path) -> str:
    """The file of the lab's nine with a continuation whose prompt is empty."""
    nine = load_strategies("lab").strategies
    free = [replace(s, prompts=("",)) if s.name == "continuation" else s for s in nine]
    return write_set(folder / "free-continuation.toml", free)


def _tokens(arm: list[Measured]) -> float:
    return float(np.mean([m.summary["tokens_per_question"] for m in arm]))


def _decisions(arm: list[Measured]) -> list[tuple[float, float]]:
    """For each decision: the probability of what was chosen, and whether its episode was answered right."""
    return [
        (max(step["probabilities"]), float(episode["correct"]))
        for measured in arm
        for episode in episodes(measured.folder)
        for step in episode["steps"]
        if step["probabilities"]
    ]


def _reliability(arm: list[Measured]) -> tuple[list[float], list[float], list[int]]:
    """For each bin of confidence: its mean, the share of right episodes, and how many decisions."""
    confidence, right = np.array(_decisions(arm)).T
    places = np.clip(np.digitize(confidence, _BINS) - 1, 0, len(_BINS) - 2)
    chosen = [places == i for i in range(len(_BINS) - 1)]
    means = [(float(confidence[c].mean()), float(right[c].mean())) if c.any() else (0.0, 0.0) for c in chosen]
    return [m for m, _ in means], [r for _, r in means], [int(c.sum()) for c in chosen]


LIMITS = """Episodes of the lab are short, and most of their tokens are digits that the answer needs. The planner was never
trained to be calibrated; its probability says how often it would choose so, and is held here against what the episode came to,
which also depends on everything after the decision."""
