"""``rsim lab pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, Quiet, tell
from rsim.errors import UserError

command = typer.Typer(no_args_is_help=True)


@command.command()
def pretrain(
    size: Annotated[str, typer.Option(help="nano-xs, nano-s, nano-m, nano-l or nano-llama")] = "nano-s",
    out: Annotated[str, typer.Option(help="Default: where the size's name finds it, in the cache.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    steps: Annotated[int, typer.Option(help="0: the size's own number.", min=0)] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pre-train a nano base from nothing on written lab solutions."""
    from rsim.lab.pretrain import SIZES, PretrainConfig, pretrain
    from rsim.models.weights import cache_folder
    from rsim.policies.loading import quiet_models

    quiet_models()
    if size not in SIZES:
        raise UserError(f"--size {size}", f"use one of {', '.join(SIZES)}")
    folder = Path(out) if out else cache_folder() / size
    result = pretrain(PretrainConfig(size=size, seed=seed, steps=steps or None), folder, quiet=quiet or as_json)
    tell(result | {"folder": str(folder)}, f"saved {folder}", as_json)
