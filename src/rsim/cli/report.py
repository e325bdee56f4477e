"""``rsim report``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Json, tell


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs or evaluations; several are compared.")],
    out: Annotated[str, typer.Option(help="Default: RUN/report.html, or comparison.html in the first one's folder.")] = "",
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run, or one that compares several."""
    from rsim import api

    page = api.report(runs[0] if len(runs) == 1 else runs, out)
    tell({"report": str(page)}, f"report: {page}", as_json)
