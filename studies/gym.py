"""A task of reasoning-gym that the nine strategies are not enough for, and what a tenth brings."""

from __future__ import annotations

from rsim.lab.euclid import LARGEST, SOURCE
from studies.outside import Outside, try_tenth
from studies.page import Page
from studies.workbench import Workbench

_GCD = Outside(
    page="gym",
    title="A task of reasoning-gym outside the nine",
    base="nano-d",
    strategies="lab-division",
    new="division",
    task="gcd",
    data=f"60% lab, 40% {SOURCE}",
    asked=SOURCE,
    trial=("objective.usage_weight=0.02",),
    train_size=15_000,  # there are 7,950 such questions to train on
    text="division, which takes up to four divisions of Euclid's algorithm. The task is reasoning-gym's `gcd` with numbers up "
    f"to {LARGEST}, its questions and its verifier. The other steps leave the two numbers as they are, and an answer given "
    "then is a hasty one, by last digits, in the base's text right for 60% of the questions. The preset nano is trained with "
    "the nine on the lab's five families and on gcd (40% of the questions)",
)


def run(bench: Workbench) -> Page:
    return try_tenth(bench, _GCD)


LIMITS = """One task of reasoning-gym, which the base has read worked solutions of, wording and all: a grown planner can call
for what its reasoner knows, and cannot teach it anything. What the base says without division was chosen by us. The candidate
was written by hand; that an LLM would write it is not shown."""
