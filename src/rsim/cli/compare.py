"""``rsim compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, tell


def command(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    as_json: Json = False,
) -> None:
    """Compare two evaluations of the same questions: paired interval and exact test."""
    from rsim.evaluation.compare import compare

    c = compare(Path(first), Path(second))
    text = (
        f"A {c.a:.1%}  B {c.b:.1%}  A - B {100 * c.difference:+.1f} points [{100 * c.low:+.1f}, {100 * c.high:+.1f}]  "
        f"questions {c.questions}  only A right {c.only_a}, only B {c.only_b}, p = {c.p:.3g}"
    )
    tell(vars(c), text, as_json)
