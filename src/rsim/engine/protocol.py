"""What the game asks of an engine: to go on with a sequence until its step ends. The engines are `NativeEngine` (the
trainer's own weights) and `VllmEngine` (a vLLM server)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

End = Literal["end_of_turn", "delimiter", "cap"]


@dataclass
class SampledStep:
    """A finished step of the sequence in ``slot``: token ids, their log-probs (nats, at the sampling temperature), why it
    ended."""

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


class Engine(Protocol):
    """Sequences live in slots ``0 .. slots - 1``; ``running`` counts those that are being sampled."""

    @property
    def running(self) -> int: ...

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        """Puts new sequences into free slots. What is sampled there depends on the seed and the sequence's key alone."""

    def submit(self, slot: int, injected: list[int], cap: int, *, to_end: bool = False, answer_prefix: str = "") -> None:
        """Appends ``injected`` to a sequence that rests and lets it sample a step of at most ``cap`` tokens.

        ``to_end``: delimiters do not end it. ``answer_prefix``: the box or code block in which ``injected`` ends
        (`rsim.answers.prefix.open_prefix`).
        """

    def advance(self) -> list[SampledStep]:
        """Works on; returns the steps that ended, which may be none."""

    def release(self, slot: int) -> None:
        """Frees a slot whose sequence rests."""

    def close(self) -> None: ...
