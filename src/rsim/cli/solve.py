"""``rsim solve``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rsim.cli.options import Json, Set, tell


def command(
    question: Annotated[str, typer.Argument()],
    run: Annotated[str, typer.Option(help="A run folder or checkpoint.")] = "runs/nano",
    planner: Annotated[str, typer.Option(help="As in eval; default: the run's.")] = "",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Answer one question greedily, printing each step with its strategy as it is made."""
    from rsim import api

    def on_step(step: dict[str, Any]) -> None:
        if as_json:
            return
        sure = f" {max(step['probabilities']):.0%}" if step["probabilities"] else ""
        label = f"{step['strategy'] or 'reasoner'}{sure:<5}".ljust(22)
        Console().print(Text(label, style="bold cyan") + Text(step["text"].strip()))

    record = api.solve(question, run, planner=planner, overrides=overrides or (), on_step=on_step)
    tell(record, f"answer: {record['predicted']}", as_json)
