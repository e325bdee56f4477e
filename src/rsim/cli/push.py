"""``rsim push``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Json, tell


def command(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    to: Annotated[str, typer.Option(help="Only write the hub-ready folder here; nothing is uploaded.")] = "",
    licence: Annotated[str, typer.Option()] = "apache-2.0",
    private: Annotated[bool, typer.Option("--private")] = False,
    as_json: Json = False,
) -> None:
    """Publish a run's planner on the Hugging Face hub, with a generated model card."""
    from rsim import api

    done = api.push(run, repo, to=to, licence=licence, private=private)
    tell({"pushed": not to, "to": done}, done, as_json)
