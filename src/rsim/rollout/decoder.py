"""Sequences that grow chunk by chunk, several at once: what the reasoner's and the planner's reading have in common."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rsim import packed
from rsim.rollout.cache import CachedLayout, SlotCache

_PREFILL_TOKENS = 4096  # of the beginnings that are read in one forward pass


class Decoder:
    """A model (without its head) and the cached sequences it has read, each in a slot.

    The cache belongs to one rollout and to one version of the weights: make a new `Decoder` after every update.
    """

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int) -> None:
        packed.prepare(model)
        self.model = model
        weight = model.get_input_embeddings().weight
        self.cache = SlotCache(model.config, slots, capacity, weight.dtype, weight.device)
        self.beginnings: dict[int, tuple[int, ...]] = {}  # of the sequences in their slots

    def start(self, slots: list[int], sequences: list[list[int]]) -> list[list[int]]:
        """Puts new sequences into ``slots``; returns what of each is still to be read, for the next `append`.

        Sequences that begin alike (the episodes of one question) are read once and copied, also from a slot where such a
        sequence has gone on already; then only the last token is left. A sequence on its own is left whole.
        """
        for slot in slots:
            self.release(slot)
        holder = {beginning: slot for slot, beginning in self.beginnings.items() if self.cache.lengths[slot] >= len(beginning)}
        members: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in zip(slots, sequences, strict=True):
            self.beginnings[slot] = tuple(ids[:-1])
            members.setdefault(self.beginnings[slot], []).append(slot)
        readers = [alike[0] for beginning, alike in members.items() if beginning not in holder and len(alike) > 1]
        holder |= {self.beginnings[slot]: slot for slot in readers}
        while readers:
            now: list[int] = []
            while readers and (not now or sum(len(self.beginnings[s]) for s in [*now, readers[0]]) <= _PREFILL_TOKENS):
                now.append(readers.pop(0))
            self.append(now, [list(self.beginnings[s]) for s in now])
        for beginning, alike in members.items():
            targets = [slot for slot in alike if slot != holder.get(beginning)]
            if beginning in holder and targets:
                self.cache.copy(holder[beginning], targets, len(beginning))
        return [ids[self.cache.lengths[slot] :] for slot, ids in zip(slots, sequences, strict=True)]

    @torch.no_grad()
    def append(self, slots: list[int], chunks: list[list[int]]) -> torch.Tensor:
        """Feeds each slot its chunk (one token or more); returns their last tokens' hidden states ``[n, hidden]``."""
        order = sorted(range(len(slots)), key=lambda i: (len(chunks[i]) > 1, slots[i]))
        counts = [len(chunks[i]) for i in order]
        layout = CachedLayout(self.cache, [slots[i] for i in order], counts)
        ids = torch.tensor([token for i in order for token in chunks[i]], device=self.cache.device)
        hidden = packed.forward(self.model, ids, layout.positions, layout)
        for slot, chunk in zip(slots, chunks, strict=True):
            self.cache.lengths[slot] += len(chunk)
        back = sorted(range(len(order)), key=order.__getitem__)
        return hidden[layout.last[back]]

    def release(self, slot: int) -> None:
        self.beginnings.pop(slot, None)
        self.cache.lengths[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Moves a sequence to a free slot."""
        self.cache.copy(source, [target], self.cache.lengths[source])
        self.beginnings[target] = self.beginnings[source]
        self.release(source)
