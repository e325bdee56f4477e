"""A whole training step in GRPO mode (rollout, reward, gradient, AdamW) against TRL's GRPOTrainer.

    python -m studies.step [--model smollm2-135m] [--questions 2] [--group 8] [--tokens 64] [--rounds 3] [--record]

Same model, prompts, number of sampled tokens (end of turn ignored), optimiser and float32; the two run in turn, each in a
process of its own, so that their peak memory can be told apart. TRL runs without gradient checkpointing (its faster mode).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from studies.ledger import record, row
from studies.workload import in_child, peak_gib, questions, show

_TIMED = 2  # steps of each process that count; one before them warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write results/step.json and its page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        settings = json.loads(args.child)
        print(json.dumps(run(**settings)))
        return
    common = {"model": args.model, "count": args.questions, "group": args.group, "tokens": args.tokens}
    rows = measure(common, args.rounds)
    show(rows)
    if args.record:
        record("step", 3, f"A GRPO step: {args.model}, {args.questions} x {args.group} episodes of {args.tokens} tokens", rows)


def measure(common: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    results: dict[str, list[dict[str, Any]]] = {"trl": [], "rsim": []}
    for _ in range(rounds):
        for side, kept in results.items():
            kept.append(in_child("studies.step", {"side": side, **common}))
            print(side, kept[-1], flush=True)
    seconds = {side: [statistics.median(r["seconds"]) for r in kept] for side, kept in results.items()}
    peaks = {side: statistics.median(r["peak"] for r in kept) for side, kept in results.items()}
    faster = statistics.median(a / b for a, b in zip(seconds["trl"], seconds["rsim"], strict=True))
    memory = peaks["rsim"] / peaks["trl"]
    return [
        row("step: TRL's time / rsim's", round(faster, 2), unit="x", goal="at least 1.5", met=faster >= 1.5),
        row("step: rsim's peak memory / TRL's", round(memory, 2), unit="x", goal="at most 0.7", met=memory <= 0.7),
        *(row(f"step: {side}, seconds", round(statistics.median(values), 2), unit="s") for side, values in seconds.items()),
        row("step: rsim, of them rollout", round(statistics.median(r["rollout"] for r in results["rsim"]), 2), unit="s"),
        *(row(f"step: {side}, peak memory", round(value, 2), unit="GiB") for side, value in peaks.items()),
    ]


def run(side: str, model: str, count: int, group: int, tokens: int, **more: Any) -> dict[str, Any]:
    """One process's steps: their seconds and the peak memory of all of it."""
    return (_rsim if side == "rsim" else _trl)(model, count, group, tokens, **more)


def reward_of(ids: Sequence[int]) -> float:
    """A reward that differs within every group and depends on what was sampled alone."""
    return sum(ids) % 97 / 97


def reward(episode: Any) -> float:
    return reward_of(episode.token_ids[episode.prompt_length :])


def _rsim(
    model: str, count: int, group: int, tokens: int, *, micro_tokens: int = 1024, checkpointing: bool = False
) -> dict[str, Any]:
    from rsim.config import load_config
    from rsim.policies.reasoner import Reasoner
    from rsim.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder, patch.object(Reasoner, "end_ids", frozenset()):
        data = Path(folder) / "questions.jsonl"
        data.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions(count * (_TIMED + 1))))
        settings = {
            "out": f"{folder}/run", "models.reasoner": model, "models.planner": "none", "data.train": str(data),
            "data.eval": str(data), "rollout.max_tokens": tokens, "rollout.answer_tokens": 1, "train.questions": count,
            "train.group": group, "train.micro_tokens": micro_tokens, "train.reasoner_lr": 1e-6, "train.trackers": [],
            "train.samples_every": 0, "rewards.custom": [f"{__file__}:reward"], "train.gradient_checkpointing": checkpointing,
        }  # fmt: skip
        trainer = Trainer(load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()]))
        rollouts: list[float] = []
        play = trainer.game.play

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            episodes = play(*args, **kwargs)
            rollouts.append(time.perf_counter() - began)
            assert all(e.sampled_tokens == tokens for e in episodes)
            return episodes

        trainer.game.play = timed  # type: ignore[method-assign]
        seconds = [trainer.train_step()["seconds"] for _ in range(_TIMED + 1)]
    return {"seconds": seconds[1:], "rollout": statistics.median(rollouts[1:]), "peak": peak_gib()}


def _trl(model: str, count: int, group: int, tokens: int, *, checkpointing: bool = False) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rsim.policies.loading import load_reasoner

    reasoner = load_reasoner(model)
    texts = [reasoner.tokenizer.decode(reasoner.prompt_ids(q)) for q in questions(count * (_TIMED + 1))]
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
        settings = GRPOConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=count * group,
            num_generations=group, max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens}, beta=0.0,
            learning_rate=1e-6, max_steps=_TIMED + 1, gradient_checkpointing=checkpointing, save_strategy="no",
            disable_tqdm=True, temperature=1.0, loss_type="bnpo", scale_rewards="none", shuffle_dataset=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=reasoner.model, args=settings, reward_funcs=scored, processing_class=reasoner.tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return {"seconds": seconds[1:], "peak": peak_gib()}


if __name__ == "__main__":
    main()
