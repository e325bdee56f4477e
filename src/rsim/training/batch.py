"""Episodes as tensors, for both agents: ids to read, positions to act at, the actions taken there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields

import torch

from rsim.game.episode import Episode


@dataclass
class ActionBatch:
    """``B`` right-padded sequences with up to ``K`` actions each.

    ``ids`` ``[B, T]``; ``positions`` ``[B, K]``, the token whose hidden state predicts the action; the other
    fields up to ``value_targets`` ``[B, K]``; ``joint_lengths`` ``[B]``; ``groups`` ``[B]`` and ``prefixes``
    ``[B]``, the number of tokens with which all rows of a group begin. ``sampler_logprobs`` are those that
    the engine reported, ``old_logprobs`` those under the weights that the batch was taken with. Injected
    tokens are read but are never an action, so nothing that is computed here can touch them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    value_targets: torch.Tensor
    joint_lengths: torch.Tensor
    groups: torch.Tensor
    prefixes: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: torch.Tensor) -> ActionBatch:
        """The given rows, with padding that none of them needs cut away."""
        kept = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        wide = max(int(kept["mask"].sum(1).max()), 1)
        long = int((kept["positions"] * kept["mask"].long()).max()) + 1
        for name, values in kept.items():
            if values.dim() > 1:
                kept[name] = values[:, : long if name == "ids" else wide]
        return ActionBatch(**kept)

    def micro_rows(self, max_tokens: int, world_size: int = 1) -> list[torch.Tensor]:
        """Row numbers of micro-batches of at most ``max_tokens`` tokens (one row at least), and of no more
        than what each of ``world_size`` ranks would have of all tokens.

        A group's rows, which share their beginning, stay together where they fit, beside groups of like
        length.
        """
        lengths = ((self.positions * self.mask.long()).max(1).values + 1).tolist()
        prefixes, members = self.prefixes.tolist(), defaultdict(list)
        for row, group in enumerate(self.groups.tolist()):
            members[group].append(row)
        if world_size > 1:
            total = sum(lengths) - sum((len(rows) - 1) * prefixes[rows[0]] for rows in members.values())
            max_tokens = min(max_tokens, total // world_size + max(lengths))
        parts: list[list[int]] = [[]]
        tokens = 0
        for rows in sorted(members.values(), key=lambda rows: max(lengths[r] for r in rows)):
            for number, row in enumerate(sorted(rows, key=lambda r: lengths[r])):
                added = lengths[row] - (prefixes[row] if number else 0)
                if parts[-1] and tokens + added > max_tokens:
                    parts.append([])
                    tokens, added = 0, lengths[row]
                parts[-1].append(row)
                tokens += added
        return [torch.tensor(part) for part in parts]


def reasoner_batch(
    episodes: list[Episode], device: torch.device, dtype: torch.dtype = torch.float32
) -> ActionBatch:
    """Actions are the sampled tokens; the hidden state of the token before predicts each."""
    places = [[t for t, m in enumerate(e.reasoner_mask) if m] for e in episodes]
    rows = _Rows(
        [e.token_ids for e in episodes],
        [[t - 1 for t in row] for row in places],
        [[e.token_ids[t] for t in row] for e, row in zip(episodes, places, strict=True)],
        [[e.logprobs[t] for t in row] for e, row in zip(episodes, places, strict=True)],
        [e.prompt_length for e in episodes],
    )
    return _batch(episodes, rows, device, dtype)


def planner_batch(
    episodes: list[Episode], device: torch.device, dtype: torch.dtype = torch.float32
) -> ActionBatch:
    """Actions are the planner's decisions; forced terminations are none."""
    taken = [e.decisions for e in episodes]
    rows = _Rows(
        [e.planner_ids for e in episodes],
        [[d.position for d in row] for row in taken],
        [[d.action for d in row] for row in taken],
        [[d.logprob for d in row] for row in taken],
        [row[0].position + 1 if row else 0 for row in taken],
    )
    return _batch(episodes, rows, device, dtype)


@dataclass
class _Rows:
    """What an agent read and did, a list for each episode."""

    ids: list[list[int]]
    positions: list[list[int]]
    actions: list[list[int]]
    logprobs: list[list[float]]
    prefixes: list[int]


def _batch(episodes: list[Episode], rows: _Rows, device: torch.device, dtype: torch.dtype) -> ActionBatch:
    mask = _pad([[1.0] * len(row) for row in rows.actions], dtype, device)
    logprobs = _pad(rows.logprobs, dtype, device)
    joint = [float(len(e.decisions) + e.sampled_tokens) for e in episodes]
    return ActionBatch(
        ids=_pad(rows.ids, torch.long, device),
        positions=_pad(rows.positions, torch.long, device),
        actions=_pad(rows.actions, torch.long, device),
        mask=mask,
        sampler_logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=torch.zeros_like(mask),
        weights=torch.zeros_like(mask),
        value_targets=torch.zeros_like(mask),
        joint_lengths=torch.tensor(joint, dtype=dtype, device=device).clamp(min=1),
        groups=torch.tensor([e.group for e in episodes], device=device),
        prefixes=torch.tensor(rows.prefixes, device=device),
    )


def _pad(rows: list[list[int]] | list[list[float]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    width = max(max(map(len, rows)), 1)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)
