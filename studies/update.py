"""The update alone (log-probs, gradient, AdamW) on recorded episodes, against TRL's loss on the same ones.

*equal*: every episode has 64 tokens; *ragged*: 16 to 128. Both sides have optimiser and clipping in common and run in turn in
one process; TRL gets a stock model and its own layout (left-padded prompts, right-padded completions), without gradient
checkpointing.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rsim.config import Config, TrainConfig
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.objective.advantages import group_advantages
from rsim.policies.loading import load_reasoner
from rsim.policies.reasoner import Reasoner
from rsim.rewards.rewards import Score
from rsim.training.agent import Agent, AgentSettings
from rsim.training.update import Update
from studies.ledger import Row
from studies.step import trl_settings
from studies.workload import questions as made_up

ISSUE = 3


def run(model: str = "smollm2-135m", questions: int = 2, group: int = 8, rounds: int = 5) -> Iterator[Row]:
    reasoner, stock = load_reasoner(model), load_reasoner(model)
    for name, shortest, longest in (("equal", 64, 64), ("ragged", 16, 128)):
        episodes = _episodes(reasoner, questions, group, shortest, longest)
        yield from measure(name, reasoner, stock, episodes, rounds)


def _episodes(reasoner: Reasoner, count: int, group: int, shortest: int, longest: int) -> list[Episode]:
    rng = random.Random(0)
    made = []
    for number, question in enumerate(made_up(count)):
        prompt = reasoner.prompt_ids(question)
        for _ in range(group):
            n = rng.randint(shortest, longest)
            sampled = [rng.randrange(1000, 40000) for _ in range(n)]
            mask = [0] * len(prompt) + [1] * n
            made.append(Episode(Problem(question, "1"), number, prompt + sampled, len(prompt), mask, [0.0] * len(mask)))
    return made


def measure(name: str, reasoner: Reasoner, stock: Reasoner, episodes: list[Episode], rounds: int) -> Iterator[Row]:
    returns = torch.sin(torch.arange(float(len(episodes))))
    advantages, _ = group_advantages(returns, torch.tensor([e.group for e in episodes]))
    sides = {"trl": _trl_step(stock, episodes, advantages), "rsim": _rsim_step(reasoner, episodes, returns)}
    losses = {side: step() for side, step in sides.items()}  # warms up as well; learning rate 0 on both sides
    if abs(losses["trl"] - losses["rsim"]) > 1e-4:
        raise SystemExit(f"the two losses differ: {losses}")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, step in sides.items():
            began = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - began)
    faster = statistics.median(a / b for a, b in zip(seconds["trl"], seconds["rsim"], strict=True))
    tokens = sum(e.sampled_tokens for e in episodes)
    yield Row(f"update, {name}: TRL's time / rsim's", round(faster, 2), "x")
    for side, values in seconds.items():
        yield Row(f"update, {name}: {side}, sampled tokens per second", round(tokens / statistics.median(values)), "tokens/s")


def _rsim_step(reasoner: Reasoner, episodes: list[Episode], returns: torch.Tensor) -> Callable[[], float]:
    scores = [Score(None, False, planner=0.0, reasoner=float(r), parts={}) for r in returns]
    settings = AgentSettings(temperature=1.0, learning_rate=0.0)
    agent = Agent("reasoner", reasoner.model, reasoner.logits, settings, head_weight=reasoner.head_weight)
    config = Config(train=TrainConfig(micro_tokens=1024))
    return lambda: Update(config, config.stages[0], 0, alone=True).agent(agent, episodes, scores)["reasoner/loss"]


def _trl_step(reasoner: Reasoner, episodes: list[Episode], advantages: torch.Tensor) -> Callable[[], float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    longest, wide = max(e.prompt_length for e in episodes), max(e.sampled_tokens for e in episodes)
    columns: dict[str, list[list[int]]] = {n: [] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    for e in episodes:
        left, right = longest - e.prompt_length, wide - e.sampled_tokens
        columns["prompt_ids"].append([0] * left + e.token_ids[: e.prompt_length])
        columns["prompt_mask"].append([0] * left + [1] * e.prompt_length)
        columns["completion_ids"].append(e.token_ids[e.prompt_length :] + [0] * right)
        columns["completion_mask"].append([1] * e.sampled_tokens + [0] * right)
    inputs: dict[str, Any] = {name: torch.tensor(rows) for name, rows in columns.items()}
    inputs |= {"advantages": advantages, "old_per_token_logps": None, "num_items_in_batch": inputs["completion_mask"].sum()}
    size = {"per_device_train_batch_size": len(episodes), "num_generations": len(episodes), "max_completion_length": wide}
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = GRPOTrainer(
            model=reasoner.model,
            args=GRPOConfig(**trl_settings(folder), **size, gradient_checkpointing=False),
            processing_class=reasoner.tokenizer,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["?"] * len(episodes)}),
        )
    parameters = list(trainer.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def step() -> float:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step
