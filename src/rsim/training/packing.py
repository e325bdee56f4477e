"""A batch of recorded sequences as one packed stream in which the episodes of a question share its tokens.

Every token goes through the model once: no padding, and the beginning that a group's episodes have in common
is read once for all of them, forward and backward. Attention works on two padded batches, the beginnings and
the continuations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from rsim.engine.packed import Scores, additive_mask, grouped_attention
from rsim.training.batch import ActionBatch


@dataclass
class Stream:
    """``ids`` and ``positions`` ``[N]``; ``index [B, K]``: where in the stream each action's state lies;
    ``long [N]``: which tokens are read by the long rotary factors, of a model that has some."""

    ids: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    long: torch.Tensor | None
    layout: SharedLayout


def pack(batch: ActionBatch, first: int | None = None) -> Stream:
    """Lays a batch out. ``first``: the first range of a model with longrope. As in rollouts, what comes
    behind at most so many tokens is predicted by the short factors and the rest by the long ones: a row with
    both is read twice."""
    if first is None:
        return _pack(batch, None)
    mask, far = batch.mask.bool(), batch.positions >= first
    parts = [mask & ~far, mask & far]
    rows = [part.any(1).nonzero()[:, 0] for part in parts]
    both = torch.cat(rows)
    twice = replace(batch, **{f.name: getattr(batch, f.name)[both] for f in fields(batch)})
    twice.mask = torch.cat([part[r] for part, r in zip(parts, rows, strict=True)]).to(batch.mask.dtype)
    long = torch.arange(len(both), device=both.device) >= len(rows[0])
    twice.groups = 2 * twice.groups + long
    stream = _pack(twice, long)
    index = torch.zeros_like(batch.positions)
    for at, part, r in zip((stream.index[~long], stream.index[long]), parts, rows, strict=True):
        index[r] = torch.where(part[r], at, index[r])
    stream.index = index
    return stream


def _pack(batch: ActionBatch, long: torch.Tensor | None) -> Stream:
    owner, shared = _shared_beginnings(batch)
    begins = batch.prefixes[shared]
    skipped = torch.where(owner >= 0, batch.prefixes, 0)  # tokens of a row that lie in a shared beginning
    lengths = ((batch.positions + 1) * batch.mask.long()).max(1).values.maximum(skipped)
    device = batch.ids.device
    prefix = _Padded.of(begins, 0, device)
    own = _Padded.of(lengths - skipped, int(begins.sum()), device)
    columns = skipped[:, None] + torch.arange(own.width, device=device)
    ids = torch.cat([batch.ids[shared][:, : prefix.width][prefix.real], _take(batch.ids, columns)[own.real]])
    positions = torch.cat(
        [torch.arange(prefix.width, device=device).expand_as(prefix.real)[prefix.real], columns[own.real]]
    )
    inside = batch.positions < skipped[:, None]
    at_prefix = (prefix.first[owner.clamp(min=0)][:, None] if len(shared) else 0) + batch.positions
    index = torch.where(inside, at_prefix, own.first[:, None] + batch.positions - skipped[:, None])
    if long is not None:
        long = torch.cat([long[shared].repeat_interleave(begins), long.repeat_interleave(lengths - skipped)])
    return Stream(ids, positions, index, long, SharedLayout(prefix, own, owner, columns))


def _shared_beginnings(batch: ActionBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """``owner [B]``, the number of the beginning that a row shares (-1: its own), and a row that has each,
    ``[n]``.

    Raises:
        ValueError: rows of a group that are said to begin alike do not.
    """
    groups: list[int] = batch.groups.tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    owner = [-1] * len(groups)
    shared: list[int] = []
    prefixes = batch.prefixes.tolist()
    for rows in members.values():
        length = prefixes[rows[0]]
        if len(rows) == 1 or length == 0:
            continue
        beginnings = batch.ids[rows, :length]
        if any(prefixes[r] != length for r in rows) or not bool((beginnings == beginnings[:1]).all()):
            raise ValueError(f"the episodes of group {groups[rows[0]]} do not begin alike")
        for row in rows:
            owner[row] = len(shared)
        shared.append(rows[0])
    device = batch.ids.device
    return torch.tensor(owner, device=device), torch.tensor(shared, dtype=torch.long, device=device)


@dataclass
class _Padded:
    """Sequences of the stream, right-padded: ``index`` and ``real`` ``[rows, width]``, ``first [rows]``."""

    index: torch.Tensor
    real: torch.Tensor
    first: torch.Tensor
    width: int

    @classmethod
    def of(cls, lengths: torch.Tensor, begin: int, device: torch.device) -> _Padded:
        width = int(lengths.max()) if len(lengths) else 0
        first = begin + lengths.cumsum(0) - lengths
        steps = torch.arange(width, device=device)
        real = steps < lengths[:, None]
        return cls(torch.where(real, first[:, None] + steps, 0), real, first, width)

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens [heads, N, d]`` as ``[rows, heads, width, d]``."""
        heads, _, size = tokens.shape
        taken = tokens.index_select(1, self.index.flatten())
        return taken.view(heads, *self.index.shape, size).transpose(0, 1)


class SharedLayout:
    """Beginnings see themselves; a continuation sees its beginning and itself, causally."""

    def __init__(self, prefix: _Padded, own: _Padded, owner: torch.Tensor, columns: torch.Tensor) -> None:
        self.prefix, self.own, self.owner, self.columns = prefix, own, owner, columns
        # Where each token of the stream lies in the two padded batches, laid end to end.
        self.back = torch.cat([prefix.real.flatten(), own.real.flatten()]).nonzero()[:, 0]
        self._masks: dict[tuple[int | None, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        among_prefixes, among_own = self._mask(scores.window, len(query) // len(key), query.dtype)
        queries, keys, values = (self.own.take(t) for t in (query, key, value))
        parts = []
        if self.prefix.width:
            first, first_keys, first_values = (self.prefix.take(t) for t in (query, key, value))
            among = grouped_attention(first, first_keys, first_values, among_prefixes, scores)
            parts.append(among.flatten(0, 1))
            at = self.owner.clamp(min=0)
            keys = torch.cat([first_keys.index_select(0, at), keys], 2)
            values = torch.cat([first_values.index_select(0, at), values], 2)
        parts.append(grouped_attention(queries, keys, values, among_own, scores).flatten(0, 1))
        return torch.cat(parts).index_select(0, self.back)

    def _mask(self, window: int | None, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if (window, group) not in self._masks:
            device = self.owner.device
            steps = torch.arange(self.prefix.width, device=device)
            own = torch.arange(self.own.width, device=device)
            among_prefixes = _near(steps[None, :, None] - steps, window)
            owned = torch.zeros(len(self.owner), self.prefix.width, dtype=torch.bool, device=device)
            if len(self.prefix.real):
                owned = self.prefix.real[self.owner.clamp(min=0)] & (self.owner >= 0)[:, None]
            of_prefix = owned[:, None] & _near(self.columns[:, :, None] - steps, window)
            of_own = _near(own[None, :, None] - own, window).expand(len(self.owner), -1, -1)
            masks = among_prefixes, torch.cat([of_prefix, of_own], 2)
            among, beside = (additive_mask(mask, group, dtype) for mask in masks)
            self._masks[window, group] = among, beside
        return self._masks[window, group]


def _near(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _take(ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return ids.gather(1, columns.clamp(max=ids.shape[1] - 1))
