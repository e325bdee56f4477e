"""Reward parts, removed one at a time."""

from __future__ import annotations

from studies.ablation import ablate
from studies.page import Page
from studies.workbench import Workbench

_PARTS = ("format", "follow", "terminal", "penalty")


def run(bench: Workbench) -> Page:
    page = Page("rewards", "Rewards: one part removed at a time", bench)
    arms: dict[str, tuple[str, ...]] = {"all parts": ()}
    arms |= {f"without {part}": (f"rewards.{part}=0",) for part in _PARTS}
    arms["accuracy alone"] = tuple(f"rewards.{part}=0" for part in _PARTS)
    ablate(page, bench, arms, "all parts")
    return page


LIMITS = """The lab's base writes well-formatted steps that follow their prompt before any training, so the parts that
pay for form have little left to teach here; with a base that does not, they may matter more. One budget of training,
the preset's."""
