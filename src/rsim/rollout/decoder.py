"""Appending ragged chunks to many sequences at once: the part shared by the reasoner's and the planner's KV cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rsim.rollout.cache import RaggedCache

_LIKE_LENGTH = 1.25  # longest to shortest of sequences that are padded to one length


class Decoder:
    """A model (without its head) and the cached sequences it has read.

    Sequences are known by their handle (0..rows-1); their place in the cache moves so that the ones being worked on are
    always its first rows. The cache belongs to one rollout and to one version of the weights: make a new `Decoder` after
    every update.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        self.base = model.base_model
        weight = model.get_input_embeddings().weight
        self.cache = RaggedCache(model.config, rows, capacity, weight.dtype, weight.device)
        self.handles = list(range(rows))  # handle at each place
        self.places = list(range(rows))  # place of each handle

    @torch.no_grad()
    def append(self, chunks: dict[int, list[int]]) -> tuple[list[int], torch.Tensor]:
        """Feeds each handle's chunk (one token or more).

        Returns:
            the handles in row order and their last token's hidden states ``[n, hidden]``.
        """
        self._bring_forward(set(chunks))
        order = self.handles[: len(chunks)]
        counts = [len(chunks[h]) for h in order]
        width = max(counts)
        device = self.cache.lengths.device
        ids = torch.tensor([chunks[h] + [0] * (width - n) for h, n in zip(order, counts, strict=True)], device=device)
        return order, self._forward(ids, torch.tensor(counts, device=device))

    def start(self, sequences: list[list[int]]) -> list[list[int]]:
        """Reads the beginning of every sequence, a handle each: all but its last token, which is returned to be fed next.

        Sequences that begin alike (the episodes of one question) are read once and copied; those of like length are read
        together, so that little padding is computed.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for handle, ids in enumerate(sequences):
            alike.setdefault(tuple(ids[:-1]), []).append(handle)
        readers = sorted(((list(ids), handles[0]) for ids, handles in alike.items() if ids), key=lambda r: len(r[0]))
        while readers:
            shortest = len(readers[0][0])
            together = [r for r in readers if len(r[0]) <= _LIKE_LENGTH * shortest]
            readers = readers[len(together) :]
            self.append({handle: ids for ids, handle in together})
        for beginning, (reader, *others) in alike.items():
            if beginning and others:
                self.cache.copy(self.places[reader], [self.places[h] for h in others])
        return [ids[-1:] for ids in sequences]

    @torch.no_grad()
    def append_one(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token ``[n]`` to each of the first ``n`` places; returns hidden states ``[n, hidden]``."""
        return self._forward(tokens[:, None], torch.ones_like(tokens))

    def drop_to_back(self, place: int, active: int) -> None:
        """Moves the sequence at ``place`` out of the first ``active`` places (the last of them takes its place)."""
        self._swap(place, active - 1)

    def _forward(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        positions, mask = self.cache.begin(*ids.shape)
        output = self.base(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        self.cache.advance(counts)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[torch.arange(len(ids), device=ids.device), counts - 1]

    def _bring_forward(self, wanted: set[int]) -> None:
        front = len(wanted)
        free = [p for p in range(front) if self.handles[p] not in wanted]
        for handle in wanted:
            if self.places[handle] >= front:
                self._swap(free.pop(), self.places[handle])

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.cache.swap(a, b)
            self.handles[a], self.handles[b] = self.handles[b], self.handles[a]
            self.places[self.handles[a]], self.places[self.handles[b]] = a, b
