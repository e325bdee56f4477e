"""Peak memory of a GRPO step against the tokens of an episode: rsim, rsim with gradient checkpointing, TRL in its two modes.

Each measurement is a process of its own (`studies.step`), loading and optimiser states included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from studies.ledger import Row
from studies.workload import in_child

ISSUE = 3
_SIDES: dict[str, dict[str, Any]] = {
    "rsim": {"side": "rsim"},
    "rsim, gradient checkpointing": {"side": "rsim", "checkpointing": True},
    "TRL": {"side": "trl"},
    "TRL, gradient checkpointing": {"side": "trl", "checkpointing": True},
}


def run(model: str = "smollm2-135m", questions: int = 2, group: int = 8, tokens: tuple[int, int] = (64, 256)) -> Iterator[Row]:
    for length in tokens:
        for name, settings in _SIDES.items():
            common = {"model": model, "count": questions, "group": group, "tokens": length}
            peak = in_child("studies.step", settings | common)["peak"]
            yield Row(f"peak memory of a step, {length} tokens an episode: {name}", round(peak, 2), "GiB")
