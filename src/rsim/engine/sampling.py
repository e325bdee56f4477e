"""Sampling tokens and finding where steps end."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from rsim.models.device import precise
from rsim.rules import step_end

_BLOCK = 256


def episode_uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """``count`` uniform numbers that depend on ``(seed, key)`` alone.

    One stream per episode makes what is sampled independent of batch order, batch size and the number of ranks (up to
    floating point).
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random(count, dtype=np.float32)


def choose(
    logits: torch.Tensor, temperature: float | torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one index per row by inverting the CDF, with no top-p or top-k filter; temperature 0 takes the argmax.

    The CDF is inverted in two levels (blocks of the vocabulary, then inside one block), which reads the logits once and
    loses less to rounding than one running sum over the vocabulary.

    Args:
        logits: ``[n, v]``.
        temperature: divides the logits; at 0 the log-probs are those at temperature 1. One number, or one for each row ``[n]``.
        uniforms: ``[n]`` in ``[0, 1)``.

    Returns:
        indices ``[n]`` and their log-probs ``[n]`` (nats) under the distribution that was sampled from.
    """
    logits = precise(logits)
    if isinstance(temperature, torch.Tensor):
        logits = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    elif temperature not in (0, 1):
        logits = logits / temperature
    n, vocabulary = logits.shape
    largest = logits.amax(-1)  # not `max`: its indices cost time and are not needed
    weights = (logits - largest[:, None]).exp_()
    blocks = pad(weights, (0, -vocabulary % _BLOCK)).view(n, -1, _BLOCK)
    upto = blocks.sum(-1).cumsum(-1)  # [n, blocks]
    total = upto[:, -1]
    if isinstance(temperature, torch.Tensor):
        index = torch.where(temperature > 0, _invert(blocks, upto, uniforms * total), logits.argmax(-1))
    else:
        index = logits.argmax(-1) if temperature == 0 else _invert(blocks, upto, uniforms * total)
    index = index.clamp(max=vocabulary - 1)
    return index, logits.gather(-1, index[:, None])[:, 0] - largest - total.log()


def _invert(blocks: torch.Tensor, upto: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of ``blocks [n, b, size]`` first exceeds ``target [n]``; never one of weight 0. (The
    last one where the weights are no numbers.)"""
    block = torch.searchsorted(upto, _below(target, upto[:, -1])[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)[:, 0]
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, blocks.shape[2]))[:, 0].cumsum(-1)
    within = torch.searchsorted(inside, _below(target - before, inside[:, -1])[:, None], right=True).clamp_(
        max=blocks.shape[2] - 1
    )
    return (block * blocks.shape[2] + within)[:, 0]


def _below(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``target`` held in ``[0, total)``."""
    return torch.minimum(target.clamp(min=0), torch.nextafter(total, torch.zeros_like(total)))


class Vocabulary:
    """Which tokens hold a character of some strings: only these can complete one of them; the rest need no decoding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        """``size``: of the model's output, which may exceed the tokenizer's."""
        self.tokenizer, self.size = tokenizer, size
        self.pieces: list[str] | None = None
        self._touching: dict[tuple[str, ...], set[int]] = {}

    def touching(self, strings: tuple[str, ...]) -> set[int]:
        if strings not in self._touching:
            self._touching[strings] = self._find(set("".join(strings)))
        return self._touching[strings]

    def _find(self, characters: set[str]) -> set[int]:
        if not all(c.isascii() for c in characters):  # may be spread over several tokens: every one is looked at
            return set(range(self.size))
        if self.pieces is None:
            self.pieces = self.tokenizer.batch_decode([[i] for i in range(min(self.size, len(self.tokenizer)))])
        return {i for i, piece in enumerate(self.pieces) if not characters.isdisjoint(piece)}


class DelimiterStop:
    """Ends a step at the first sampled token whose addition makes its decoded text contain the delimiter, outside code blocks.

    ``answer_prefix`` opens the code block that what was written before the step left open.
    """

    def __init__(self, vocabulary: Vocabulary, delimiter: str, answer_prefix: str = "") -> None:
        self.strings = (delimiter,)
        self.tokenizer, self.answer_prefix = vocabulary.tokenizer, answer_prefix
        self.touching = vocabulary.touching(self.strings)

    def ended(self, tokens: list[int]) -> bool:
        if tokens[-1] not in self.touching:
            return False
        return step_end(self.answer_prefix + self.tokenizer.decode(tokens), self.strings[0]) >= 0


class StringStop:
    """A client's own stop strings: the first of them that is in the text ends it, wherever it is."""

    def __init__(self, vocabulary: Vocabulary, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.tokenizer, self.touching = vocabulary.tokenizer, vocabulary.touching(strings)

    def ended(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.touching and any(s in self.tokenizer.decode(tokens) for s in self.strings)
