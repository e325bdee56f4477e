"""The native engine: samples from the very weights that are trained, one packed forward pass per token.

Continuous batching: a forward pass carries one token of every sequence that is sampling and the whole injected chunk of those
that have just been told to go on. Only each sequence's last token goes through the output head. Where passes are CUDA graphs, a
short chunk is read token by token beside the others' sampling: several recorded passes take less time than one that is not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rsim.engine.decoder import Decoder
from rsim.engine.layers import pack, unpack
from rsim.engine.protocol import CausalLM, SampledStep, Stop
from rsim.engine.sampling import choose, episode_uniforms
from rsim.rules import End

Shape = Callable[[torch.Tensor, list[int]], torch.Tensor]  # bends a step's logits [v], given its tokens so far
_FULL = 0.75
_FIRST_TOKENS = 256  # after the prompt, that the cache has room for before it grows
_SHORT = 16  # tokens of a chunk that is read by recorded passes


@dataclass
class _Sequence:
    """One slot's sequence: ``pending`` ids were not read yet; ``position`` counts its tokens after the prompt."""

    pending: list[int]
    uniforms: np.ndarray
    temperature: float
    position: int = 0
    max_new_tokens: int = 0
    stop: Stop | None = None
    shape: Shape | None = None


class NativeEngine:
    """Samples without top-p and top-k, but where a step has a `Shape`; ``temperature`` 0 is greedy. ``cuda_graphs``: on a GPU,
    most passes are recorded."""

    def __init__(
        self,
        reasoner: CausalLM,
        slots: int,
        *,
        seed: int,
        temperature: float,
        max_tokens: int,
        longest_prompt: int,
        cuda_graphs: bool = True,
        chunk: int = sys.maxsize,
    ) -> None:
        """``max_tokens``: of one sequence after its prompt; ``longest_prompt``: the cache grows for longer ones; ``chunk``:
        tokens of prompts that one forward pass reads, so that a long one does not keep the others waiting."""
        self.reasoner = reasoner
        self.seed, self.temperature, self.max_tokens, self.chunk = seed, temperature, max_tokens, chunk
        self.ends = reasoner.end_ids
        capacity = longest_prompt + min(max_tokens, _FIRST_TOKENS)
        self.decoder = Decoder(reasoner.model, slots, capacity, cuda_graphs=cuda_graphs)
        pack(reasoner.model)
        self.sequences: dict[int, _Sequence] = {}
        self.rows = list(range(slots))  # of the cache, where each slot's sequence lies; sequences move to fill gaps
        self.steps: dict[int, tuple[list[int], list[float]]] = {}  # tokens and log-probs of the steps being sampled

    @property
    def running(self) -> int:
        return len(self.steps)

    def start(
        self,
        slots: list[int],
        prompts: list[list[int]],
        keys: list[str],
        temperatures: list[float] | None = None,
    ) -> None:
        """``temperatures``, where they are not the engine's."""
        pending = self.decoder.start([self.rows[s] for s in slots], prompts)
        heat = temperatures or [self.temperature] * len(slots)
        for slot, ids, key, temperature in zip(slots, pending, keys, heat, strict=True):
            self.sequences[slot] = _Sequence(ids, episode_uniforms(self.seed, key, self.max_tokens), temperature)

    def submit(
        self, slot: int, injected: list[int], max_new_tokens: int, stop: Stop | None, shape: Shape | None = None
    ) -> None:
        sequence = self.sequences[slot]
        sequence.pending = sequence.pending + injected
        sequence.position += len(injected)
        sequence.max_new_tokens, sequence.stop, sequence.shape = max_new_tokens, stop, shape
        self.steps[slot] = ([], [])

    def cancel(self, slot: int) -> None:
        """Ends a step before its time, without a result."""
        self.steps.pop(slot, None)

    def sampled(self, slot: int) -> list[int]:
        """The tokens of the step that ``slot`` is sampling, so far."""
        return self.steps[slot][0]

    @torch.no_grad()
    def advance(self, only: list[int] | None = None) -> list[SampledStep]:
        """One forward pass and one sampled token of every running sequence (or ``only`` some) that has been read whole.

        When it raises, nothing has changed: the sequences may be tried one by one, and the one at fault cancelled.

        Raises:
            FloatingPointError: a sequence's scores are no numbers.
        """
        self._close_gaps()
        slots = list(self.steps) if only is None else only
        sequences = [self.sequences[s] for s in slots]
        chunks = self._chunks(sequences)
        rows = [self.rows[s] for s in slots]
        lengths = [self.decoder.length(r) for r in rows]
        try:
            hidden = self.decoder.append(rows, chunks)
            read = [i for i, (s, chunk) in enumerate(zip(sequences, chunks, strict=True)) if len(chunk) == len(s.pending)]
            sampled = self._sample([slots[i] for i in read], hidden if len(read) == len(slots) else hidden[read])
            ends = [self._end([*self.steps[slots[i]][0], sampled[n][0]], sequences[i]) for n, i in enumerate(read)]
        except Exception:
            for row, length, chunk in zip(rows, lengths, chunks, strict=True):
                self.decoder.rewind(row, length)
                if len(rows) == 1:
                    self.decoder.cache.wipe(row, length + len(chunk))
            raise
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.pending = sequence.pending[len(chunk) :]
        finished = []
        for i, (token, logprob), end in zip(read, sampled, ends, strict=True):
            tokens, values = self.steps[slots[i]]
            tokens.append(token)
            values.append(logprob)
            sequences[i].pending = [token]
            sequences[i].position += 1
            if end is not None:
                finished.append(SampledStep(slots[i], tokens, values, end))
                del self.steps[slots[i]]
        return finished

    def _sample(self, slots: list[int], hidden: torch.Tensor) -> list[tuple[int, float]]:
        """The next token of each sequence, whose last hidden states are ``hidden [n, hidden]``, and its log-prob."""
        if not slots:
            return []
        sequences = [self.sequences[s] for s in slots]
        uniforms = torch.tensor([float(s.uniforms[s.position]) for s in sequences], device=hidden.device)
        logits = self.reasoner.logits(hidden)
        for row, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
            if sequence.shape is not None:
                logits[row] = sequence.shape(logits[row], self.steps[slot][0])
        picked, logprobs = choose(logits, self._temperature(sequences, hidden.device), uniforms)
        values = logprobs.tolist()
        if any(map(math.isnan, values)):
            raise FloatingPointError("the model's scores are no numbers (nan)")
        return list(zip(picked.tolist(), values, strict=True))

    def _temperature(self, sequences: list[_Sequence], device: torch.device) -> float | torch.Tensor:
        """One number where all have the same, else one for each sequence ``[n]``."""
        different = {s.temperature for s in sequences}
        return different.pop() if len(different) == 1 else torch.tensor([s.temperature for s in sequences], device=device)

    def _chunks(self, sequences: list[_Sequence]) -> list[list[int]]:
        """What each sequence reads now: all that is pending, as far as ``chunk`` goes (a token at least), or a token each."""
        pending, left = [s.pending for s in sequences], self.chunk
        for number, ids in enumerate(pending):
            pending[number] = ids if len(ids) <= max(left, 1) else ids[: max(left, 1)]
            left -= len(ids) - 1
        if self.decoder.passes is None or max(map(len, pending)) > _SHORT:
            return pending
        return [ids[:1] for ids in pending]

    def _end(self, tokens: list[int], sequence: _Sequence) -> End | None:
        if tokens[-1] in self.ends:
            return "end_of_turn"
        if sequence.stop is not None and sequence.stop.ended(tokens):
            return "delimiter"
        return "cap" if len(tokens) >= sequence.max_new_tokens else None

    def release(self, slot: int) -> None:
        """Frees a slot, also one that is being sampled (a client that went away)."""
        self.cancel(slot)
        del self.sequences[slot]
        self.decoder.release(self.rows[slot])

    def _close_gaps(self) -> None:
        """Once a quarter of the cache that a forward pass looks at lies idle, moves its last sequences into the gaps."""
        taken = {self.rows[s]: s for s in self.sequences}
        if len(taken) > _FULL * (max(taken) + 1):
            return
        gaps = [r for r in range(len(taken)) if r not in taken]
        for row, target in zip(sorted(r for r in taken if r >= len(taken)), gaps, strict=True):
            self.decoder.move(row, target)
            idle = self.rows.index(target)
            self.rows[taken[row]], self.rows[idle] = target, row

    def close(self) -> None:
        self.sequences.clear()
        unpack(self.reasoner.model)
