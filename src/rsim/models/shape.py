"""What a causal LM's config says that each architecture follows in its own code: how far it reads, what its head does."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

_BY_LENGTH = ("longrope", "dynamic")  # rotary factors of a whole text that change once it is longer than the original context


def context(config: Any) -> int:
    """Tokens that a model reads with the same rotary factors, whatever else is in the batch."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None) or sys.maxsize]
    rotary = getattr(text, "rope_parameters", None) or {}
    for kind in (rotary, *rotary.values()):  # of all layers, or of each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") in _BY_LENGTH:
            original = kind.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
            limits += [original] if original else []
    return int(min(limits))


def logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the head of a causal LM or a classifier makes of final hidden states, ``[..., hidden]`` to ``[..., outputs]``."""
    head = model.get_output_embeddings()
    if head is None:
        score: Any = model.score
        head, hidden = score, hidden.to(next(score.parameters()).dtype)  # float32 above frozen bfloat16 weights
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
