"""Sequences that grow chunk by chunk, several at once: what the reasoner's and the planner's reading have in common."""

from __future__ import annotations

import bisect

import torch
from transformers import PreTrainedModel

from rsim.engine import packed
from rsim.engine.cache import CachedLayout, SlotCache
from rsim.engine.graphs import CudaGraphPasses, can_capture
from rsim.engine.prepare import prepare
from rsim.models.shape import first_range

_PREFILL_TOKENS = 4096  # of the prefixes that are read in one forward pass
_WORTH_COPYING = 16  # tokens: fewer are read again


class Decoder:
    """A model (without its head) and the cached sequences it has read, each in a slot.

    The cache belongs to one rollout and to one version of the weights: make a new `Decoder` after every update.
    """

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int, *, cuda_graphs: bool = False) -> None:
        """``cuda_graphs``: on a GPU, passes of one token per sequence are CUDA graphs."""
        prepare(model)
        self.model = model
        weight = model.get_input_embeddings().weight
        self.cache = SlotCache(slots, capacity, weight.dtype, weight.device)
        self.passes = CudaGraphPasses(model, self.cache) if cuda_graphs and can_capture(model) else None
        self.prefixes: dict[int, tuple[int, ...]] = {}  # all but the last token of each slot's sequence, as it began
        self.first = first_range(model.config)
        self.read: list[list[int]] = [[] for _ in range(slots)]  # each slot's tokens, kept where a `first` range may end
        self.long = [False] * slots  # whether a slot's sequence has outgrown it

    def start(self, slots: list[int], sequences: list[list[int]]) -> list[list[int]]:
        """Puts new sequences into ``slots``; returns what of each is still to be read, for the next `append`.

        What sequences have in common is read once and copied: the whole question between the episodes of a group, a system
        prompt between all of them, also from slots whose sequences have gone on already.
        """
        for slot in slots:
            self.release(slot)
        begun: dict[bool, dict[int, list[int]]] = {}
        for slot, ids in zip(slots, sequences, strict=True):
            self.long[slot] = self.first is not None and len(ids) > self.first
            begun.setdefault(self.long[slot], {})[slot] = ids
        for alike in begun.values():  # keys and values of other rotary factors are others
            self._begin(alike)
        return [ids[self.cache.lengths[slot] :] for slot, ids in zip(slots, sequences, strict=True)]

    def _begin(self, sequences: dict[int, list[int]]) -> None:
        long = self.long[next(iter(sequences))]
        whole = [s for s, b in self.prefixes.items() if self.cache.lengths[s] >= len(b) and self.long[s] == long]
        known = sorted((self.prefixes[slot], slot) for slot in whole)
        members: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in sequences.items():
            self.prefixes[slot] = tuple(ids[:-1])
            members.setdefault(self.prefixes[slot], []).append(slot)
        new = sorted(members)
        shared = _common(new[0], new[-1])  # by all of them, since they are sorted
        if len(new) > 1 and shared >= _WORTH_COPYING and _closest(known, new[0])[1] < shared:
            first = members[new[0]][0]
            self.append([first], [list(new[0][:shared])])
            bisect.insort(known, (new[0][:shared], first))
        for prefix in new:
            (target, *_), (source, length) = members[prefix], _closest(known, prefix)
            if length and target != source and (length >= _WORTH_COPYING or length == len(prefix)):
                self._copy(source, [target], length)
        self._read_whole([alike[0] for alike in members.values() if len(alike) > 1])
        for prefix, (first, *others) in members.items():
            if others:
                self._copy(first, others, len(prefix))

    def _read_whole(self, slots: list[int]) -> None:
        """Reads what the slots' prefixes still lack, some thousand tokens at a time."""
        rest = {s: list(self.prefixes[s][self.cache.lengths[s] :]) for s in slots}
        waiting = [s for s in slots if rest[s]]
        while waiting:
            now = [waiting.pop()]
            while waiting and sum(len(rest[s]) for s in [*now, waiting[-1]]) <= _PREFILL_TOKENS:
                now.append(waiting.pop())
            self.append(now, [rest[s] for s in now])

    @torch.no_grad()
    def append(self, slots: list[int], chunks: list[list[int]]) -> torch.Tensor:
        """Feeds each slot its chunk (one token or more); returns their last tokens' hidden states ``[n, hidden]``."""
        if self.first is not None:
            chunks = [self._again(slot, chunk) for slot, chunk in zip(slots, chunks, strict=True)]
        if self.passes is not None and all(len(chunk) == 1 for chunk in chunks):
            return self.passes.read(slots, [token for (token,) in chunks])
        order = sorted(range(len(slots)), key=lambda i: (len(chunks[i]) > 1, slots[i]))
        counts = [len(chunks[i]) for i in order]
        layout = CachedLayout(self.cache, [slots[i] for i in order], counts)
        ids = torch.tensor([token for i in order for token in chunks[i]], device=self.cache.device)
        long = None if self.first is None else torch.tensor(self.long, device=ids.device)[layout.owners]
        hidden = packed.forward(self.model, ids, layout.positions, layout, long)
        for slot, chunk in zip(slots, chunks, strict=True):
            self.cache.lengths[slot] += len(chunk)
        back = sorted(range(len(order)), key=order.__getitem__)
        return hidden[layout.last[back]]

    def _again(self, slot: int, chunk: list[int]) -> list[int]:
        """What ``slot`` must read to have read ``chunk``: once it outgrows the first range all of it, by the long factors."""
        known = self.read[slot]
        if not self.long[slot] and len(known) + len(chunk) > (self.first or 0):
            self.long[slot], self.cache.lengths[slot] = True, 0
        at = self.cache.lengths[slot]
        self.read[slot] = known + chunk
        return self.read[slot][at:]

    def length(self, slot: int) -> int:
        """Tokens that were read of a slot's sequence; after a `rewind` the cache may hold fewer."""
        return self.cache.lengths[slot] if self.first is None else len(self.read[slot])

    def rewind(self, slot: int, length: int) -> None:
        """Forgets all but the first ``length`` tokens of a slot's sequence: the pass that read the others failed."""
        self.read[slot] = self.read[slot][:length]
        self.cache.lengths[slot] = 0 if self.long[slot] else length  # it may have failed at the end of the first range

    def release(self, slot: int) -> None:
        self.prefixes.pop(slot, None)
        self.read[slot] = []
        self.cache.release(slot)

    def _copy(self, source: int, targets: list[int], length: int) -> None:
        self.cache.copy(source, targets, length)
        for target in targets:
            self.read[target] = self.read[source][:length]

    def move(self, source: int, target: int) -> None:
        """Moves a sequence to a free slot."""
        self.long[target] = self.long[source]
        self.cache.copy(source, [target], self.cache.lengths[source])
        self.read[target] = self.read[source]  # more than is in the cache, after a `rewind`
        self.prefixes[target] = self.prefixes[source]
        self.release(source)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The number of tokens with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _closest(known: list[tuple[tuple[int, ...], int]], prefix: tuple[int, ...]) -> tuple[int, int]:
    """The slot whose prefix shares most with this one, and how many tokens; ``known`` is sorted, so it is a neighbour."""
    at = bisect.bisect(known, (prefix,))
    near = [(_common(b, prefix), slot) for b, slot in known[max(at - 1, 0) : at + 1]]
    length, slot = max(near, default=(0, -1))
    return slot, length
