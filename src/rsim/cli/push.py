"""``rsim push``."""

from __future__ import annotations

import tempfile
from pathlib import Path
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
    from rsim.serving.card import hub_folder
    from rsim.serving.card import push as upload

    if to:
        done = str(hub_folder(run, Path(to), repo=repo, licence=licence))
    else:
        with tempfile.TemporaryDirectory() as folder:
            done = upload(hub_folder(run, Path(folder) / "planner", repo=repo, licence=licence), repo, private=private)
    tell({"pushed": not to, "to": done}, done, as_json)
