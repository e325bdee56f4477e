"""The packed stream with shared beginnings, and log-probs without logits: equal to plain forward passes, value and gradient."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.objective.logprobs import token_logprobs
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import reasoner_batch
from rsim.training.packing import pack
from tiny import RULES, tiny_model

PROBLEMS = [Problem(q, "1") for q in ("4*17+38=?", "7=?", "x-38=4*17, x=?")]


@pytest.fixture
def episodes(reasoner, lab_strategies) -> list[Episode]:
    return Game(reasoner, random_planner(lab_strategies), RULES).play(PROBLEMS, seed=0, group_size=4)


@pytest.mark.parametrize("head_weight", [False, True])
def test_packed_stream_has_zero_gradient_where_no_sampled_token_is_predicted(reasoner, episodes, head_weight):
    """In the packed stream the final hidden states that get a gradient are those before a sampled token, no others; a group's
    first sampled tokens all hang on the one state of their shared prompt."""
    weight = reasoner.head_weight if head_weight else None
    settings = AgentSettings(temperature=0.9, learning_rate=1e-3)
    agent = Agent("reasoner", reasoner.model, reasoner.logits, settings, head_weight=weight)
    batch = reasoner_batch(episodes, torch.device("cpu"))
    stream = pack(batch)
    seen: list[torch.Tensor] = []

    def keep(module, arguments, output):
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    hook = reasoner.model.base_model.register_forward_hook(keep)
    logprobs = agent.evaluate(batch).logprobs
    hook.remove()
    (logprobs * torch.linspace(0.5, 1.5, logprobs.numel()).reshape(logprobs.shape)).sum().backward()
    moved = (seen[0].grad[0] != 0).any(-1)
    expected = torch.zeros_like(moved)
    expected[stream.index[batch.mask.bool()]] = True
    assert moved.tolist() == expected.tolist()
    assert len(moved) < batch.ids.numel(), "shared and packed: fewer tokens than the padded batch has"
    prompts = sum(episodes[i].prompt_length for i in range(0, len(episodes), 4))
    # The last token of an episode is read by nobody.
    assert len(moved) == prompts + sum(len(e.token_ids) - e.prompt_length - 1 for e in episodes)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_shared_forward_equals_plain_ones(architecture, checkpointing, lab_strategies):
    """Log-probs, entropies and gradients of the packed stream equal one plain forward per episode, ragged lengths, groups of
    one and of several, sliding windows."""
    reasoner = Reasoner(tiny_model(architecture, seed=3), build_tokenizer())
    episodes = Game(reasoner, random_planner(lab_strategies), replace(RULES, temperature=0.9)).play(
        PROBLEMS, seed=1, group_size=4
    )
    episodes = [episodes[i] for i in (0, 1, 2, 4, 8, 9, 11)]
    plain = copy.deepcopy(reasoner.model)
    settings = AgentSettings(temperature=0.9, learning_rate=1e-3, checkpointing=checkpointing)
    agent = Agent("reasoner", reasoner.model, reasoner.logits, settings, head_weight=reasoner.head_weight)
    batch = reasoner_batch(episodes, torch.device("cpu"))
    now = agent.evaluate(batch)
    (now.logprobs**2).sum().backward()
    total = 0.0
    for row, e in enumerate(episodes):
        table = torch.log_softmax(plain(torch.tensor([e.token_ids])).logits[0] / 0.9, -1)
        at = [t for t, m in enumerate(e.reasoner_mask) if m]
        before = [t - 1 for t in at]
        logprobs = table[before, [e.token_ids[t] for t in at]]
        assert torch.allclose(now.logprobs[row, : len(at)], logprobs, atol=1e-5)
        assert torch.allclose(now.entropy[row, : len(at)], -(table[before].exp() * table[before]).sum(-1), atol=1e-5)
        total = total + (logprobs**2).sum()
    total.backward()
    for (name, p), q in zip(reasoner.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5 * float(q.grad.abs().max())), name


def test_episodes_of_a_group_that_begin_differently_are_refused(reasoner, episodes):
    batch = reasoner_batch(episodes, torch.device("cpu"))
    batch.ids[1, 0] += 1
    with pytest.raises(ValueError, match="do not begin alike"):
        pack(batch)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_token_logprobs_equal_log_softmax(chunk, monkeypatch):
    monkeypatch.setattr("rsim.objective.logprobs._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(31, (13,), generator=generator)
    upstream = torch.randn(13, generator=generator)
    logprobs, entropy = token_logprobs(hidden, weight, tokens, 0.7)
    table = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    expected = table.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), -(table.exp() * table).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    taken = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    for a, b in zip(taken, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
