"""Long runs at each one's tuned rate: do GRPO alone and rSIM end below the best that they reached? (docs/protocol.md)"""

from __future__ import annotations

from studies.arms import measure_arms
from studies.claims import BUDGETS, trained
from studies.page import Page
from studies.stats import difference, estimate
from studies.workbench import Measurement, Workbench, checkpoint

ISSUE = 10
LIMITS = """The rates were tuned at 200,000 tokens and are constant; a schedule that decays, a KL term or other remedies were
tried for neither side. The best checkpoint is picked on held-out problems and measured, as the last, on others."""

_TOKENS = 2_000_000
_WHICH = ("final", "best")


def run(bench: Workbench, page: Page) -> None:
    page.text(f"The runs of [claims](claims.md), carried on to {_TOKENS:,} sampled tokens.")
    for name in ("rSIM", "GRPO alone"):
        runs = trained(bench, name, (*BUDGETS, _TOKENS))[_TOKENS]
        arms = {f"{name}, {which} checkpoint": [Measurement(checkpoint(r, which=which)) for r in runs] for which in _WHICH}
        done = measure_arms(bench, arms)
        page.arms(done)
        for arm, found in done.items():
            page.measured(arm, estimate(found))
        final, best = done.values()
        page.measured(f"{name}: final minus dev-best checkpoint", difference(final, best))
        fell = sum(b.accuracy - f.accuracy > 0.05 for f, b in zip(final, best, strict=True))
        page.value(f"{name}: seeds that end more than 5 points below their dev-best checkpoint", fell)
