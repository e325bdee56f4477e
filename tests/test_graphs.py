"""Recorded passes: what they compute, and that a replay reads the cache as it is then."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rsim.engine import decoder, graphs
from rsim.engine.decoder import Decoder
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner
from tiny import RULES, tiny_model

PROBLEMS = [Problem(q, "1") for q in ("4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?")]


def traced(forward):
    """As a CUDA graph does it: the operations of one run, on the very tensors of that run."""
    return make_fx(forward)()


@pytest.fixture
def on_cpu():
    """Passes are recorded on the CPU too; counts them."""
    recorded = []

    def record(forward):
        recorded.append(forward)
        return traced(forward)

    with (
        patch.object(decoder, "can_capture", lambda model: True),
        patch.object(graphs, "_Capture", lambda device: record),
        patch.object(graphs, "_FEWEST", 16),
    ):
        yield recorded


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("slots", [3, 64])
def test_a_game_of_recorded_passes_is_the_same_game(architecture, slots, lab_strategies, on_cpu):
    reasoner = Reasoner(tiny_model(architecture, seed=3).double(), build_tokenizer())
    played = []
    for used in (False, True):
        assert not on_cpu
        rules = replace(RULES, batch=slots, cuda_graphs=used)
        played.append(Game(reasoner, random_planner(lab_strategies), rules).play(PROBLEMS, seed=5, group_size=4))
    assert 3 <= len(on_cpu) <= 16, "a few shapes, each recorded once (and again after the cache has moved)"
    assert [e.token_ids for e in played[0]] == [e.token_ids for e in played[1]]
    for one, other in zip(*played, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_recorded_passes_see_new_weights(reasoner, on_cpu):
    """They hold the parameters' places, not their values; so they must never be replaced while a decoder lives."""
    both = [Decoder(reasoner.model, 2, 64, cuda_graphs=recorded) for recorded in (True, False)]

    def read(token):
        found = [d.append([0, 1], [[token], [token + 1]]) for d in both]
        return [h.detach().clone() for h in found]

    for d in both:
        d.append([0, 1], [[5, 6], [7, 8, 9]])
    before = read(4)
    torch.testing.assert_close(*before)
    with torch.no_grad():
        for p in reasoner.model.parameters():
            p.mul_(0.7)
    torch.testing.assert_close(*read(5))
    assert len(on_cpu) == 1


def test_slots_at_rest_keep_what_they_hold(reasoner, on_cpu):
    """A recorded pass computes for them too; also for a slot that its sequence fills to the cache's end."""
    both = [Decoder(reasoner.model, 4, 8, cuda_graphs=recorded) for recorded in (True, False)]
    for d in both:
        d.append([0, 1, 3], [[5, 6], list(range(5, 13)), [7, 8, 9]])
        for token in (4, 5, 6):
            d.append([3], [[token]])
        assert d.cache.lengths == [2, 8, 0, 6]
    found = [d.append([0, 1, 3], [[9], [9], [9]]) for d in both]
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_cuda_graphs_play_the_same_game(architecture, lab_strategies):
    reasoner = Reasoner(tiny_model(architecture, seed=3).double().cuda(), build_tokenizer())
    played = []
    for used in (False, True):
        rules = replace(RULES, cuda_graphs=used)
        played.append(Game(reasoner, random_planner(lab_strategies), rules).play(PROBLEMS, seed=5, group_size=8))
    assert [e.token_ids for e in played[0]] == [e.token_ids for e in played[1]]
