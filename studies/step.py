"""A whole training step in GRPO mode (rollout, reward, gradient, AdamW) against TRL's GRPOTrainer.

Same model, prompts, number of sampled tokens (end of turn ignored), optimiser and float32; the two run in turn, each in a
process of its own, so that their peak memory can be told apart. TRL runs without gradient checkpointing (its faster mode).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rsim.config import Config, load_config
from studies.ledger import Row
from studies.workload import in_child, peak_gib
from studies.workload import questions as made_up

ISSUE = 3
_TIMED = 2  # steps of each process that count; one before them warms up


def run(model: str = "smollm2-135m", questions: int = 2, group: int = 8, tokens: int = 64, rounds: int = 3) -> Iterator[Row]:
    common = {"model": model, "count": questions, "group": group, "tokens": tokens}
    results: dict[str, list[dict[str, Any]]] = {"trl": [], "rsim": []}
    for _ in range(rounds):
        for side, kept in results.items():
            kept.append(in_child("studies.step", {"side": side, **common}))
    seconds = {side: [statistics.median(r["seconds"]) for r in kept] for side, kept in results.items()}
    peaks = {side: statistics.median(r["peak"] for r in kept) for side, kept in results.items()}
    faster = statistics.median(a / b for a, b in zip(seconds["trl"], seconds["rsim"], strict=True))
    memory = peaks["rsim"] / peaks["trl"]
    yield Row("step: TRL's time / rsim's", round(faster, 2), "x", "at least 1.5", faster >= 1.5)
    yield Row("step: rsim's peak memory / TRL's", round(memory, 2), "x", "at most 0.7", memory <= 0.7)
    for side, values in seconds.items():
        yield Row(f"step: {side}, seconds", round(statistics.median(values), 2), "s")
        yield Row(f"step: {side}, peak memory", round(peaks[side], 2), "GiB")
    rollout = statistics.median(r["rollout"] for r in results["rsim"])
    yield Row("step: rsim, of them rollout", round(rollout, 2), "s")


def one_process(side: str, **settings: Any) -> dict[str, Any]:
    """One process's steps: their seconds and the peak memory of all of it."""
    return (_rsim if side == "rsim" else _trl)(**settings)


def reward_of(ids: Sequence[int]) -> float:
    """A reward that differs within every group and depends on what was sampled alone."""
    return sum(ids) % 97 / 97


def reward(episode: Any) -> float:
    return reward_of(episode.token_ids[episode.prompt_length :])


def step_config(
    folder: str, model: str, count: int, group: int, tokens: int, checkpointing: bool = False, pair: bool = False
) -> Config:
    """A run of GRPO alone, or of a planner and a reasoner of the same model, whose episodes have ``tokens`` tokens."""
    models = {"out": f"{folder}/run", "models.reasoner": model, "models.planner": model if pair else "none"}
    data = f"{folder}/questions.jsonl"
    asked = {"data.train": data, "data.eval": data, "train.questions": count, "train.group": group}
    length = {"rollout.max_tokens": tokens, "rollout.answer_tokens": 1, "rewards.custom": [f"{__file__}:reward"]}
    memory = {"train.micro_tokens": 1024, "train.gradient_checkpointing": checkpointing}
    other = {"train.reasoner_lr": 1e-6, "train.trackers": [], "train.samples_every": 0}
    if pair:  # steps that only their cap ends, and an answer as long as what is left
        other |= {"rollout.delimiter": "@@@@", "rollout.step_tokens": tokens // 8, "rollout.max_steps": 16}
        length["rollout.answer_to_end"] = True
    settings: dict[str, Any] = models | asked | length | memory | other
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def _rsim(
    model: str, count: int, group: int, tokens: int, checkpointing: bool = False, pair: bool = False, steps: int = _TIMED + 1
) -> dict[str, Any]:
    from rsim.policies.reasoner import Reasoner
    from rsim.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder, patch.object(Reasoner, "end_ids", frozenset()):
        data = Path(folder) / "questions.jsonl"
        data.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in made_up(count * steps)))
        trainer = Trainer(step_config(folder, model, count, group, tokens, checkpointing, pair))
        records = [trainer.train_step() for _ in range(steps)]
    assert all(r["length/sampled"] == tokens or pair for r in records)
    counted = records[1:] or records
    return {
        "seconds": [r["seconds"] for r in counted],
        "rollout": statistics.median(r["seconds_rollout"] for r in counted),
        "peak": peak_gib(),
        "tokens": statistics.mean(r["length/sampled"] for r in records),
    }


def _trl(model: str, count: int, group: int, tokens: int, checkpointing: bool = False) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rsim.policies.loading import load_reasoner

    reasoner = load_reasoner(model)
    texts = [reasoner.tokenizer.decode(reasoner.prompt_ids(q)) for q in made_up(count * (_TIMED + 1))]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    def scored(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        assert all(len(ids) == tokens for ids in completion_ids)
        return [reward_of(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        size = {"per_device_train_batch_size": count * group, "num_generations": group, "max_completion_length": tokens}
        length = {"generation_kwargs": {"min_new_tokens": tokens}, "learning_rate": 1e-6, "max_steps": _TIMED + 1}
        quiet = {"save_strategy": "no", "disable_tqdm": True, "scale_rewards": "none", "shuffle_dataset": False}
        settings = GRPOConfig(**trl_settings(folder), **size, **length, **quiet, gradient_checkpointing=checkpointing)
        trainer = GRPOTrainer(
            model=reasoner.model,
            args=settings,
            reward_funcs=scored,
            processing_class=reasoner.tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            callbacks=[Clock()],
        )
        trainer.train()
    return {"seconds": seconds[1:], "peak": peak_gib()}


def trl_settings(folder: str) -> dict[str, Any]:
    """What every GRPOConfig here has: float32 on the CPU, the loss that rsim's default equals."""
    quiet = {"output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False}
    return quiet | {"beta": 0.0, "loss_type": "bnpo", "temperature": 1.0}


if __name__ == "__main__":
    print(json.dumps(one_process(**json.loads(sys.argv[1]))))
