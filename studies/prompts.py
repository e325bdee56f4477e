"""How much hangs on the wording of the injected prompts: each paraphrase alone, mixed, and some that no one saw in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from rsim.policies.strategies import Strategy, load_strategies
from studies.arms import measure_arms, rsim_runs, write_set
from studies.page import Page
from studies.stats import estimate
from studies.workbench import Measurement, Workbench, checkpoint

_UNSEEN = {
    "self-reflection": "Again:", "decomposition": "Break it up:", "deliberation": "Slowly now:", "validation": "Is it so?",
    "summarization": "All in all:", "prioritization": "Before that:", "sub-planning": "In short form:", "continuation": "Then:",
    "termination": "So the answer:",
}  # fmt: skip


def run(bench: Workbench) -> Page:
    page = Page("prompts", "Wording: paraphrases of the injected prompts", bench)
    runs = rsim_runs(bench)
    sets: dict[str, Callable[[Strategy], tuple[str, ...]]] = {
        "both, at random (as in training)": lambda s: s.prompts,
        "the first alone": lambda s: s.prompts[:1],
        "the second alone": lambda s: s.prompts[1:],
        "unseen wording": lambda s: (_UNSEEN[s.name],),
    }
    arms: dict[str, list[Measurement]] = {}
    for name, pick in sets.items():
        file = bench.out / "strategies" / f"{name.split(',')[0].replace(' ', '-')}.toml"
        written = write_set(file, [replace(s, prompts=pick(s)) for s in load_strategies("lab").strategies])
        change = (f"models.strategies={json.dumps(written)}",)
        arms[f"trained reasoner, {name}"] = [Measurement(checkpoint(r), changes=change) for r in runs]
        arms[f"untrained reasoner, {name}"] = [
            Measurement("nano", checkpoint(r, "planner"), "nano-s", changes=change) for r in runs
        ]
    done = measure_arms(bench, arms)
    page.arms(done)
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    for reasoner in ("trained reasoner", "untrained reasoner"):
        seen = [estimate(done[f"{reasoner}, {name}"]).mean for name in list(sets)[:3]]
        page.value(f"{reasoner}: spread over wordings seen in training", round(100 * (max(seen) - min(seen)), 1), unit="points")
    return page


LIMITS = """The lab's prompts are single tokens with one meaning each; the unseen wordings are spelled letter by letter,
which the base hardly ever read. Between this and the paraphrases of an LLM's prompts lies a wide field."""
