"""Reasoners and planners from their weights, whole or with an adapter to train."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from rsim.engine import packed
from rsim.engine.prepare import prepare
from rsim.errors import UserError, first_line
from rsim.models import adapters
from rsim.models.device import torch_device
from rsim.models.weights import near, resolve
from rsim.policies import template
from rsim.policies.planner import Planner, planner_config
from rsim.policies.reasoner import Reasoner
from rsim.policies.strategies import StrategySet

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_models() -> None:
    """Silences transformers' weight-loading bars: progress is ours to show."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_reasoner(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    system_prompt: str = "",
    weights: bool = True,
    lora: int = 0,
    quantised: bool = False,
    seed: int = 0,
) -> Reasoner:
    """A causal LM and its tokenizer.

    Args:
        weights: False: its shape alone, for a reasoner that a server runs.
        lora: the rank of an adapter to train; training of a saved adapter goes on. 0: a saved adapter is merged into its base.
        quantised: the frozen weights in 4 bits; nothing is merged into those.
        seed: of a new adapter.

    Raises:
        UserError: nothing is found under ``source``, or it is no causal LM.
    """
    path = resolve(source, weights=weights)
    adapters.check_rank(path, lora)
    saved = adapters.base_of(path)
    base = resolve(saved, weights=weights) if saved else path
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **_how(device, dtype, quantised)) if weights else _shape_alone(base)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a package that is not there, a file that is none, a model that its own code cannot make
        raise UserError(f"cannot load a reasoner from {source!r}", near(source) + first_line(error)) from error
    if not weights:
        return Reasoner(model, tokenizer, system_prompt)
    if quantised:
        adapters.keep_unpacked(model)
    else:
        model.to(torch_device(device))
    model = _adapted(model.eval(), path, source, lora, quantised, seed)
    prepare(model)
    if lora:
        adapters.train_precisely(model)
    return Reasoner(model.eval(), tokenizer, system_prompt)


def _adapted(model: PreTrainedModel, path: str, source: str, lora: int, quantised: bool, seed: int) -> PreTrainedModel:
    """``model`` with the adapter to be trained, or with the one in the folder ``path`` merged in."""
    if adapters.base_of(path) is None:
        if lora:
            adapters.add(model, lora, source, seed)
        return model
    if not lora and not quantised:
        return adapters.merged(model, path)
    adapters.resume(model, path)
    return model


def _shape_alone(path: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # a folder without one: the model's own defaults hold
        return model
    return model


def found_planner(source: str) -> tuple[str, Any]:
    """The folder or hub id of a planner or its base, and its config. Raises `UserError` where nothing is found."""
    path = resolve(source)
    try:
        return path, planner_config(path)
    except Exception as error:  # as of a reasoner
        raise UserError(f"cannot load a planner from {source!r}", near(source) + first_line(error)) from error


def load_planner(
    source: str,
    strategies: StrategySet,
    *,
    seed: int,
    device: str = "auto",
    dtype: str = "float32",
    sees: template.Sees = "everything",
    lora: int = 0,
    quantised: bool = False,
) -> Planner:
    """A trained planner, or a fresh one made from a base LLM with a new head.

    Args:
        lora, quantised: as `load_reasoner` has them; the head is always trained whole.

    Raises:
        UserError: nothing is found under ``source``, or it was trained on another strategy set or template, or to see
            something else.
    """
    path, config = found_planner(source)
    adapters.check_rank(path, lora)
    how = _how(device, dtype, quantised)
    if getattr(config, "rsim_template", None) is not None:
        planner = Planner.from_pretrained(path, strategies, merge=not lora and not quantised, **how)
        if sees not in ("everything", planner.sees):
            remedy = f"{source} was trained to see {planner.sees}, and keeps to it: leave it out, or begin with a base"
            raise UserError(f"models.planner_sees = {sees}", remedy)
    else:
        planner = new_planner(path, strategies, seed, sees, **how)
    if quantised:
        adapters.keep_unpacked(planner.model)
    else:
        planner.model.to(device=torch_device(device), dtype=_dtype(dtype))
    if lora and adapters.base_of(path) is None:
        adapters.add(planner.model, lora, source, seed)
    prepare(planner.model.eval())
    if lora:
        adapters.train_precisely(planner.model)
    return planner


def new_planner(base: str, strategies: StrategySet, seed: int, sees: template.Sees = "everything", **how: Any) -> Planner:
    """``base`` with a new classifier head over ``strategies``, drawn from ``seed``.

    Args:
        sees: what it reads of a play; less than everything makes a control.
        how: arguments of ``from_pretrained``.

    Raises:
        UserError: the base has no such classifier.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    names = dict(enumerate(strategies.names))
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=len(names), id2label=names, label2id={n: i for i, n in names.items()}, **how
        )
    except Exception as error:  # as of a reasoner
        if "Unrecognized configuration" in str(error):
            raise UserError(f"transformers has no classifier for {planner_config(base).model_type} models") from error
        raise UserError(f"cannot load a planner from {base!r}", first_line(error)) from error
    if "score" not in dict(model.named_children()):
        raise UserError(f"{type(model).__name__} does not classify by a matrix over its last state", packed.REMEDY)
    model.config.pad_token_id = pad
    model.config.rsim_template, model.config.rsim_sees = template.VERSION, sees
    rows = torch.empty(model.score.weight.shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.score.weight.copy_(rows)
    return Planner(model, tokenizer, strategies)


def _how(device: str, dtype: str, quantised: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    precision = _dtype(dtype)
    if quantised:
        return adapters.four_bits(precision) | {"dtype": precision, "device_map": {"": torch_device(device)}}
    return {"dtype": precision}


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]
