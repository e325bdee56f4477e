"""``rsim collect``."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import DataDir, Json, Quiet, Set, merged, tell
from rsim.errors import UserError

_EVERY = 60.0  # seconds between two lines


class Pace:
    """Says now and then how many episodes are there, and how long the rest will take at this run's pace."""

    def __init__(self) -> None:
        self.began = self.said = 0.0
        self.first: int | None = None

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.began, self.first, rest = now, done, ""  # what was loaded before is no part of the pace
        elif now - self.said < _EVERY and done < of:
            return
        else:
            rest = f", {timedelta(seconds=round((now - self.began) / (done - self.first) * (of - done)))} left"
        self.said = now
        print(f"{done} of {of} episodes{rest}", file=sys.stderr, flush=True)


def command(
    arms: Annotated[str, typer.Argument(metavar="ARMS.toml|default", help="The arms; not needed for --report.")] = "",
    data: Annotated[str, typer.Option(help="gsm8k, math, ... or a JSONL file.")] = "",
    split: Annotated[str, typer.Option(help="train or dev; test is for claims.")] = "train",
    limit: Annotated[int, typer.Option(help="Number of questions; 0: all. It may grow.", min=0)] = 0,
    out: Annotated[str, typer.Option(metavar="LOG", help="The log's folder; a log that is there goes on.")] = "",
    model: Annotated[str, typer.Option(help="The reasoner, or its name at the upstream.")] = "",
    piece: Annotated[int, typer.Option(help="Questions in one file.", min=1)] = 50,
    exclude: Annotated[str, typer.Option(metavar="FILE", help="Ids, one a line, of questions to leave out.")] = "",
    upstream: Annotated[str, typer.Option(metavar="URL", help="The reasoner is behind this OpenAI-compatible server.")] = "",
    mode: Annotated[str, typer.Option(help="How prompts are injected there: prefill or turn (default: probed).")] = "",
    at_once: Annotated[int, typer.Option(help="Questions asked for together there.", min=1)] = 8,
    report: Annotated[list[str] | None, typer.Option(metavar="LOG", help="Only print the tables of logs; repeatable.")] = None,
    overrides: Set = None,
    data_dir: DataDir = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Play every arm on every question, keep the log, and say what there is to gain."""
    from rsim import api
    from rsim.collecting.headroom import as_text, of_logs
    from rsim.collecting.log import Log

    if report and arms:
        raise UserError("--report", "prints what logs hold: leave the arms out")
    if report:
        found = of_logs([Log(Path(folder)) for folder in report])
    elif not (arms and data and out):
        raise UserError("rsim collect", "give the arms, --data and --out; or --report LOG")
    else:
        found = api.collect(
            arms,
            data,
            out,
            split=split,
            limit=limit,
            model=model,
            piece=piece,
            exclude=exclude,
            upstream=upstream,
            mode=mode,
            at_once=at_once,
            overrides=merged(overrides, data_dir=data_dir),
            on_progress=(lambda done, of: None) if quiet else Pace(),
        )
    tell([asdict(one) for one in found], as_text(found), as_json)
