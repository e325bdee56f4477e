"""What the game asks of an engine: to go on with a sequence until its step ends. The engines are `NativeEngine` (weights in
this process), `VllmEngine` (vLLM servers) and `LlamaEngine` (llama.cpp's servers). An engine knows tokens, not strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from rsim.rules import End


@dataclass
class SampledStep:
    """A finished step of the sequence in ``slot``: token ids, their log-probs (nats, at the sampling temperature; ``nan`` where
    a server gives none), why it ended."""

    slot: int
    tokens: list[int]
    logprobs: list[float]
    end: End


class CausalLM(Protocol):
    """What an engine in this process samples from."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def end_ids(self) -> set[int]: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class Stop(Protocol):
    """Where a step ends before the end of the turn."""

    @property
    def strings(self) -> tuple[str, ...]:
        """One of these is in the text by then: for servers, which look for strings."""

    def ended(self, tokens: list[int]) -> bool:
        """Whether the last of a step's sampled ``tokens`` ends it; servers are asked to go on where it does not."""


class Engine(Protocol):
    """Sequences live in slots ``0 .. slots - 1``; ``running`` counts those that are being sampled."""

    @property
    def running(self) -> int: ...

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        """Puts new sequences into free slots. What is sampled there depends on the seed and the sequence's key alone."""

    def submit(self, slot: int, injected: list[int], max_new_tokens: int, stop: Stop | None) -> None:
        """Appends ``injected`` to a sequence that rests and lets it sample a step; ``stop`` None: to the end of the turn."""

    def advance(self) -> list[SampledStep]:
        """Works on; returns the steps that ended, which may be none."""

    def release(self, slot: int) -> None:
        """Frees a slot whose sequence rests."""

    def close(self) -> None: ...
