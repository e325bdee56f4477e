"""A task of reasoning-gym in the lab's language, ``gym:gcd``: it takes a tenth strategy, *division*.

None of the nine makes anything of two numbers that have no operation between them: such steps leave them as they are. What is
boxed with both of them left is a hasty answer that looks at last digits alone, the common divisor with ten; it is right for
six in ten questions. A *division* step takes up to four divisions of Euclid's algorithm and writes them out.
"""

from __future__ import annotations

import random
from math import gcd

from rsim.game.problem import generated_split
from rsim.lab.behaviour import choose_at
from rsim.lab.steps import WORDS

# The wording is reasoning-gym's; a token each.
GCD_WORDS = (
    "Find the Greatest Common Divisor (GCD) of these numbers: ",
    ". Give only the GCD as your final answer.",
)
LARGEST = 100
_DIVISIONS = 4  # of a step: more of them would not fit into the lab's 64 tokens
SOURCE = f"gym:gcd?max_value={LARGEST}"  # the task as the lab's text has it


def question(numbers: tuple[int, int]) -> str:
    before, after = GCD_WORDS
    return f"{before}{numbers[0]}, {numbers[1]}{after}"


def sample_numbers(rng: random.Random) -> tuple[int, int]:
    """Two numbers of a training question, drawn as reasoning-gym does: up to three times, until they have a common divisor."""
    while True:
        for _ in range(3):
            numbers = (rng.randint(1, LARGEST), rng.randint(1, LARGEST))
            if gcd(*numbers) > 1:
                break
        if generated_split(question(numbers)) == "train":
            return numbers


def write_step(left: tuple[int, ...], strategy: str) -> tuple[str, tuple[int, ...]]:
    """The text of one step and the numbers that are left: two, the common divisor alone, or none after the answer.

    >>> write_step((36, 97), "division")
    (' divide 97-36*2=25 36-25*1=11 25-11*2=3 11-3*3=2 so 3,2', (3, 2))
    """
    if strategy == "termination":
        return f" \\boxed{{{gcd(*left, 10) if len(left) > 1 else left[0]}}}", ()
    if strategy != "division" or len(left) == 1:
        return f" {WORDS[strategy]} so {_shown(left)}", left
    written = []
    a, b = max(left), min(left)
    for _ in range(_DIVISIONS):
        if b:
            written.append(f"{a}-{b}*{a // b}={a % b}")
            a, b = b, a % b
    left = (a, b) if b else (a,)
    return f" divide {' '.join(written)} so {_shown(left)}", left


def write_solution(numbers: tuple[int, int], rng: random.Random, max_steps: int = 12) -> list[tuple[str, str]]:
    """As `rsim.lab.behaviour.write_solution`, by a writer with the same habits."""
    left: tuple[int, ...] = numbers
    steps: list[tuple[str, str]] = []
    while left:
        at = "outside" if len(left) > 1 else "finished"
        strategy = "termination" if len(steps) == max_steps else choose_at(at, rng, tenth="division")
        text, left = write_step(left, strategy)
        steps.append((strategy, text))
    return steps


def _shown(left: tuple[int, ...]) -> str:
    return ",".join(map(str, left))
