"""``rsim report``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Json, tell


def command(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    out: Annotated[str, typer.Option(help="Default: RUN/report.html")] = "",
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    from rsim import api

    page = api.report(run, out)
    tell({"report": str(page)}, f"report: {page}", as_json)
