"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")]
Strategies = Annotated[str, typer.Option(help="default, code, lab or a TOML file (models.strategies).")]
Rewards = Annotated[list[str] | None, typer.Option("--reward", metavar="FILE.py:FUNCTION", help="Add a reward; repeatable.")]
DataDir = Annotated[str, typer.Option(help="Folder of the data sets (default: $RSIM_DATA).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
