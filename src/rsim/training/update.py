"""From scored episodes to one step of each policy: advantages, weights, loss, gradient, optimiser."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from rsim.config import Config, StageConfig
from rsim.game.episode import Episode
from rsim.objective.advantages import gae, group_advantages
from rsim.objective.joint import agent_objective, learning_rate_factor, objective_factor
from rsim.objective.losses import PRESET_NORMALISER, action_weights
from rsim.rewards.rewards import Score
from rsim.training.agent import Agent
from rsim.training.batch import ActionBatch, planner_batch, reasoner_batch


@dataclass
class Update:
    """Updates one agent from a batch of episodes; everything that an update depends on is an argument."""

    config: Config
    stage: StageConfig
    step: int
    alone: bool  # no planner: lambda plays no part

    def agent(self, agent: Agent, episodes: list[Episode], scores: list[Score]) -> dict[str, float]:
        """Trains ``agent`` on ``episodes`` and returns its metrics, keys prefixed with its name.

        Episodes of groups in which this agent's returns are all alike are skipped before any forward pass, unless the planner's
        use of the strategies is to be evened out, which they bear on as well.
        """
        planner, objective = agent.name == "planner", self.config.objective
        device = agent.model.device
        returns = torch.tensor([s.planner if planner else s.reasoner for s in scores])
        groups = torch.tensor([e.group for e in episodes])
        metrics = {f"{agent.name}/return": float(returns.mean())}
        advantages, informative = group_advantages(returns, groups, scale_by_std=objective.scale_by_std)
        evens = planner and objective.usage_weight > 0
        used = torch.ones_like(informative) if evens else informative.clone()
        for i, episode in enumerate(episodes):
            acted = bool(episode.decisions) if planner else episode.sampled_tokens > 0
            used[i] &= acted and not (objective.mask_truncated and episode.truncated)
        kept = used.nonzero()[:, 0].tolist()
        metrics[f"{agent.name}/skipped_groups"] = float(len(set(groups[~informative].tolist())))
        if not kept:
            return metrics
        build = planner_batch if planner else reasoner_batch
        batch = build([episodes[i] for i in kept], device, torch.promote_types(agent.model.dtype, torch.float32))
        batch.advantages = advantages[kept].to(device, batch.mask.dtype)[:, None] * batch.mask
        bonus, usage = 0.0, None
        if planner:
            policies = torch.tensor(
                [d.probabilities for e in episodes for d in e.decisions], dtype=batch.mask.dtype, device=device
            )
            bonus = self._entropy_bonus(policies)
            usage = policies.mean(0) if evens else None
        return metrics | self._optimise(
            agent, batch, returns[kept].to(device, batch.mask.dtype), groups[kept].tolist(), bonus, usage
        )

    def _entropy_bonus(self, policies: torch.Tensor) -> float:
        """The coefficient of the planner's entropy: the config's, or the part of it by which ``policies [N, strategies]`` fall
        short of the target on average."""
        objective = self.config.objective
        if not objective.entropy_target:
            return objective.planner_entropy
        entropy = float(-(policies * policies.clamp(min=1e-8).log()).sum(-1).mean())
        return objective.planner_entropy * max(0.0, 1 - entropy / objective.entropy_target)

    def _optimise(
        self, agent: Agent, batch: ActionBatch, returns: torch.Tensor, groups: list[int], bonus: float,
        usage: torch.Tensor | None,
    ) -> dict[str, float]:  # fmt: skip
        train = self.config.train
        sampler = batch.old_logprobs.clone()
        minibatches = min(train.minibatches, len(set(groups)))
        # With a single step on the batch the old policy is the current one, and its log-probs come with the gradient.
        once = train.num_iterations * minibatches == 1 and self.config.objective.loss != "ppo"
        targets = None if once else self._before(agent, batch, returns)
        sums: dict[str, float] = defaultdict(float)
        actions = float(batch.mask.sum())
        norms = []
        for iteration in range(train.num_iterations):
            for rows in self._minibatches(groups, iteration):
                part = batch.rows(rows)
                self._weigh(agent, part)
                for name, value in self._gradient(agent, part, rows, sampler, targets, bonus, usage, once=once).items():
                    sums[name] += value
                if once:
                    batch.old_logprobs = part.old_logprobs
                norms.append(agent.step(self._learning_rate(agent), train.grad_clip))
        difference = (batch.old_logprobs - sampler) * batch.mask
        seen = max(sums.pop("actions"), 1.0)
        metrics = {
            "ratio": float((difference.exp() * batch.mask).sum()) / actions,
            "sampler_kl": float((difference.exp() - 1 - difference).sum()) / actions,
            "clip_fraction": sums.pop("clipped") / seen,
            "entropy": sums.pop("entropy") / seen,
            "kl": sums.pop("kl", 0.0) / seen,
            "loss": sums.pop("loss") / len(norms),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": self._learning_rate(agent),
        } | dict(sums)
        return {f"{agent.name}/{name}": value for name, value in metrics.items()}

    def _before(self, agent: Agent, batch: ActionBatch, returns: torch.Tensor) -> torch.Tensor | None:
        """Log-probs under the trainer's numerics before the first step and, for PPO, GAE advantages; value targets."""
        objective = self.config.objective
        values = torch.zeros_like(batch.mask)
        trainer = torch.zeros_like(batch.mask)
        with torch.no_grad():
            for rows, counts in agent.turns(batch.micro_rows(self.config.train.micro_tokens, agent.world.size)):
                now = agent.evaluate(batch.rows(rows))
                if not counts:
                    continue
                wide = now.logprobs.shape[1]
                trainer[rows, :wide] = now.logprobs
                if now.values is not None:
                    values[rows, :wide] = now.values
        agent.world.all_reduce([trainer, values])
        batch.old_logprobs = trainer
        if objective.loss != "ppo":
            return None
        batch.advantages = gae(returns, values, batch.mask, objective.gae_lambda)
        return batch.advantages + values

    def _weigh(self, agent: Agent, batch: ActionBatch) -> None:
        objective = self.config.objective
        rules = self.config.rollout
        normaliser = PRESET_NORMALISER[objective.loss] if objective.normaliser == "preset" else objective.normaliser
        batch.weights = action_weights(
            normaliser,
            batch.mask,
            actions=int(batch.mask.sum()),
            episodes=len(batch),
            constant=rules.max_steps if agent.name == "planner" else rules.max_tokens,
            joint_lengths=batch.joint_lengths,
        )

    def _gradient(
        self, agent: Agent, batch: ActionBatch, rows: torch.Tensor, sampler: torch.Tensor, targets: torch.Tensor | None,
        bonus: float, usage: torch.Tensor | None, *, once: bool,
    ) -> dict[str, float]:  # fmt: skip
        """Accumulates the gradient of one minibatch over its micro-batches; ``once``: fills in its old log-probs."""
        objective = self.config.objective
        beta = objective.beta if agent.name == "reasoner" else 0.0
        factor = objective_factor(agent.name, self.stage.lambda_, objective.lambda_mode, alone=self.alone)
        sums: dict[str, float] = defaultdict(float)
        if once:
            batch.old_logprobs = torch.zeros_like(batch.old_logprobs)
        for index, counts in agent.turns(batch.micro_rows(self.config.train.micro_tokens, agent.world.size)):
            micro = batch.rows(index)
            wide = micro.mask.shape[1]
            origin = rows[index]
            now = agent.evaluate(micro, with_reference=beta > 0, usage=usage, usage_weight=objective.usage_weight)
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
                value_targets=targets[origin][:, :wide] if targets is not None else None,
                sampler_logprobs=sampler[origin][:, :wide],
            )
            loss = -factor * value if counts else 0.0 * value
            agent.backward(loss)
            if not counts:
                continue
            if once:
                batch.old_logprobs[index, :wide] = micro.old_logprobs
            sums["loss"] += float(loss.detach())
            for name, part in parts.items():
                sums[name] += float(part)
        if once:
            agent.world.all_reduce([batch.old_logprobs])
        return agent.world.all_reduce_numbers(sums)

    def _learning_rate(self, agent: Agent) -> float:
        warmup = self.config.train.warmup
        ramp = min(1.0, (self.step + 1) / warmup) if warmup else 1.0
        mode = self.config.objective.lambda_mode
        return agent.learning_rate * ramp * learning_rate_factor(agent.name, self.stage.lambda_, mode, alone=self.alone)

    def _minibatches(self, groups: list[int], iteration: int) -> list[torch.Tensor]:
        """Row numbers split by group, reshuffled at every iteration by the run's seed and step."""
        count = min(self.config.train.minibatches, len(set(groups)))
        if count == 1:
            return [torch.arange(len(groups))]
        names = sorted(set(groups))
        random.Random(f"{self.config.seed}:{self.step}:{iteration}").shuffle(names)
        part_of = {name: i % count for i, name in enumerate(names)}
        parts: list[list[int]] = [[] for _ in range(count)]
        for row, group in enumerate(groups):
            parts[part_of[group]].append(row)
        return [torch.tensor(part) for part in parts]
