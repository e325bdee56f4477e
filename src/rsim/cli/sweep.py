"""``rsim sweep``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsim.cli.options import Json, tell
from rsim.errors import UserError

if TYPE_CHECKING:
    from rsim.training.sweep import Trial


def command(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="What is tried (docs/sweeps.md).")],
    out: Annotated[Path, typer.Option(help="Its folder; a sweep that was stopped there goes on.")],
    as_json: Json = False,
) -> None:
    """Search the settings of a run at random: trials, the best again on other seeds, a table and a plot."""
    from rsim.training.sweep import edges, load_sweep, run_sweep, write_table

    sweep = load_sweep(file)
    trials = run_sweep(sweep, out, _told)
    table, best = write_table(sweep, trials, out), trials[0]
    if not best.scores:
        raise UserError("every trial failed", best.error)
    said = [f"best: trial {best.number}: " + ", ".join(f"{key} = {value}" for key, value in best.chosen.items())]
    said += [f"{key} = {best.chosen[key]} lies on the edge of its range: widen it" for key in edges(sweep, best)]
    record = {"best": asdict(best), "edges": edges(sweep, best), "trials": [asdict(t) for t in trials]}
    tell(record, "\n".join([*said, f"table: {table}"]), as_json)


def _told(trial: Trial, of: int) -> None:
    shown = trial.error or ", ".join(f"{sum(s) / len(s):.1%} ({len(s)} seeds)" for s in trial.scores.values())
    print(f"trial-{trial.number:03d}, of {of}: {shown}", file=sys.stderr)
