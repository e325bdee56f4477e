"""``rsim strategies show``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Json, tell
from rsim.policies.strategies import load_strategies

command = typer.Typer(no_args_is_help=True)


@command.command()
def show(
    source: Annotated[
        str, typer.Argument(metavar="[SET]", help="A packaged set (instruct, lab, ...) or a TOML file.")
    ] = "default",
    as_json: Json = False,
) -> None:
    """Print a strategy set."""
    strategies = load_strategies(source).strategies
    text = "\n".join(f"{s.name:<16} {s.description}\n{'':<16} {s.prompts[0]}" for s in strategies)
    tell([vars(s) for s in strategies], text, as_json)
