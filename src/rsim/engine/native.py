"""The native engine: samples from the very weights that are trained, one packed forward pass per token.

Continuous batching: a forward pass carries one token of every sequence that is sampling and the whole injected chunk of those
that have just been told to go on. Only each sequence's last token goes through the output head. Where passes are CUDA graphs, a
short chunk is read token by token beside the others' sampling: several recorded passes take less time than one that is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rsim.engine.decoder import Decoder
from rsim.engine.protocol import CausalLM, End, SampledStep
from rsim.engine.sampling import StepEnds, choose, episode_uniforms

_FULL = 0.75
_FIRST_TOKENS = 256  # after the prompt, that the cache has room for before it grows
_SHORT = 16  # tokens of a chunk that is read by recorded passes


@dataclass
class _Sequence:
    """One slot's sequence: ``pending`` ids were not read yet; ``place`` counts its tokens after the prompt."""

    pending: list[int]
    uniforms: np.ndarray
    place: int = 0
    cap: int = 0
    to_end: bool = False
    answer_prefix: str = ""


class NativeEngine:
    """Samples without top-p and top-k; ``temperature`` 0 is greedy. ``step_ends`` None: only end of turn and cap end a step.
    ``recorded``: on a GPU, most forward passes are CUDA graphs."""

    def __init__(
        self, reasoner: CausalLM, step_ends: StepEnds | None, slots: int, *, seed: int, temperature: float, max_tokens: int,
        longest_prompt: int, recorded: bool = True,
    ) -> None:  # fmt: skip
        self.reasoner, self.step_ends = reasoner, step_ends
        self.seed, self.temperature, self.max_tokens = seed, temperature, max_tokens
        self.ends = reasoner.end_ids
        capacity = longest_prompt + min(max_tokens, _FIRST_TOKENS)
        self.decoder = Decoder(reasoner.model, slots, capacity, recorded=recorded)
        self.sequences: dict[int, _Sequence] = {}
        self.places = list(range(slots))  # where in the cache a slot's sequence lies; sequences move to fill gaps
        self.steps: dict[int, tuple[list[int], list[float]]] = {}  # tokens and log-probs of the steps being sampled

    @property
    def running(self) -> int:
        return len(self.steps)

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        pending = self.decoder.start([self.places[s] for s in slots], prompts)
        for slot, ids, key in zip(slots, pending, keys, strict=True):
            self.sequences[slot] = _Sequence(ids, episode_uniforms(self.seed, key, self.max_tokens))

    def submit(self, slot: int, injected: list[int], cap: int, *, to_end: bool = False, answer_prefix: str = "") -> None:
        sequence = self.sequences[slot]
        sequence.pending = sequence.pending + injected
        sequence.place += len(injected)
        sequence.cap, sequence.to_end, sequence.answer_prefix = cap, to_end, answer_prefix
        self.steps[slot] = ([], [])

    @torch.no_grad()
    def advance(self) -> list[SampledStep]:
        """One forward pass and one sampled token of every running sequence that has been read whole."""
        self._close_gaps()
        slots = list(self.steps)
        rows = [self.sequences[s] for s in slots]
        chunks = self._chunks(rows)
        hidden = self.decoder.append([self.places[s] for s in slots], chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            row.pending = row.pending[len(chunk) :]
        whole = [i for i, row in enumerate(rows) if not row.pending]
        if not whole:
            return []
        if len(whole) < len(rows):
            slots, rows, hidden = [slots[i] for i in whole], [rows[i] for i in whole], hidden[whole]
        draws = torch.tensor([float(r.uniforms[r.place]) for r in rows], device=hidden.device)
        picked, logprobs = choose(self.reasoner.logits(hidden), self.temperature, draws)
        finished = []
        for slot, row, token, logprob in zip(slots, rows, picked.tolist(), logprobs.tolist(), strict=True):
            tokens, values = self.steps[slot]
            tokens.append(token)
            values.append(logprob)
            row.pending = [token]
            row.place += 1
            end = self._end(tokens, row)
            if end is not None:
                finished.append(SampledStep(slot, tokens, values, end))
                del self.steps[slot]
        return finished

    def _chunks(self, rows: list[_Sequence]) -> list[list[int]]:
        """What each sequence reads now: all that is pending or, in a recorded pass, a token."""
        pending = [row.pending for row in rows]
        if self.decoder.passes is None or max(map(len, pending)) > _SHORT:
            return pending
        return [ids[:1] for ids in pending]

    def _end(self, tokens: list[int], sequence: _Sequence) -> End | None:
        if tokens[-1] in self.ends:
            return "end_of_turn"
        if self.step_ends is not None and not sequence.to_end and self.step_ends.ended(tokens, sequence.answer_prefix):
            return "delimiter"
        return "cap" if len(tokens) >= sequence.cap else None

    def release(self, slot: int) -> None:
        del self.sequences[slot]
        self.decoder.release(self.places[slot])

    def _close_gaps(self) -> None:
        """Once a quarter of the cache that a forward pass looks at lies idle, moves its last sequences into the gaps."""
        taken = {self.places[s]: s for s in self.sequences}
        if len(taken) > _FULL * (max(taken) + 1):
            return
        gaps = [p for p in range(len(taken)) if p not in taken]
        for place, target in zip(sorted(p for p in taken if p >= len(taken)), gaps, strict=True):
            self.decoder.move(place, target)
            idle = self.places.index(target)
            self.places[taken[place]], self.places[idle] = target, place

    def close(self) -> None:
        self.sequences.clear()
