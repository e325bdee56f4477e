"""``rsim export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, tell
from rsim.errors import UserError


def command(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, a packaged model, a folder, a GGUF file or a hub id.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    as_json: Json = False,
) -> None:
    """Write a reasoner as a folder for a vLLM server that is to sample while it is trained."""
    from rsim.engine.vllm import save_untied
    from rsim.policies.loading import load_reasoner, quiet_models
    from rsim.runs.locate import locate

    quiet_models()
    if folder.exists():
        raise UserError(f"{folder} exists already", "name a new folder")
    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        config, checkpoint = locate(source, [])
        trained = checkpoint / "reasoner" if checkpoint else None
        source = str(trained) if trained and trained.is_dir() else config.reasoner
    reasoner = load_reasoner(source, device="cpu")
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_untied(reasoner.model, folder)
    reasoner.tokenizer.save_pretrained(folder)
    tell({"folder": str(folder)}, f"wrote {folder}", as_json)
