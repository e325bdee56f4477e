"""From scored episodes to one step of each policy: advantages, weights, loss, gradient, optimiser."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from rsim.config import Config, StageConfig
from rsim.game.episode import Episode
from rsim.objective.advantages import gae, group_advantages
from rsim.objective.joint import agent_objective, lambda_factors
from rsim.objective.losses import PRESET_NORMALISER, action_weights
from rsim.rewards.rewards import Score
from rsim.training.agent import Agent
from rsim.training.batch import ActionBatch, planner_batch, reasoner_batch
from rsim.training.schedule import rate_factor


@dataclass
class Lesson:
    """What an agent learns from: a batch, and each row's return ``[B]`` and group."""

    agent: Agent
    batch: ActionBatch
    returns: torch.Tensor
    groups: list[int]
    played: int  # episodes, those that are left out among them


@dataclass
class Update:
    """Updates one agent from a batch of episodes; everything that an update depends on is an argument."""

    config: Config
    stage: StageConfig
    step: int
    alone: bool  # one agent is not there: lambda plays no part

    def agent(self, agent: Agent, episodes: list[Episode], scores: list[Score]) -> dict[str, float]:
        """Trains ``agent`` on ``episodes`` and returns its metrics, keys prefixed with its name.

        Episodes of groups in which this agent's returns are all alike are skipped before any forward pass,
        unless a term is on that they move as well (`_moves_all`).
        """
        returns = torch.tensor([s.planner if agent.name == "planner" else s.reasoner for s in scores])
        groups = torch.tensor([e.group for e in episodes])
        std = self.config.objective.scale_by_std
        advantages, informative = group_advantages(returns, groups, scale_by_std=std)
        metrics = {
            f"{agent.name}/return": float(returns.mean()),
            f"{agent.name}/alike_groups": float(len(set(groups[~informative].tolist()))),
        }
        informative |= self._moves_all(agent.name)
        metrics[f"{agent.name}/skipped_groups"] = float(len(set(groups[~informative].tolist())))
        kept = self._kept(agent, episodes, informative)
        if not kept:
            return metrics
        build = planner_batch if agent.name == "planner" else reasoner_batch
        batch = build([episodes[i] for i in kept], agent.model.device, agent.precision)
        batch.advantages = advantages[kept].to(batch.mask)[:, None] * batch.mask
        lesson = Lesson(agent, batch, returns[kept].to(batch.mask), groups[kept].tolist(), len(episodes))
        return metrics | self._optimise(lesson)

    def _moves_all(self, name: str) -> bool:
        """Whether an agent learns from groups of like returns too: by a critic, entropy or KL."""
        it = self.config.objective
        terms = it.planner_entropy if name == "planner" else it.beta
        return it.loss == "ppo" or terms > 0

    def _kept(self, agent: Agent, episodes: list[Episode], informative: torch.Tensor) -> list[int]:
        """The numbers of the episodes that this agent acted in and learns from."""
        kept = []
        for i, episode in enumerate(episodes):
            acted = bool(episode.decisions) if agent.name == "planner" else episode.sampled_tokens > 0
            masked = self.config.objective.mask_truncated and episode.truncated
            if informative[i] and acted and not masked:
                kept.append(i)
        return kept

    def _optimise(self, lesson: Lesson) -> dict[str, float]:
        """All iterations over all minibatches, an optimiser step each; returns the metrics."""
        train, agent, batch = self.config.train, lesson.agent, lesson.batch
        # With a single step the old policy is the current one: its log-probs come with the gradient.
        count = min(train.minibatches, len(set(lesson.groups)))
        once = train.num_iterations * count == 1 and self.config.objective.loss != "ppo"
        if not once:
            self._before(lesson)
        sums: dict[str, float] = defaultdict(float)
        norms = []
        for iteration in range(train.num_iterations):
            for rows in self._minibatches(lesson.groups, iteration):
                part = batch.rows(rows)
                self._weigh(agent, part, lesson.played / count)
                for name, value in self._gradient(lesson, part, once=once).items():
                    sums[name] += value
                if once:
                    batch.old_logprobs = part.old_logprobs
                norms.append(agent.step(self._learning_rate(agent), train.grad_clip))
        return self._metrics(lesson, sums, norms)

    def _metrics(self, lesson: Lesson, sums: dict[str, float], norms: list[float]) -> dict[str, float]:
        agent, batch = lesson.agent, lesson.batch
        difference = (batch.old_logprobs - batch.sampler_logprobs) * batch.mask
        actions, seen = float(batch.mask.sum()), max(sums.pop("actions"), 1.0)
        metrics = {
            "ratio": float((difference.exp() * batch.mask).sum()) / actions,
            "sampler_kl": float((difference.exp() - 1 - difference).sum()) / actions,
            "clip_fraction": sums.pop("clipped") / seen,
            "entropy": sums.pop("entropy") / seen,
            "kl": sums.pop("kl", 0.0) / seen,
            "loss": sums.pop("loss") / len(norms),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": self._learning_rate(agent),
        }
        return {f"{agent.name}/{name}": value for name, value in (metrics | sums).items()}

    def _before(self, lesson: Lesson) -> None:
        """Fills in the log-probs under the trainer's numerics before the first step and, for PPO, the
        advantages and the targets of the value head."""
        objective, agent, batch = self.config.objective, lesson.agent, lesson.batch
        values, trainer = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
        with torch.no_grad():
            for rows, counts in agent.turns(batch, self.config.train.micro_tokens):
                now = agent.evaluate(batch.rows(rows))
                if counts:
                    wide = now.logprobs.shape[1]
                    trainer[rows, :wide] = now.logprobs
                    if now.values is not None:
                        values[rows, :wide] = now.values
        agent.world.all_reduce([trainer, values])
        batch.old_logprobs = trainer
        if objective.loss == "ppo":
            batch.advantages = gae(lesson.returns, values, batch.mask, objective.gae_lambda)
            batch.value_targets = batch.advantages + values

    def _weigh(self, agent: Agent, batch: ActionBatch, played: float) -> None:
        objective, rules = self.config.objective, self.config.rollout
        preset = PRESET_NORMALISER[objective.loss]
        batch.weights = action_weights(
            preset if objective.normaliser == "preset" else objective.normaliser,
            batch.mask,
            actions=int(batch.mask.sum()),
            episodes=len(batch),
            constant=played * (rules.max_steps if agent.name == "planner" else rules.max_tokens),
            joint_lengths=batch.joint_lengths,
        )

    def _gradient(self, lesson: Lesson, batch: ActionBatch, *, once: bool) -> dict[str, float]:
        """Accumulates one minibatch's gradient over its micro-batches; ``once``: fills in its old
        log-probs."""
        agent, objective = lesson.agent, self.config.objective
        bonus, beta = (objective.planner_entropy, 0.0) if agent.name == "planner" else (0.0, objective.beta)
        factor, _ = lambda_factors(agent.name, self.stage.lambda_, objective.lambda_mode, alone=self.alone)
        sums: dict[str, float] = defaultdict(float)
        if once:
            batch.old_logprobs = torch.zeros_like(batch.old_logprobs)
        for index, counts in agent.turns(batch, self.config.train.micro_tokens):
            micro = batch.rows(index)
            now = agent.evaluate(micro, with_reference=beta > 0)
            if once:
                micro.old_logprobs = now.logprobs.detach()
            value, parts = agent_objective(
                now,
                micro.old_logprobs,
                micro.advantages,
                micro.mask,
                micro.weights,
                objective,
                entropy_bonus=bonus,
                beta=beta,
                value_targets=micro.value_targets,
                sampler_logprobs=micro.sampler_logprobs,
            )
            loss = -factor * value if counts else 0.0 * value
            agent.backward(loss)
            if not counts:
                continue
            if once:
                batch.old_logprobs[index, : micro.mask.shape[1]] = micro.old_logprobs
            sums["loss"] += float(loss.detach())
            for name, part in parts.items():
                sums[name] += float(part)
        if once:
            agent.world.all_reduce([batch.old_logprobs])
        return agent.world.all_reduce_numbers(sums)

    def _learning_rate(self, agent: Agent) -> float:
        mode = self.config.objective.lambda_mode
        _, factor = lambda_factors(agent.name, self.stage.lambda_, mode, alone=self.alone)
        return agent.learning_rate * rate_factor(self.config, self.step) * factor

    def _minibatches(self, groups: list[int], iteration: int) -> list[torch.Tensor]:
        """Row numbers split by group, reshuffled at every iteration by the run's seed and step."""
        count = min(self.config.train.minibatches, len(set(groups)))
        if count == 1:
            return [torch.arange(len(groups))]
        names = sorted(set(groups))
        random.Random(f"{self.config.seed}:{self.step}:{iteration}").shuffle(names)
        parts = [set(names[i::count]) for i in range(count)]
        return [torch.tensor([row for row, group in enumerate(groups) if group in part]) for part in parts]
