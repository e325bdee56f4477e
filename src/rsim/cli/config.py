"""``rsim config show``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Json, Set, tell

command = typer.Typer(no_args_is_help=True)


@command.command()
def show(
    source: Annotated[str, typer.Argument(metavar="[PRESET|CONFIG.toml]")] = "",
    overrides: Set = None,
    explain: Annotated[bool, typer.Option("--explain", help="What each key means, above it.")] = False,
    as_json: Json = False,
) -> None:
    """Print a config with every default filled in; without an argument and options, list the presets."""
    from rsim.config import load_config, presets, to_toml
    from rsim.settings import to_table

    if not (source or overrides or explain):
        tell(presets(), "\n".join(presets()), as_json)
        return
    config = load_config(source or None, overrides or [])
    tell(to_table(config), to_toml(config, explain=explain).removesuffix("\n"), as_json)
