"""Options that several commands share, and what a command prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from rsim.config import as_overrides

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")]
Strategies = Annotated[str, typer.Option(help="A packaged set (instruct, lab, ...) or a TOML file (models.strategies).")]
Rewards = Annotated[
    list[str] | None, typer.Option("--reward", metavar="FILE.py:FUNCTION[@AGENT][*WEIGHT]", help="Add a reward; repeatable.")
]
DataDir = Annotated[str, typer.Option(help="Folder of the data sets (default: $RSIM_DATA).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Source = Annotated[str, typer.Argument(metavar="PRESET|CONFIG.toml")]


def tell(record: Any, text: str, as_json: bool) -> None:
    """Prints ``record`` as JSON, or ``text``."""
    print(json.dumps(record) if as_json else text)


def merged(
    overrides: list[str] | None,
    *,
    out: str = "",
    seed: int | None = None,
    strategies: str = "",
    rewards: list[str] | None = None,
    data_dir: str = "",
    upstream: dict[str, str | float] | None = None,
) -> list[str]:
    """The ``--set`` overrides with those that have an option of their own."""
    own: dict[str, Any] = {"models.strategies": strategies, "rewards.custom": rewards, "data.data_dir": data_dir, "out": out}
    own |= {f"upstream.{key}": value for key, value in (upstream or {}).items()}
    given = {key: value for key, value in own.items() if value} | ({} if seed is None else {"seed": seed})
    return [*(overrides or []), *as_overrides(given)]
