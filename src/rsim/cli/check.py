"""``rsim check``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Json, tell


def command(
    gold: Annotated[str, typer.Option(help="The right answer; for code, the test program.")],
    answer: Annotated[str, typer.Option(help="A bare answer, or a model's final words.")],
    kind: Annotated[str, typer.Option(help="numeric, latex, choice, text or code.")] = "latex",
    tolerance: Annotated[float, typer.Option(help="Relative error that a number may have.", min=0.0)] = 0.0,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run code without a sandbox where none can be built.")] = False,
    as_json: Json = False,
) -> None:
    """Grade an answer as rewards and evaluation do: strictly (one box) and flexibly (the last answer)."""
    from rsim import api

    result = api.check(answer, gold, kind=kind, tolerance=tolerance, unsafe=unsafe)
    lines = []
    for mode, found in result.items():
        said = "no answer" if found["answer"] is None else "right" if found["right"] else "wrong"
        lines.append(f"{mode:<9} {said:<10} {found['how']:<9} {found['failure'] or found['answer'] or ''}")
    tell(result, "\n".join(lines), as_json)
