"""What a run records: the numbers of its steps and evaluations, and sampled episodes."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

from rsim.distributed.world import World
from rsim.errors import UserError
from rsim.evaluation.evaluate import Evaluation, episode_record
from rsim.game.episode import FLAGS, Episode
from rsim.rewards.rewards import Score
from rsim.runs.folder import RunFolder, Trackers, records

_SAMPLED = 4  # episodes of a step
_HELD_OUT = 8  # of an evaluation: always the same questions
_COLUMNS = ("step", "question", "gold", "said", "right", "trace")  # of a tracker's table of episodes


class Records:
    """Writes into a run's folder and its trackers, on the main rank; others write nothing.

    ``names`` are the strategies'; what was logged after ``step`` is logged again.
    """

    def __init__(self, folder: RunFolder, world: World, names: tuple[str, ...], step: int) -> None:
        self.folder, self.world, self.names = folder, world, names
        trackers = folder.config.train.trackers if world.is_main else ()
        self.trackers = Trackers(trackers, folder.path, folder.config, step)

    def log(self, record: dict[str, Any]) -> None:
        """Writes a record down.

        Raises:
            UserError: a number of it is not finite; what was saved before is whole.
        """
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        broken = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            saved = self.folder.checkpoints.latest()
            remedy = f"the last good checkpoint is {saved.name if saved else None}: lower the learning rates"
            raise UserError(f"step {record['step']}: {broken[0]}", remedy)
        if self.world.is_main:
            self.folder.append("metrics.jsonl", record)
            self.trackers.log(record)

    def sample(self, step: int, episodes: list[Episode], scores: list[Score]) -> None:
        """Writes down a few of a step's episodes."""
        played = list(zip(episodes, scores, strict=True))
        self._write(step, random.Random(step).sample(played, min(_SAMPLED, len(played))), "episodes", {})

    def held_out(self, step: int, episodes: list[Episode], scores: list[Score]) -> None:
        """Writes down how the first held-out questions were answered, for comparing before and after."""
        if self.folder.config.train.samples_every:
            played = list(zip(episodes, scores, strict=True))[:_HELD_OUT]
            self._write(step, played, "held_out_episodes", {"held_out": True})

    def last_held_out(self) -> dict[str, Any]:
        """What was logged of the last evaluation; nothing before the first."""
        written = (self.folder.path / "metrics.jsonl").is_file()
        found = [r for r in records(self.folder.path) if "eval/accuracy" in r] if written else []
        last = found[-1] if found else {}
        named = {name.removeprefix("eval/").removeprefix("accuracy_"): value for name, value in last.items()}
        return {"tokens_per_question" if name == "tokens" else name: value for name, value in named.items()}

    def _write(
        self, step: int, played: list[tuple[Episode, Score]], table: str, more: dict[str, Any]
    ) -> None:
        if self.world.is_main:
            records = [{"step": step} | more | episode_record(e, s, self.names) for e, s in played]
            for record in records:
                self.folder.append("episodes.jsonl", record)
            self.trackers.table(table, step, _COLUMNS, [_row(record) for record in records])

    def close(self) -> None:
        self.trackers.close()


def _row(record: dict[str, Any]) -> list[Any]:
    """An episode as a row of ``_COLUMNS``."""
    trace = "".join(
        f"[{s['strategy'] or 'reasoner'}] {s['prompt']}{s['text'].rstrip()}\n" for s in record["steps"]
    )
    said = "" if record["predicted"] is None else str(record["predicted"])
    return [record["step"], record["question"], str(record["answer"]), said, record["correct"], trace]


def held_out_metrics(result: Evaluation) -> dict[str, float]:
    return {
        "eval/accuracy": result.accuracy,
        "eval/accuracy_low": result.low,
        "eval/accuracy_high": result.high,
        "eval/flexible": result.flexible,
        "eval/tokens": result.tokens_per_question,
    }


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
        **{f"flags/{f}": sum(getattr(e, f) for e in episodes) / count for f in FLAGS},
        **{f"strategy/{name}": used[i] / total for i, name in enumerate(names)},
    }
