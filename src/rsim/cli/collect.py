"""``rsim collect``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import DataDir, Json, Set, merged, tell
from rsim.errors import UserError


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
    as_json: Json = False,
) -> None:
    """Play every arm on every question, keep the log, and say what there is to gain."""
    from rsim.collecting.headroom import as_text, headroom
    from rsim.collecting.log import Log
    from rsim.collecting.play import Collection, collect
    from rsim.evaluation.upstream import ServedModel
    from rsim.policies.loading import quiet_models

    if report and arms:
        raise UserError("--report", "prints what logs hold: leave the arms out")
    logs = [Log(Path(folder)) for folder in report or []]
    if not report:
        if not (arms and data and out):
            raise UserError("rsim collect", "give the arms, --data and --out; or --report LOG")
        quiet_models()
        wanted = Collection(
            arms=arms,
            data=data,
            split=split,
            limit=limit,
            model="" if upstream else model,
            piece=piece,
            exclude=exclude,
            overrides=tuple(merged(overrides, data_dir=data_dir)),
            served=ServedModel(upstream, model, mode, at_once) if upstream else None,
        )
        logs = [collect(wanted, Path(out), lambda some, of: print(f"{some} of {of} questions are there", file=sys.stderr))]
    cascades = [tuple(pair) for log in logs for pair in log.header.get("cascades", [])]
    records = [record for log in logs for record in [*log.records(), *log.unfinished]]
    found = headroom(records, list(dict.fromkeys(cascades)))
    tell([asdict(one) for one in found], as_text(found), as_json)
