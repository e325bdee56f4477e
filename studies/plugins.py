"""The frozen planners of the claims before reasoners of another size and of another family (docs/protocol.md)."""

from __future__ import annotations

from studies.claims import LESS, plugged_into, trained
from studies.page import Page
from studies.workbench import Workbench

ISSUE = 10
LIMITS = """All reasoners were pre-trained on text by the same writer: transfer to reasoners with other habits, or to tasks
that need other skills, is not tested here. The planners saw nano-s alone."""

_REASONERS = ("nano-m", "nano-llama")


def run(bench: Workbench, page: Page) -> None:
    page.text(
        "The runs are those of [claims](claims.md), trained with nano-s (Qwen2's architecture, words as tokens). nano-m has "
        "4.6 times its parameters; nano-llama has Llama's architecture and a tokenizer that spells the strategies' prompts."
    )
    runs = {name: trained(bench, name) for name in ("rSIM", "planner alone", *LESS)}
    for reasoner in _REASONERS:
        plugged_into(bench, page, runs, bench.base(reasoner))
