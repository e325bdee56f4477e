"""With ``planner = none`` the trainer is plain GRPO: its losses equal TRL's on the same batch."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rsim.config import Config, ObjectiveConfig, StageConfig, TrainConfig
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.objective.advantages import group_advantages
from rsim.objective.joint import Evaluated, agent_objective
from rsim.objective.losses import action_weights
from rsim.rewards.rewards import Score
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import reasoner_batch
from rsim.training.update import Update
from tiny import RULES

PROBLEMS = [Problem(q, "1") for q in ("4*17+38=?", "7=?", "x-38=4*17, x=?")]
WIDTH = 40

# (our loss, our normaliser, TRL's settings)
PAIRS = [
    ("grpo", "sequence", {"loss_type": "grpo"}),
    ("grpo", "token", {"loss_type": "bnpo"}),
    ("dapo", "preset", {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("dr_grpo", "preset", {"loss_type": "dr_grpo"}),
    ("cispo", "preset", {"loss_type": "cispo", "epsilon_high": 1.2}),  # TRL's cap is on the ratio itself
    ("gspo", "preset", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
]


def trl_trainer(model, tokenizer, folder, **settings) -> GRPOTrainer:
    arguments = GRPOConfig(
        output_dir=str(folder), report_to=[], per_device_train_batch_size=4, num_generations=4, beta=0.0, use_cpu=True,
        max_completion_length=WIDTH, temperature=0.9, bf16=False, **settings,
    )  # fmt: skip
    return GRPOTrainer(
        model=model, args=arguments, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["7=?"] * 4}),
    )  # fmt: skip


def trl_inputs(episodes, advantages, old) -> dict[str, torch.Tensor]:
    """Left-padded prompts and right-padded completions, as TRL lays a batch out."""
    longest = max(e.prompt_length for e in episodes)
    wide = max(len(e.token_ids) - e.prompt_length for e in episodes)
    inputs = {name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    for e in episodes:
        left, right = longest - e.prompt_length, wide - (len(e.token_ids) - e.prompt_length)
        inputs["prompt_ids"].append([0] * left + e.token_ids[: e.prompt_length])
        inputs["prompt_mask"].append([0] * left + [1] * e.prompt_length)
        inputs["completion_ids"].append(e.token_ids[e.prompt_length :] + [0] * right)
        inputs["completion_mask"].append([1] * (wide - right) + [0] * right)
    tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
    count = tensors["completion_mask"].sum()
    return tensors | {"advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": count}


@pytest.fixture
def episodes(reasoner):
    rules = replace(RULES, temperature=0.9, max_tokens=WIDTH)
    return Game(reasoner, None, rules).play(PROBLEMS, seed=5, group_size=4)


@pytest.mark.parametrize(("loss", "normaliser", "settings"), PAIRS)
def test_loss_and_gradient_equal_trl(reasoner, episodes, tmp_path, loss, normaliser, settings):
    batch = reasoner_batch(episodes, torch.device("cpu"))
    returns = torch.sin(torch.arange(12.0))
    advantages, _ = group_advantages(returns, torch.tensor([e.group for e in episodes]))
    wide = max(len(e.token_ids) - e.prompt_length for e in episodes)
    # Old log-probs that differ from the current ones by up to 0.5, so that ratios are far from 1 and clips act.
    old = batch.old_logprobs + 0.5 * torch.sin(torch.arange(batch.mask.numel()).float()).reshape(batch.mask.shape) * batch.mask
    assert old.shape[1] == wide, "without a planner every token after the prompt is sampled"

    theirs = copy.deepcopy(reasoner.model)
    trainer = trl_trainer(theirs, reasoner.tokenizer, tmp_path, **settings)
    trainer.model.eval()
    expected = trainer._compute_loss(trainer.model, trl_inputs(episodes, advantages, old))
    expected.backward()

    agent = Agent("reasoner", reasoner.model, reasoner.logits, AgentSettings(temperature=0.9, learning_rate=0.0))
    now: Evaluated = agent.evaluate(batch)
    preset = {"dapo": "token", "dr_grpo": "constant", "cispo": "token", "gspo": "sequence"}
    weights = action_weights(
        preset[loss] if normaliser == "preset" else normaliser, batch.mask, actions=int(batch.mask.sum()),
        episodes=len(batch), constant=WIDTH * len(batch), joint_lengths=batch.joint_lengths,
    )  # fmt: skip
    value, sums = agent_objective(now, old, advantages[:, None] * batch.mask, batch.mask, weights, ObjectiveConfig(loss=loss))
    (-value).backward()
    assert -value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert sums["clipped"] > 0
    for (name, p), q in zip(reasoner.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5), name


def test_one_training_step_without_planner_is_trl_grpo(reasoner, episodes, tmp_path):
    """The trainer's own path (advantages, weights, micro-batches) against TRL fed with the same advantages."""
    returns = torch.sin(torch.arange(12.0))
    groups = torch.tensor([e.group for e in episodes])
    advantages, _ = group_advantages(returns, groups)
    theirs = copy.deepcopy(reasoner.model)
    trainer = trl_trainer(theirs, reasoner.tokenizer, tmp_path, loss_type="bnpo")
    trainer.model.eval()
    inputs = trl_inputs(episodes, advantages, None)
    expected = trainer._compute_loss(trainer.model, inputs).item()

    scores = [Score(None, False, planner=0.0, reasoner=float(r), parts={}) for r in returns]
    agent = Agent("reasoner", reasoner.model, reasoner.logits, AgentSettings(temperature=0.9, learning_rate=0.0))
    rules = replace(RULES, max_tokens=WIDTH)
    config = Config(rollout=rules, train=TrainConfig(micro_tokens=90))
    metrics = Update(config, StageConfig("grpo", 1, 0.0), 0, alone=True).agent(agent, episodes, scores)
    assert metrics["reasoner/loss"] == pytest.approx(expected, abs=1e-5)
