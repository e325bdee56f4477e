"""What a batch of episodes looks like, as numbers for the record of a step."""

from __future__ import annotations

from collections import Counter

from rsim.game.episode import FLAGS, Episode
from rsim.rewards.rewards import Score


def rollout_metrics(episodes: list[Episode], scores: list[Score], names: tuple[str, ...]) -> dict[str, float]:
    """Means over a batch of episodes: reward parts, lengths, flags and strategy shares."""
    count = len(episodes)
    used = Counter(s.strategy for e in episodes for s in e.steps if s.strategy >= 0)
    total = max(sum(used.values()), 1)
    return {
        "accuracy": sum(s.correct for s in scores) / count,
        "checker_failures": float(sum(bool(s.failure) for s in scores)),
        **{f"reward/{part}": sum(s.parts[part] for s in scores) / count for part in scores[0].parts},
        "length/sampled": sum(e.sampled_tokens for e in episodes) / count,
        "length/injected": sum(e.injected_tokens for e in episodes) / count,
        "length/steps": sum(len(e.steps) for e in episodes) / count,
        **{f"flags/{f}": sum(getattr(e, f) for e in episodes) / count
           for f in FLAGS},
        **{f"strategy/{name}": used[i] / total for i, name in enumerate(names)},
    }  # fmt: skip
