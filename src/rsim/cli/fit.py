"""``rsim fit``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from rsim.cli.options import DataDir, Json, Quiet, tell


def command(
    logs: Annotated[list[str], typer.Argument(metavar="LOG...", help="Folders that rsim collect wrote, of one model.")],
    out: Annotated[str, typer.Option(help="The planner's folder, a new one.")],
    planner: Annotated[str, typer.Option(metavar="BASE", help="The planner's base LLM; it stays as it is.")] = "smollm2-135m",
    test: Annotated[
        list[str] | None, typer.Option(metavar="LOG", help="A log of other questions to read the planner off; repeatable.")
    ] = None,
    price: Annotated[float, typer.Option(help="Of a thousand tokens, in right answers: 0.1 is ten points.", min=0)] = 0.0,
    data_dir: DataDir = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit a planner to logs of arms: what each arm is worth, by question and by what was found so far; cross-fitted."""
    from rsim import api
    from rsim.cli.progress import shown
    from rsim.collecting.planner_folder import as_text

    with shown("reading questions", quiet=quiet) as on_state:
        fitted = api.fit(logs, out, planner=planner, tests=test or [], price=price, data_dir=data_dir, on_state=on_state)
    rows = {"rows": [asdict(r) for r in fitted.standings], "tested": [asdict(r) for r in fitted.tested]}
    tell(rows | {"strays": fitted.strays, "tested_strays": fitted.tested_strays}, as_text(fitted), as_json)
