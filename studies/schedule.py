"""The schedule of lambda: fixed, switched as in the paper, reversed; and the literal form of lambda."""

from __future__ import annotations

from studies.arms import ablate
from studies.page import Page
from studies.workbench import Workbench

ISSUE = 4
LIMITS = """Lambda acts on the learning rates (times 2 lambda and 2 (1 - lambda)), so a schedule is also a schedule of
each agent's rate: an arm that does better may only have had the better rates. The best checkpoint on dev problems is
measured, not the last one."""

_LONGER = ("stages.stage1.steps=12", "stages.stage2.steps=8")


def _lambdas(first: float, second: float) -> tuple[str, ...]:
    return (*_LONGER, f"stages.stage1.lambda={first}", f"stages.stage2.lambda={second}")


_ARMS = {
    "0.7 then 0.3": _lambdas(0.7, 0.3),
    "0.3 then 0.7": _lambdas(0.3, 0.7),
    "fixed at 0.5": _lambdas(0.5, 0.5),
    "fixed at 0.3": _lambdas(0.3, 0.3),
    "fixed at 0.7": _lambdas(0.7, 0.7),
    "0.7 then 0.3, on the loss": (*_lambdas(0.7, 0.3), 'objective.lambda_mode="loss"'),
}


def run(bench: Workbench, page: Page) -> None:
    page.text("12 and 8 steps.")
    ablate(page, bench, _ARMS, "0.7 then 0.3")
