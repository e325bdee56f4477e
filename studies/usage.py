"""Figure 1: which strategies a reasoner uses by itself, before and after GRPO, and which ones the planner chooses."""

from __future__ import annotations

from collections import Counter

from rsim.policies.strategies import StrategySet, load_strategies
from studies.arms import alone, grpo_runs, measure_arms, planned, rsim_runs
from studies.page import Page, percent
from studies.stats import estimate
from studies.workbench import Measured, Measurement, Workbench, checkpoint, episodes


def run(bench: Workbench) -> Page:
    page = Page("fig1", "Strategies used before and after GRPO, and by the planner", bench)
    strategies = load_strategies("lab")
    runs = rsim_runs(bench)
    grpo = grpo_runs(bench, runs)
    done = measure_arms(bench, {
        "base, CoT": [alone()],
        "GRPO alone, CoT": [Measurement(checkpoint(r)) for r in grpo],
        "rSIM": [planned(r) for r in runs],
        "base, oracle planner": [Measurement("nano", "oracle")],
    })  # fmt: skip
    used = {name: _per_question(arm, strategies) for name, arm in done.items()}
    page.text("Steps of each kind per question. Without a planner, a step counts for the strategy whose prompt the reasoner "
              "wrote; with one, for the strategy that was injected.")  # fmt: skip
    rows = [[s, *(f"{counts[s]:.2f}" for counts in used.values())] for s in strategies.names]
    rows.append(["all", *(f"{sum(counts.values()):.2f}" for counts in used.values())])
    rows.append(["accuracy", *(percent(estimate(arm).mean) for arm in done.values())])
    page.table(["", *used], rows)
    axes = page.figure("usage", "Steps of each kind per question.", width=7.2)[0]
    for place, (name, counts) in enumerate(used.items()):
        xs = [i + 0.2 * (place - 1.5) for i in range(len(strategies))]
        axes.bar(xs, [counts[s] for s in strategies.names], 0.18, label=name)
    axes.set_xticks(range(len(strategies)), strategies.names, rotation=30, ha="right")
    axes.set_ylabel("steps per question")
    axes.legend(frameon=False)
    for name, counts in used.items():
        page.measured(f"{name}: accuracy", estimate(done[name]))
        for strategy in strategies.names:
            page.value(f"{name}: {strategy} per question", round(counts[strategy], 3))
    return page


def _per_question(arm: list[Measured], strategies: StrategySet) -> dict[str, float]:
    """Mean number of steps of each kind per question, over all evaluations of an arm."""
    counts: Counter[str] = Counter()
    questions = 0
    for measured in arm:
        for episode in episodes(measured.folder):
            questions += 1
            if episode["strategies"]:
                counts.update(episode["strategies"])
            else:
                counts.update(_written(episode["steps"][0]["text"], strategies))
    return {name: counts[name] / questions for name in strategies.names}


def _written(text: str, strategies: StrategySet) -> list[str]:
    """The strategy of each line of a chain of thought, by the prompt that it begins with; other lines are left out."""
    return [s.name for line in text.split("\n") for s in strategies.strategies if line.startswith(s.prompts)]


LIMITS = """The lab's base was pre-trained on text in which every step opens with a strategy's prompt, so it names its
strategies by itself; an LLM has to be read with keywords. GRPO and rSIM are compared at the preset's budget of tokens,
not at convergence."""
