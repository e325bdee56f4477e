"""``python -m studies NAME``: repeat a study and write its page and its rows of the ledger."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, Set
from rsim.errors import UserError
from studies.run import EXPERIMENTS, run_experiment


def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME")] = "",
    seeds: Annotated[int, typer.Option(help="Runs of everything that is trained: seeds 0, 1, ...", min=1)] = 3,
    questions: Annotated[int, typer.Option(help="Unseen problems in every evaluation.", min=10)] = 1000,
    jobs: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 2,
    out: Annotated[
        str, typer.Option(help="Folder of all runs and evaluations; what is there is not done again.")
    ] = "runs/experiments",
    publish: Annotated[str, typer.Option(help="Folder under which docs/results and results are written.")] = ".",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Repeat an experiment on the nano lab and write its page; without a name, list them."""
    if not name:
        print(json.dumps(EXPERIMENTS) if as_json else "\n".join(f"{n:<10} {what}" for n, what in EXPERIMENTS.items()))
        return
    page = run_experiment(name, range(seeds), questions, jobs, Path(out), Path(publish), overrides or [], quiet=as_json)
    print(json.dumps({"page": str(page)}) if as_json else f"page: {page}")


if __name__ == "__main__":
    try:
        typer.run(experiment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
