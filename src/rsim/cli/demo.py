"""``rsim demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, Quiet, Set


def command(
    out: Annotated[str, typer.Option(help="Folder for the runs.")] = "runs",
    seed: Annotated[int, typer.Option()] = 0,
    questions: Annotated[int, typer.Option(help="Unseen problems in the final table.", min=10)] = 500,
    overrides: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train nano planner and reasoner, compare with controls on unseen problems, write a report."""
    import json

    from rsim.cli.main_job import run_demo

    table = run_demo(Path(out), seed, questions, overrides or [], quiet=quiet or as_json)
    if as_json:
        print(json.dumps(table))
