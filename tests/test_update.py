"""The joint update on real episodes: against a float64 reference, and what it must not depend on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from rsim.config import Config, ObjectiveConfig, StageConfig, TrainConfig
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.objective.advantages import group_advantages
from rsim.policies.reasoner import Reasoner
from rsim.rewards.rewards import Score
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import planner_batch, reasoner_batch
from rsim.training.update import Update
from tiny import RULES, tiny_model

PROBLEMS = [Problem(q, "1") for q in ("4*17+38=?", "7=?", "x-38=4*17, x=?")]
RATE = 0.5  # of the plain gradient step between the two iterations: large, so that clipping acts


_PLAYED: list[
    list[Episode]
] = []  # by the fixtures' agents, which are the same in each test: played once, it takes a third of a second


@pytest.fixture
def played(reasoner, planner):
    if not _PLAYED:
        game = Game(reasoner, planner, replace(RULES, temperature=0.9, planner_temperature=1.2))
        _PLAYED.append(game.play(PROBLEMS, seed=0, group_size=4))
    episodes = copy.deepcopy(_PLAYED[0])
    returns = [math.sin(7.0 * i) for i in range(len(episodes))]
    returns[4:8] = [0.5] * 4  # one group without variance
    scores = [Score(None, False, planner=r, reasoner=r if i < 8 else -2 * r, parts={}) for i, r in enumerate(returns)]
    return episodes, scores


def agents_of(reasoner, planner, loss: str) -> dict[str, Agent]:
    common = {"learning_rate": 1e-3, "with_values": loss == "ppo"}
    return {
        "planner": Agent("planner", planner.model, planner.logits, AgentSettings(temperature=1.2, **common)),
        "reasoner": Agent("reasoner", reasoner.model, reasoner.logits, AgentSettings(temperature=0.9, **common)),
    }


def config_of(loss: str = "grpo", normaliser: str = "preset", iterations: int = 1, **train) -> Config:
    objective = ObjectiveConfig(loss=loss, normaliser=normaliser, lambda_mode="loss", planner_entropy=0.01)
    return Config(rollout=RULES, objective=objective, train=TrainConfig(num_iterations=iterations, **train))


def capture(agent: Agent) -> list[dict[str, torch.Tensor]]:
    """Replaces the optimiser step by a plain gradient step and keeps the gradients."""
    kept: list[dict[str, torch.Tensor]] = []

    def step(learning_rate: float, grad_clip: float) -> float:
        named = dict(agent.model.named_parameters())
        kept.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()})
        with torch.no_grad():
            for p in named.values():
                if p.grad is not None:
                    p -= RATE * p.grad
                    p.grad = None
        return 0.0

    agent.step = step  # type: ignore[method-assign]
    return kept


def action_logprobs(model, name, episode, temperature):
    """``(log-probs, entropies)`` of an episode's actions, from one plain forward pass of ``model``."""
    if name == "reasoner":
        at = [(t - 1, episode.token_ids[t]) for t, m in enumerate(episode.reasoner_mask) if m]
        logits = model(torch.tensor([episode.token_ids])).logits[0]
    else:
        at = [(d.position, d.action) for d in episode.decisions]
        logits = model.score(model.base_model(torch.tensor([episode.planner_ids])).last_hidden_state)[0]
    table = torch.log_softmax(logits / temperature, -1)
    return [table[p, a] for p, a in at], [-(table[p].exp() * table[p]).sum() for p, _ in at]


def reference_loss(model, old_model, name, episodes, scores, config, lam):
    """The agent's share of -J in float64, written from the definition with loops over single actions."""
    temperature = 1.2 if name == "planner" else 0.9
    returns = [getattr(s, name) for s in scores]
    parts, total_actions, used = [], 0, 0
    for first in range(0, len(episodes), 4):
        group = range(first, first + 4)
        mean = sum(returns[i] for i in group) / 4
        if max(abs(returns[i] - mean) for i in group) < 1e-6 and name == "reasoner":
            continue  # the planner has an entropy bonus, which such a group moves as well
        for i in group:
            now, entropy = action_logprobs(model, name, episodes[i], temperature)
            with torch.no_grad():
                old, _ = action_logprobs(old_model, name, episodes[i], temperature)
            if now:
                parts.append((i, returns[i] - mean, now, old, entropy))
                total_actions, used = total_actions + len(now), used + 1
    loss_name, normaliser = config.objective.loss, config.objective.normaliser
    if normaliser == "preset":
        normaliser = {"dr_grpo": "constant", "gspo": "sequence"}.get(loss_name, "token")
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(loss_name, (0.2, 0.2))
    j = torch.zeros((), dtype=torch.float64)
    for i, advantage, now, old, entropy in parts:
        e = episodes[i]
        joint = len(e.decisions) + e.sampled_tokens
        constant = config.rollout.max_steps if name == "planner" else config.rollout.max_tokens
        weight = {"token": 1 / total_actions, "sequence": 1 / len(now) / used, "constant": 1 / constant / len(episodes),
                  "paper": 1 / joint / used}[normaliser]  # fmt: skip
        sequence_ratio = torch.exp(sum(n - o for n, o in zip(now, old, strict=True)) / len(now))
        for n, o, h in zip(now, old, entropy, strict=True):
            ratio = sequence_ratio if loss_name == "gspo" else torch.exp(n - o)
            if loss_name == "cispo":
                gain = torch.clamp(ratio, max=1 + high).detach() * advantage * n
            else:
                gain = torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
            if name == "planner":
                gain = gain + 0.01 * h
            j = j + weight * gain
    return -(lam if name == "planner" else 1 - lam) * j


@pytest.mark.parametrize("normaliser", ["preset", "paper"])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_joint_loss_and_gradient_equal_a_float64_reference(reasoner, planner, played, loss, normaliser):
    episodes, scores = played
    config = config_of(loss, normaliser, iterations=2)
    stage = StageConfig("stage", 1, 0.7)
    for name, agent in agents_of(reasoner, planner, loss).items():
        start = copy.deepcopy(agent.model).double()
        gradients = capture(agent)
        metrics = Update(config, stage, 0, alone=False).agent(agent, episodes, scores)
        model, losses = copy.deepcopy(start), []
        for taken in gradients:
            model.zero_grad()
            value = reference_loss(model, start, name, episodes, scores, config, 0.7)
            value.backward()
            losses.append(value.item())
            for parameter_name, p in model.named_parameters():
                expected = torch.zeros_like(p) if p.grad is None else p.grad
                assert torch.allclose(taken[parameter_name].double(), expected, atol=2e-6, rtol=1e-4), (name, parameter_name)
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= RATE * p.grad
        assert metrics[f"{name}/loss"] == pytest.approx(sum(losses) / 2, abs=1e-6)
        assert losses[0] != pytest.approx(losses[1], abs=1e-6), "the second iteration must differ from the first"
        if (loss, normaliser) == ("grpo", "preset"):
            assert 0 < metrics[f"{name}/clip_fraction"] <= 1, "clipping must act in this test"


@pytest.mark.parametrize("gae_lambda", [0.95, 0.4])
def test_ppo_advantages_come_from_the_value_head(reasoner, planner, played, gae_lambda):
    episodes, scores = played
    config = config_of("ppo")
    config = replace(config, objective=replace(config.objective, gae_lambda=gae_lambda))
    agent = agents_of(reasoner, planner, "ppo")["reasoner"]
    torch.nn.init.normal_(agent.value_head.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    before = agent.value_head.weight.clone()
    gradients = capture(agent)
    metrics = Update(config, StageConfig("stage", 1, 0.7), 0, alone=False).agent(agent, episodes, scores)
    kept = range(12)  # a critic learns from groups of like returns too, and so does the policy by it
    model, total, expected, value_error = agent.model, 0, 0.0, 0.0
    with torch.no_grad():  # undo the plain step, so that the model is the one the update started from
        for name, p in model.named_parameters():
            p += RATE * gradients[0][name]
        for i in kept:
            e = episodes[i]
            hidden = model.base_model(torch.tensor([e.token_ids])).last_hidden_state[0]
            at = [t - 1 for t, m in enumerate(e.reasoner_mask) if m]
            values = [float(hidden[t] @ before[0]) for t in at]
            advantage, following = 0.0, 0.0
            for k in reversed(range(len(at))):
                reward = scores[i].reasoner if k == len(at) - 1 else 0.0
                advantage = reward + following - values[k] + gae_lambda * advantage
                following = values[k]
                expected += advantage  # ratio 1: the surrogate is the advantage
                value_error += advantage**2  # target minus value
            total += len(at)
    assert metrics["reasoner/loss"] == pytest.approx(-0.3 * (expected - 0.5 * value_error) / total, rel=1e-4)


def test_injected_tokens_have_exactly_zero_gradient(reasoner, planner, played):
    """The gradient with respect to the logits of a whole sequence is non-zero on the rows that predict sampled tokens only."""
    episodes, _ = played
    batch = reasoner_batch(episodes, torch.device("cpu"))
    hidden = reasoner.model.base_model(input_ids=batch.ids).last_hidden_state
    logits = reasoner.logits(hidden)
    logits.retain_grad()
    agent = agents_of(reasoner, planner, "grpo")["reasoner"]
    rows = torch.arange(len(batch))[:, None]
    chosen = batch.mask.bool()
    logprobs, _ = agent._score(lambda part: part, logits[rows, batch.positions][chosen], batch.actions[chosen])
    (logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum().backward()
    for row, e in enumerate(episodes):
        predicts_sampled = {t - 1 for t, m in enumerate(e.reasoner_mask) if m}
        for t in range(batch.ids.shape[1]):
            moved = bool((logits.grad[row, t] != 0).any())
            assert moved == (t in predicts_sampled)


def test_injected_tokens_are_in_no_denominator(reasoner, planner, played):
    episodes, _ = played
    batch = reasoner_batch(episodes, torch.device("cpu"))
    assert int(batch.mask.sum()) == sum(e.sampled_tokens for e in episodes)
    assert batch.joint_lengths.tolist() == [len(e.decisions) + e.sampled_tokens for e in episodes]
    assert any(e.injected_tokens for e in episodes)
    decisions = planner_batch(episodes, torch.device("cpu"))
    assert int(decisions.mask.sum()) == sum(len(e.decisions) for e in episodes)


def test_an_episode_without_sampled_tokens_moves_nothing(reasoner, planner, played):
    """Injected tokens alone: masks emptied, so the reasoner has no action and no gradient at all."""
    episodes, scores = played
    silent = [replace(e, reasoner_mask=[0] * len(e.token_ids)) for e in episodes]
    agent = agents_of(reasoner, planner, "grpo")["reasoner"]
    gradients = capture(agent)
    metrics = Update(config_of(), StageConfig("stage", 1, 0.7), 0, alone=False).agent(agent, silent, scores)
    assert gradients == []
    assert "reasoner/loss" not in metrics


def test_ranks_have_about_as_many_tokens_each():
    """One group or many: what is left over is never a rank's whole share."""
    for groups, size in ((2, 8), (1, 9), (7, 3)):
        episodes = [
            Episode(Problem("", ""), group, [1] * length, 10, [0] * 10 + [1] * (length - 10), [0.0] * length)
            for group in range(groups) for length in range(20, 20 + size)
        ]  # fmt: skip
        batch = reasoner_batch(episodes, torch.device("cpu"))
        assert len(batch.micro_rows(100_000)) == 1
        for ranks in (2, 3):
            parts = batch.micro_rows(100_000, ranks)
            assert sorted(torch.cat(parts).tolist()) == list(range(len(episodes)))
            shares = [sum(int(batch.mask[rows].sum()) for rows in parts[rank::ranks]) for rank in range(ranks)]
            assert max(shares) <= batch.mask.sum() / ranks + 2 * 30
        assert len(batch.micro_rows(1, 2)) == len(episodes)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo"])
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_padding(reasoner, planner, played, loss):
    episodes, scores = played
    results = []
    for micro_tokens, padding in ((100_000, 0), (60, 0), (1, 0), (100_000, 17)):
        model, head = copy.deepcopy(reasoner.model), None
        copied = Reasoner(model, reasoner.tokenizer)
        settings = AgentSettings(temperature=0.9, learning_rate=1e-3)
        agent = Agent("reasoner", model, copied.logits if head is None else head, settings)
        gradients = capture(agent)
        longer = [replace(e, token_ids=e.token_ids + [5] * padding, reasoner_mask=e.reasoner_mask + [0] * padding,
                          logprobs=e.logprobs + [0.0] * padding) for e in episodes]  # fmt: skip
        metrics = Update(config_of(loss, micro_tokens=micro_tokens), StageConfig("stage", 1, 0.7), 0, alone=False).agent(
            agent, longer, scores
        )
        results.append((metrics["reasoner/loss"], gradients[0]))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], abs=1e-6)
        for name, expected in results[0][1].items():
            assert torch.allclose(gradient[name], expected, atol=2e-6), name


@pytest.mark.parametrize(
    ("mode", "expected"), [("lr", {"planner": 1.4, "reasoner": 0.6}), ("loss", {"planner": 1.0, "reasoner": 1.0})]
)
def test_lambda_moves_parameters_as_stated(reasoner, planner, played, mode, expected):
    """Under Adam the first step of a parameter has the size of its learning rate, whatever a constant factor on the loss."""
    episodes, scores = played
    objective = ObjectiveConfig(lambda_mode=mode)
    config = Config(rollout=RULES, objective=objective, train=TrainConfig(grad_clip=1e9))
    for name, agent in agents_of(reasoner, planner, "grpo").items():
        before = [p.detach().clone() for p in agent.parameters]
        Update(config, StageConfig("stage", 1, 0.7), 0, alone=False).agent(agent, episodes, scores)
        moved = max(float((p - b).abs().max()) for p, b in zip(agent.parameters, before, strict=True))
        assert moved == pytest.approx(1e-3 * expected[name], rel=0.01)


def test_loss_mode_scales_the_gradient_by_lambda(reasoner, planner, played):
    episodes, scores = played
    norms = {}
    for lam in (0.7, 0.35):
        settings = AgentSettings(temperature=1.2, learning_rate=0.0)
        agent = Agent("planner", copy.deepcopy(planner.model), planner.logits, settings)
        agent.head = agent.model.score
        gradients = capture(agent)
        Update(config_of(), StageConfig("stage", 1, lam), 0, alone=False).agent(agent, episodes, scores)
        norms[lam] = float(sum((g**2).sum() for g in gradients[0].values()).sqrt())
    assert norms[0.7] == pytest.approx(2 * norms[0.35], rel=1e-4)


def test_sampler_and_trainer_agree_on_the_sampled_batch(reasoner, planner, played):
    episodes, scores = played
    for name, agent in agents_of(reasoner, planner, "grpo").items():
        metrics = Update(config_of(), StageConfig("stage", 1, 0.5), 0, alone=False).agent(agent, episodes, scores)
        assert metrics[f"{name}/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert abs(metrics[f"{name}/sampler_kl"]) < 1e-5
        assert metrics[f"{name}/alike_groups"] == 1
        assert metrics[f"{name}/skipped_groups"] == (name == "reasoner")


def test_what_sampler_and_trainer_differ_by_is_told(reasoner, planner, played):
    """Every token's log-prob was 0.3 lower when it was sampled: mean ratio e^0.3, and the k3 estimate of the KL."""
    episodes, scores = played
    for e in episodes:
        e.logprobs = [value - 0.3 * sampled for value, sampled in zip(e.logprobs, e.reasoner_mask, strict=True)]
    agent = agents_of(reasoner, planner, "grpo")["reasoner"]
    metrics = Update(config_of(), StageConfig("stage", 1, 0.5), 0, alone=False).agent(agent, episodes, scores)
    assert metrics["reasoner/ratio"] == pytest.approx(math.exp(0.3), abs=1e-4)
    assert metrics["reasoner/sampler_kl"] == pytest.approx(math.exp(0.3) - 1.3, abs=1e-4)


def test_minibatches_keep_groups_together_and_cover_everything():
    update = Update(config_of(minibatches=2), StageConfig("stage", 1, 0.5), 3, alone=False)
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    parts = update._minibatches(groups, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert len(parts) == 2
    seen = [{groups[i] for i in part.tolist()} for part in parts]
    assert not seen[0] & seen[1]


def test_mask_truncated_drops_episodes_but_not_from_the_baseline(reasoner, planner, played):
    episodes, scores = played
    for e in episodes:
        e.truncated = False
    episodes[0].truncated = True
    config = replace(config_of(), objective=ObjectiveConfig(mask_truncated=True))
    agent = agents_of(reasoner, planner, "grpo")["reasoner"]
    seen: list[torch.Tensor] = []
    original = agent.evaluate

    def evaluate(batch, **kwargs):
        seen.append(batch.advantages.clone())
        return original(batch, **kwargs)

    agent.evaluate = evaluate
    capture(agent)
    Update(config, StageConfig("stage", 1, 0.5), 0, alone=False).agent(agent, episodes, scores)
    returns = torch.tensor([s.reasoner for s in scores])
    whole, _ = group_advantages(returns, torch.tensor([e.group for e in episodes]))
    trained = sorted({round(float(v), 5) for part in seen for v in part[:, 0]})
    assert round(float(whole[0]), 5) not in trained
    assert trained == sorted({round(float(whole[i]), 5) for i in (1, 2, 3, 8, 9, 10, 11)})


def tiny_update(objective: ObjectiveConfig, **train) -> Update:
    return Update(Config(rollout=RULES, objective=objective, train=TrainConfig(**train)), StageConfig(), 0, alone=False)


def moved_by(agent: Agent, update: Update, episodes, scores) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics and the (first) gradient of an update; the weights stay as they were."""
    before = copy.deepcopy(agent.model.state_dict())
    gradients = capture(agent)
    metrics = update.agent(agent, episodes, scores)
    agent.model.load_state_dict(before)
    return metrics, gradients[0] if gradients else {}


ALIKE = {
    "planner": [ObjectiveConfig(planner_entropy=0.1), ObjectiveConfig(loss="ppo")],
    "reasoner": [ObjectiveConfig(beta=0.1), ObjectiveConfig(loss="ppo")],
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_policy_that_has_collapsed_is_still_held_by_kl_entropy_and_critic(reasoner, planner, played, name):
    """All returns of every group alike: the surrogate has nothing to say, and these terms must not fall silent with it."""
    episodes, _ = played
    scores = [Score(None, False, planner=1.0, reasoner=1.0, parts={}) for _ in episodes]
    for objective in ALIKE[name]:
        agent = agents_of(reasoner, planner, objective.loss)[name]
        agent.set_reference(Reasoner(tiny_model("qwen2", seed=1), reasoner.tokenizer))
        update = tiny_update(objective)
        steps = []
        if objective.loss == "ppo":
            agent.step = lambda *_, agent=agent, steps=steps: steps.append(agent.value_head.weight.grad.abs().max()) or 0.0
            metrics = update.agent(agent, episodes, scores)
            assert float(steps[0]) > 0
        else:
            metrics, gradient = moved_by(agent, update, episodes, scores)
            assert any(float(g.abs().max()) > 1e-6 for g in gradient.values()), objective
        assert (metrics[f"{name}/alike_groups"], metrics[f"{name}/skipped_groups"]) == (3, 0)
    agent = agents_of(reasoner, planner, "grpo")[name]
    metrics, gradient = moved_by(agent, tiny_update(ObjectiveConfig()), episodes, scores)
    assert not gradient, "no such term is on: not even a forward pass"
    assert (metrics[f"{name}/alike_groups"], metrics[f"{name}/skipped_groups"]) == (3, 3)


def weights_of(agent: Agent) -> list[torch.Tensor]:
    """Grows by the weights of the actions of each micro-batch that the agent is asked about."""
    seen: list[torch.Tensor] = []
    original = agent.evaluate

    def evaluate(batch, **how):
        seen.append(batch.weights[batch.mask.bool()])
        return original(batch, **how)

    agent.evaluate = evaluate
    return seen


@pytest.mark.parametrize("normaliser", ["token", "sequence"])
def test_each_minibatch_is_a_mean_of_its_own(reasoner, planner, played, normaliser):
    """Its weights add up to one over all its micro-batches, as if it were the whole batch."""
    episodes, scores = played
    agent = agents_of(reasoner, planner, "grpo")["reasoner"]
    counts: list[int] = []
    seen, original = weights_of(agent), agent.turns

    def turns(batch, max_tokens):
        rows = original(batch, max_tokens)
        counts.append(len(rows))
        return rows

    agent.turns = turns
    capture(agent)
    tiny_update(ObjectiveConfig(normaliser=normaliser), minibatches=2, micro_tokens=60).agent(agent, episodes, scores)
    before, first, second = counts  # one pass for the old log-probs, then one for each of the two minibatches
    assert min(first, second) > 1
    assert float(torch.cat(seen[before : before + first]).sum()) == pytest.approx(1)
    assert float(torch.cat(seen[before + first :]).sum()) == pytest.approx(1)


@pytest.mark.parametrize("masked", [False, True])
def test_dr_grpo_divides_by_all_episodes_played(reasoner, planner, played, masked):
    """Those of skipped groups and those that are masked as well (arXiv 2503.20783: a constant, whatever was sampled)."""
    episodes, scores = played
    for e in episodes:
        e.truncated = False
    episodes[0].truncated = True
    update = tiny_update(ObjectiveConfig(loss="dr_grpo", mask_truncated=masked), minibatches=2)
    agent = agents_of(reasoner, planner, "dr_grpo")["reasoner"]
    seen = weights_of(agent)
    capture(agent)
    update.agent(agent, episodes, scores)
    weights = torch.cat(seen[-2:])  # of the two minibatches, half of the episodes each
    assert torch.allclose(weights, torch.full_like(weights, 1 / (RULES.max_tokens * 6)))


def test_the_kl_term_is_that_to_the_reference_with_its_final_softcap(reasoner, planner, played):
    """Against plain forward passes of both models: another model than the policy, its logits capped as the policy's are."""
    episodes, scores = played
    policy, frozen = (Reasoner(tiny_model("gemma3", seed=seed), reasoner.tokenizer) for seed in (0, 1))
    for each in (policy, frozen):
        each.model.config.final_logit_softcapping = 1.5
    agent = agents_of(policy, planner, "grpo")["reasoner"]
    agent.set_reference(frozen)
    metrics, _ = moved_by(agent, tiny_update(ObjectiveConfig(beta=0.1, kl="k2")), episodes, scores)
    policy = Reasoner(tiny_model("gemma3", seed=0), reasoner.tokenizer)  # as it was
    policy.model.config.final_logit_softcapping = 1.5
    total, actions = 0.0, 0
    with torch.no_grad():
        for e in episodes:
            at = [t for t, m in enumerate(e.reasoner_mask) if m]
            rows = []
            for model in (policy.model, frozen.model):
                logits = model(torch.tensor([e.token_ids])).logits[0] / 0.9
                assert logits.abs().max() <= 1.5 / 0.9, "it caps them by itself"
                rows.append(torch.log_softmax(logits, -1)[[t - 1 for t in at], [e.token_ids[t] for t in at]])
            total += float(0.5 * ((rows[0] - rows[1]) ** 2).sum())
            actions += len(at)
    assert metrics["reasoner/kl"] == pytest.approx(total / actions, rel=1e-4)
    assert total / actions > 0.01


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
])  # fmt: skip
def test_learning_rates_rise_and_fall_as_scheduled(reasoner, planner, schedule, expected):
    agent = agents_of(reasoner, planner, "grpo")["planner"]
    stages = (StageConfig("a", 4, 0.5), StageConfig("b", 2, 0.5))
    config = Config(stages=stages, train=TrainConfig(warmup=2, schedule=schedule))
    rates = [Update(config, config.stage_at(step), step, alone=False)._learning_rate(agent) for step in range(6)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


def test_a_value_head_has_a_rate_of_its_own(reasoner, planner, played):
    """Under Adam the first step has the size of the rate: the policy's for the trunk, the head's for the head."""
    episodes, scores = played
    rates = {"learning_rate": 1e-3, "value_learning_rate": 1e-2, "with_values": True}
    for value_rate, head_moves in ((0.0, 1e-3), (1e-2, 1e-2)):
        settings = AgentSettings(temperature=0.9, **rates | {"value_learning_rate": value_rate})
        agent = Agent("reasoner", copy.deepcopy(reasoner.model), reasoner.logits, settings)
        agent.head = agent.model.lm_head
        before = [p.detach().clone() for p in agent.parameters]
        Update(config_of("ppo", grad_clip=1e9), StageConfig(), 0, alone=True).agent(agent, episodes, scores)
        moved = max(float((p - b).abs().max()) for p, b in zip(agent.parameters, before, strict=True))
        assert moved == pytest.approx(1e-3, rel=0.01)
        assert float(agent.value_head.weight.abs().max()) == pytest.approx(head_moves, rel=0.01)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_importance_correction_is_each_episodes_own(reasoner, planner, played, level):
    """A sampler that reported other log-probs: the factors are those of the rows, in whatever micro-batch they come."""
    episodes, scores = played
    odd = [
        replace(e, logprobs=[p + 0.4 * math.sin(i + 3 * t) for t, p in enumerate(e.logprobs)]) for i, e in enumerate(episodes)
    ]
    update = {tokens: tiny_update(ObjectiveConfig(importance_cap=1.3, importance_level=level), micro_tokens=tokens)
              for tokens in (100_000, 60, 1)}  # fmt: skip
    agent = agents_of(reasoner, planner, "grpo")["reasoner"]
    total, actions = 0.0, 0
    for i, (e, plain) in enumerate(zip(odd, episodes, strict=True)):
        if 4 <= i < 8:
            continue  # alike
        group = [s.reasoner for s in scores[i - i % 4 : i - i % 4 + 4]]
        differences = [p - q for p, q, m in zip(plain.logprobs, e.logprobs, e.reasoner_mask, strict=True) if m]
        if level == "sequence":
            differences = [sum(differences)] * len(differences)
        total += (scores[i].reasoner - sum(group) / 4) * sum(min(math.exp(d), 1.3) for d in differences)
        actions += len(differences)
    found = [moved_by(agent, each, odd, scores) for each in update.values()]
    for metrics, gradient in found:
        assert metrics["reasoner/loss"] == pytest.approx(-total / actions, abs=1e-4)
        for name, expected in found[0][1].items():
            assert torch.allclose(gradient[name], expected, atol=2e-6), name


def test_a_value_head_does_not_move_the_trunk(reasoner, planner, played):
    """However wrong it is: a critic's error would drown the policy's own gradient."""
    episodes, scores = played
    gradients = []
    for coefficient in (0.0, 100.0):
        agent = agents_of(reasoner, planner, "ppo")["reasoner"]
        torch.nn.init.constant_(agent.value_head.weight, 0.1)
        update = tiny_update(ObjectiveConfig(loss="ppo", value_coefficient=coefficient))
        gradients.append(moved_by(agent, update, episodes, scores)[1])
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
