"""``rsim report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, tell


def command(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    out: Annotated[str, typer.Option(help="Default: RUN/report.html")] = "",
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    from rsim.report.report import build_report

    page = build_report(Path(run), Path(out) if out else None)
    tell({"report": str(page)}, f"report: {page}", as_json)
