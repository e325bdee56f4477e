"""``rsim check``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, cast, get_args

import typer

from rsim.answers.extract import Mode
from rsim.cli.options import Json, tell
from rsim.errors import UserError
from rsim.game.problem import Kind, Problem
from rsim.rewards import grade


def command(
    gold: Annotated[str, typer.Option(help="The right answer; for code, the test program.")],
    answer: Annotated[str, typer.Option(help="A bare answer, or a model's final words.")],
    kind: Annotated[str, typer.Option(help="numeric, latex, choice, text or code.")] = "latex",
    tolerance: Annotated[float, typer.Option(help="Relative error that a number may have.", min=0.0)] = 0.0,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run code without a sandbox where none can be built.")] = False,
    as_json: Json = False,
) -> None:
    """Grade an answer as rewards and evaluation do: strictly (one box) and flexibly (the last answer)."""
    if kind not in get_args(Kind) or kind == "gym":
        raise UserError(f"--kind {kind}", "use numeric, latex, choice, text or code")
    problem = Problem("", gold, kind=cast(Kind, kind), meta={"tolerance": tolerance})
    result, lines = {}, []
    for mode in get_args(Mode):
        found, verdict = grade.check(problem, answer, mode, unsafe=unsafe)
        result[mode] = {"answer": found} | asdict(verdict)
        said = "no answer" if found is None else "right" if verdict.right else "wrong"
        lines.append(f"{mode:<9} {said:<10} {verdict.how:<9} {verdict.failure or found or ''}")
    tell(result, "\n".join(lines), as_json)
