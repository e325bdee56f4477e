"""What a causal LM's config says that each architecture follows in its own code: how far it reads, what its head does."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel


def context(config: Any) -> int:
    """Tokens that a model reads; by dynamic NTK, whose rotary factors change with every token beyond, the first range."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or sys.maxsize
    return int(min(most, _first_range(text, "dynamic") or most))


def first_range(config: Any) -> int | None:
    """Tokens up to which a model with longrope has its short rotary factors; None: it has but one set."""
    return _first_range(config.get_text_config(), "longrope")


def _first_range(text: Any, kind: str) -> int | None:
    rotary = getattr(text, "rope_parameters", None) or {}
    kinds = [one for one in (rotary, *rotary.values()) if isinstance(one, dict) and one.get("rope_type") == kind]
    own = getattr(text, "original_max_position_embeddings", None)  # of all layers, or of each type of layer
    return min((first for one in kinds if (first := one.get("original_max_position_embeddings") or own)), default=None)


def logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the head of a causal LM or a classifier makes of final hidden states, ``[..., hidden]`` to ``[..., outputs]``."""
    head = model.get_output_embeddings()
    if head is None:  # a classifier's scores are neither scaled nor capped
        score: Any = model.score
        scores: torch.Tensor = score(hidden.to(next(score.parameters()).dtype))  # float32 above frozen bfloat16 weights
        return scores
    raw: torch.Tensor = head(hidden)
    scale, cap = scale_and_cap(model.config)
    if scale != 1:
        raw = raw * scale
    return raw if cap is None else cap * torch.tanh(raw / cap)


def scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What logits are multiplied by, and then capped at, before the softmax."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(text, "output_multiplier", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(text, "final_logit_softcapping", None)
