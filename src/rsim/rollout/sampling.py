"""Sampling tokens and finding where steps end."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def episode_uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """``count`` uniform numbers that depend on ``(seed, key)`` alone.

    One stream per episode makes what is sampled independent of batch order, batch size and the number of ranks (up to
    floating point).
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random(count, dtype=np.float32)


def choose(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one index per row by inverting the CDF, with no top-p or top-k filter; temperature 0 takes the argmax.

    Args:
        logits: ``[n, v]``.
        temperature: divides the logits; at 0 the log-probs are those at temperature 1.
        uniforms: ``[n]`` in ``[0, 1)``.

    Returns:
        indices ``[n]`` and their log-probs ``[n]`` (nats) under the distribution that was sampled from.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        index = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1]
        target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
        index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return index, logprobs.gather(-1, index[:, None])[:, 0]


class StepEnds:
    """Finds the first sampled token whose addition makes the step's decoded text contain the delimiter."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiter: str, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.delimiter = delimiter
        self.ids: list[int] = tokenizer.encode(delimiter, add_special_tokens=False)
        # Only a token that holds a character of the delimiter can complete it; the rest need no decoding. Characters
        # outside ASCII may be spread over several tokens: then every token is looked at.
        if delimiter.isascii():
            pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
            touching = [any(c in piece for c in delimiter) for piece in pieces]
            touching += [False] * (vocabulary - len(touching))
        else:
            touching = [True] * vocabulary
        self.touching = torch.tensor(touching)

    def ended(self, step_ids: list[int]) -> bool:
        return self.delimiter in self.tokenizer.decode(step_ids)
