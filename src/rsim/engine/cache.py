"""A preallocated KV cache with a slot for each sequence, and the packed forward pass that reads and writes it."""

from __future__ import annotations

import math
import mmap
from operator import add

import torch

from rsim.engine.packed import Scores, additive_mask, grouped_attention

_NORESERVE = 0x4000  # Linux's flag; Python names it from 3.13 on
_ALIGNED = 8  # tokens: attention on GPUs wants masks whose rows begin at multiples of 16 bytes


class SlotCache:
    """Keys and values of ``slots`` sequences, written in place; slot ``i`` holds ``lengths[i]`` tokens.

    ``capacity`` is the longest sequence that fits, at least what was asked for; it doubles when one outgrows it. Each layer's
    tensors are ``[slots, kv_heads, capacity, d]``, made when it first writes. What lies behind a sequence is never visible.

    On a CPU only what sequences have written takes memory, page by page, and a sequence longer than the first capacity gives
    its own back when it goes; elsewhere the tensors shrink to the first capacity once no sequence needs more.
    """

    def __init__(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        capacity += -capacity % _ALIGNED
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.lengths = [0] * slots
        self.capacity = self.first = capacity
        self.dtype, self.device = dtype, device
        self.moves = 0  # how often the tensors were made anew
        self.pages: dict[int, mmap.mmap] = {}  # by the address of the tensor that lies there

    def make_room(self, length: int) -> None:
        """Makes sure that sequences of ``length`` tokens fit."""
        if length <= self.capacity:
            return
        self._resize(max(length + -length % _ALIGNED, 2 * self.capacity))

    def _resize(self, capacity: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in tensors.items():  # one after the other, so that only one layer is held twice
                tensors[layer] = self._zeros((*old.shape[:2], capacity, old.shape[3]))
                for slot, length in enumerate(self.lengths):
                    tensors[layer][slot, :, :length] = old[slot, :, :length]
                self.pages.pop(old.data_ptr(), None)
        self.capacity = capacity
        self.moves += 1

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        size = math.prod(shape) * self.dtype.itemsize
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        tensor = torch.frombuffer(pages, dtype=self.dtype).view(shape)
        self.pages[tensor.data_ptr()] = pages
        return tensor

    def release(self, slot: int) -> None:
        """Frees a slot, and the memory of a long sequence."""
        length, self.lengths[slot] = self.lengths[slot], 0
        if length <= self.first:
            return
        if self.device.type != "cpu":
            if max(self.lengths) <= self.first:
                self._resize(self.first)
            return
        for tensor in (*self.keys.values(), *self.values.values()):
            size = tensor.stride(0) * tensor.itemsize
            begin, end = -(-slot * size // mmap.PAGESIZE), (slot + 1) * size // mmap.PAGESIZE
            if begin < end:
                place = begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE
                self.pages[tensor.data_ptr()].madvise(mmap.MADV_DONTNEED, *place)

    def wipe(self, slot: int, length: int) -> None:
        """Overwrites the first ``length`` tokens, which are no numbers: masked, they would still spoil what follows there."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[slot, :, :length] = 0

    def write(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts ``key`` and ``value`` ``[kv_heads, N, d]`` at ``slots`` and ``positions`` ``[N]``; returns all of the layer."""
        for tensors, new in ((self.keys, key), (self.values, value)):
            if layer not in tensors:
                shape = (len(self.lengths), new.shape[0], self.capacity, new.shape[2])
                tensors[layer] = self._zeros(shape)
        keys, values = self.keys[layer], self.values[layer]
        keys[slots, :, positions] = key.transpose(0, 1)
        values[slots, :, positions] = value.transpose(0, 1)
        return keys, values

    def mask(self, distance: torch.Tensor, window: int | None, group: int) -> torch.Tensor:
        """Of queries that lie ``distance [b, w, u]`` tokens behind the cache's positions, for `grouped_attention`."""
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return additive_mask(visible, group, self.dtype)

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Makes the slots ``targets`` begin with the first ``length`` tokens of slot ``source``."""
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[targets, :, :length] = tensor[source, :, :length].clone()  # torch refuses a view of a whole slot
        for target in targets:
            self.lengths[target] = length


class CachedLayout:
    """New tokens of some slots, packed: those of the slots with one new token first, in slot order, then the longer chunks.

    All single tokens attend in one batch, over a view of the cache: nothing is copied. Longer chunks of like length
    attend together, over a copy of their slots.
    """

    def __init__(self, cache: SlotCache, slots: list[int], counts: list[int]) -> None:
        begins = [cache.lengths[slot] for slot in slots]
        cache.make_room(max(map(add, begins, counts)))
        self.cache = cache
        # Of each row: its slot, how many tokens, how many are in the slot already; and of each token its slot and position.
        owner, count, begin = (torch.tensor(numbers, device=cache.device) for numbers in (slots, counts, begins))
        self.last = count.cumsum(0) - 1
        self.owners = owner.repeat_interleave(count)
        self.positions = torch.arange(sum(counts), device=cache.device)
        self.positions += (begin - (self.last - count + 1)).repeat_interleave(count)
        self.singles = counts.count(1)
        self._decoding(slots[: self.singles])
        self.buckets = [self._bucket(rows, slots, counts) for rows in _alike(counts, self.singles)]
        self._masks: dict[tuple[int, int | None, int], torch.Tensor] = {}

    def _decoding(self, slots: list[int]) -> None:
        self.span = slots[-1] + 1 if slots else 0  # slots 0 .. span-1 are in the view; those that rest are not looked at
        self.gaps = len(slots) != self.span
        self.upto = max((self.cache.lengths[s] for s in slots), default=0) + 1
        self.lengths = torch.tensor(self.cache.lengths[: self.span], device=self.cache.device)

    def _bucket(self, rows: list[int], slots: list[int], counts: list[int]) -> _Bucket:
        device, ends = self.cache.device, self.last.tolist()
        width = max(counts[r] for r in rows)
        index = [[ends[r] - counts[r] + 1 + min(i, counts[r] - 1) for i in range(width)] for r in rows]
        begin = torch.tensor([self.cache.lengths[slots[r]] for r in rows], device=device)
        return _Bucket(
            slots=torch.tensor([slots[r] for r in rows], device=device),
            index=torch.tensor(index, device=device),
            positions=begin[:, None] + torch.arange(width, device=device),
            real=torch.tensor([[i < counts[r] for i in range(width)] for r in rows], device=device),
            upto=max(self.cache.lengths[slots[r]] + counts[r] for r in rows),
        )

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
        keys, values = self.cache.write(layer, self.owners, self.positions, key, value)
        query = query.transpose(0, 1)  # [N, heads, d]
        if not self.buckets and not self.gaps:
            return self._attend_singles(keys, values, query, scores)
        out = query.new_empty((*query.shape[:2], value.shape[-1]))
        if self.singles:
            at = self.owners[: self.singles]
            rows = query.new_zeros((self.span, *query.shape[1:])).index_copy_(0, at, query[: self.singles])
            out[: self.singles] = self._attend_singles(keys, values, rows, scores)[at]
        for number, bucket in enumerate(self.buckets):
            chosen_keys, chosen_values = (t[bucket.slots, :, : bucket.upto] for t in (keys, values))
            rows = query[bucket.index].transpose(1, 2)
            mask = self._mask(number, scores.window, rows.shape[1] // keys.shape[1])
            attended = grouped_attention(rows, chosen_keys, chosen_values, mask, scores)
            out[bucket.index[bucket.real]] = attended[bucket.real]
        return out

    def _attend_singles(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, scores: Scores) -> torch.Tensor:
        """``query [span, heads, d]`` to ``[span, heads, e]``."""
        rows = query[:, :, None]
        seen = keys[: self.span, :, : self.upto], values[: self.span, :, : self.upto]
        mask = self._mask(-1, scores.window, query.shape[1] // keys.shape[1])
        return grouped_attention(rows, *seen, mask, scores)[:, 0]

    def _mask(self, bucket: int, window: int | None, group: int) -> torch.Tensor:
        """The mask of a bucket, or of the single tokens (-1); made once per forward pass."""
        if (bucket, window, group) not in self._masks:
            positions = self.lengths[:, None] if bucket < 0 else self.buckets[bucket].positions
            upto = self.upto if bucket < 0 else self.buckets[bucket].upto
            distance = positions[:, :, None] - torch.arange(upto, device=self.cache.device)
            self._masks[bucket, window, group] = self.cache.mask(distance, window, group)
        return self._masks[bucket, window, group]


class _Bucket:
    """Chunks of like length: ``index``, ``positions`` and ``real`` are ``[rows, width]``, right-padded."""

    def __init__(
        self, *, slots: torch.Tensor, index: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, upto: int
    ) -> None:
        self.slots, self.index, self.positions, self.real, self.upto = slots, index, positions, real, upto


def _alike(counts: list[int], first: int) -> list[list[int]]:
    """Rows from ``first`` on whose counts share a power of two."""
    by_size: dict[int, list[int]] = {}
    for row in range(first, len(counts)):
        by_size.setdefault((counts[row] - 1).bit_length(), []).append(row)
    return list(by_size.values())
