"""Two stages of lambda against one that is fixed, with and without a cold start."""

from __future__ import annotations

from studies.arms import ablate
from studies.page import Page
from studies.tuning import tuned
from studies.workbench import Workbench

ISSUE = 10
LIMITS = """Lambda acts on the learning rates (times 2 lambda and 2 (1 - lambda)), so a schedule is also a schedule of each
agent's rate: an arm that does better may only have had the better rates. These were tuned for 0.7 then 0.3. No arm is a
claim."""

_TOKENS = 200_000
_COLD = "cold_start.episodes=0"


def _lambdas(first: float, second: float, *more: str) -> tuple[str, ...]:
    steps = ("stages.stage1.steps=12", "stages.stage2.steps=1000", f"train.token_budget={_TOKENS}")
    return (*steps, f"stages.stage1.lambda={first}", f"stages.stage2.lambda={second}", *tuned("rsim"), *more)


_ARMS = {
    "0.7 then 0.3": _lambdas(0.7, 0.3),
    "fixed at 0.7": _lambdas(0.7, 0.7),
    "fixed at 0.5": _lambdas(0.5, 0.5),
    "fixed at 0.3": _lambdas(0.3, 0.3),
    "0.7 then 0.3, no cold start": _lambdas(0.7, 0.3, _COLD),
    "fixed at 0.5, no cold start": _lambdas(0.5, 0.5, _COLD),
}


def run(bench: Workbench, page: Page) -> None:
    page.text(f"{_TOKENS:,} sampled tokens a run (12 steps are the first stage), the last checkpoints.")
    ablate(page, bench, _ARMS, "0.7 then 0.3")
