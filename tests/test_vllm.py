"""vLLM as an engine: the client's rules against a stand-in server, and everything against a real one where it is installed."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rsim.config import load_config
from rsim.engine import vllm
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.game.record import episode_json
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.training.trainer import Trainer
from standin_vllm import StandIn
from studies.servers import vllm_server
from tiny import RULES

QUESTIONS = ["4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?", "x-38=4*17, x=?", "12+13+14+15-9=?"]
PROBLEMS = [Problem(q, "1") for q in QUESTIONS]
ON_SERVER = replace(RULES, engine="vllm")
ENVIRONMENT = Path(os.environ.get("RSIM_VLLM_ENV", Path.home() / ".cache" / "rsim" / "vllm-env"))
needs_vllm = pytest.mark.skipif(
    not list(ENVIRONMENT.glob(".ready-*")), reason="no vLLM environment; studies/vllm_env.sh makes one"
)


@pytest.fixture
def standin(monkeypatch, reasoner):
    """What `Game` connects to is a stand-in that serves a copy of the tiny reasoner."""

    def serve(**settings) -> StandIn:
        server = StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer, **settings)
        monkeypatch.setattr("rsim.engine.vllm.VllmServer", partial(vllm.VllmServer, transport=server))
        return server

    return serve


def records(episodes):
    return [(e.token_ids, e.reasoner_mask, e.planner_ids, e.steps, episode_json(e, ("",) * 9)["flags"]) for e in episodes]


def test_greedy_episodes_equal_the_native_engines(reasoner, planner, standin):
    standin()
    for chooser in (planner, None):
        native = Game(reasoner, chooser, RULES).play(PROBLEMS, seed=0, greedy=True)
        served = Game(reasoner, chooser, ON_SERVER).play(PROBLEMS, seed=0, greedy=True)
        assert records(served) == records(native)
    planned = Game(reasoner, planner, ON_SERVER).play(PROBLEMS, seed=0, greedy=True)
    assert any(e.forced for e in planned) or any(len(e.steps) > 1 for e in planned)


def test_an_answer_to_the_end_of_the_turn_equals_the_native_engines(reasoner, lab_strategies, standin):
    standin()
    planner = sequence_planner(lab_strategies, ["decomposition", "termination"])
    long = replace(RULES, answer_to_end=True, answer_tokens=24, max_tokens=80)
    here, there = (
        Game(reasoner, planner, rules).play(PROBLEMS, seed=0, greedy=True) for rules in (long, replace(long, engine="vllm"))
    )
    assert records(here) == records(there)


def test_samples_depend_on_seed_and_key_alone(reasoner, lab_strategies, standin):
    standin()
    game = Game(reasoner, random_planner(lab_strategies), ON_SERVER)
    whole = game.play(PROBLEMS, seed=5, group_size=2)
    few = Game(reasoner, random_planner(lab_strategies), replace(ON_SERVER, batch=2)).play(PROBLEMS, seed=5, group_size=2)
    assert records(whole) == records(few)
    assert records(whole) != records(game.play(PROBLEMS, seed=6, group_size=2))
    assert whole[0].token_ids != whole[1].token_ids


def test_recorded_logprobs_are_at_the_sampling_temperature(reasoner, lab_strategies, standin):
    standin()
    game = Game(reasoner, random_planner(lab_strategies), replace(ON_SERVER, temperature=0.7))
    for episode in game.play(PROBLEMS, seed=1):
        table = torch.log_softmax(reasoner.model(torch.tensor([episode.token_ids])).logits[0] / 0.7, -1)
        for t, sampled in enumerate(episode.reasoner_mask):
            expected = table[t - 1, episode.token_ids[t]].item() if sampled else 0.0
            assert episode.logprobs[t] == pytest.approx(expected, abs=1e-4)


def test_a_server_with_raw_logprobs_is_refused(reasoner, planner, standin):
    standin(processed=False)
    with pytest.raises(UserError, match="processed_logprobs"):
        Game(reasoner, planner, replace(ON_SERVER, temperature=0.7))


def test_a_step_cut_by_the_servers_context_is_an_error(reasoner, planner, standin):
    standin(context=20)
    with pytest.raises(UserError, match="max-model-len"):
        Game(reasoner, planner, ON_SERVER).play(PROBLEMS, seed=0)


def test_no_server_is_one_line(reasoner, planner):
    with pytest.raises(UserError, match=r"no vLLM server at http://127.0.0.1:9"):
        Game(reasoner, planner, replace(ON_SERVER, vllm_url="http://127.0.0.1:9"))


def test_new_weights_arrive_and_the_prefix_cache_is_dropped(reasoner, planner, standin, tmp_path):
    served = standin()
    game = Game(reasoner, planner, ON_SERVER)
    before = records(game.play(PROBLEMS, seed=0, greedy=True))
    moved(reasoner.model)
    assert game.servers is not None
    game.servers.check_updates(reasoner.model, tmp_path / "weights")
    game.servers.update_weights(reasoner.model, tmp_path / "weights")
    assert served.calls[-4:] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    after = records(game.play(PROBLEMS, seed=0, greedy=True))
    assert after == records(Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True))
    assert after != before


def test_a_server_that_takes_no_weights_is_not_left_paused(reasoner, planner, standin, tmp_path, monkeypatch):
    served = standin()
    game = Game(reasoner, planner, ON_SERVER)
    answer = served.answer
    broken = httpx.Response(500, text="out of memory")
    monkeypatch.setattr(served, "handler", lambda request: broken if "rpc" in request.url.path else answer(request))
    with pytest.raises(UserError, match="out of memory"):
        game.servers.update_weights(reasoner.model, tmp_path / "weights")
    assert served.calls[-1] == "/resume"


def test_several_servers_share_the_episodes_and_all_get_new_weights(reasoner, lab_strategies, standin, tmp_path, monkeypatch):
    """What is sampled does not depend on their number; a sequence stays with one."""
    random = random_planner(lab_strategies)
    one = standin()
    alone = records(Game(reasoner, random, ON_SERVER).play(PROBLEMS, seed=3, group_size=2))
    both = {f"http://{name}": StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer) for name in ("a", "b")}
    connect = vllm.VllmServer.func  # the class behind the fixture's partial
    monkeypatch.setattr("rsim.engine.vllm.VllmServer", lambda url, timeout: connect(url, timeout, transport=both[url]))
    game = Game(reasoner, random, replace(ON_SERVER, vllm_url="http://a, http://b"))
    assert records(game.play(PROBLEMS, seed=3, group_size=2)) == alone
    asked = [server.calls.count("/v1/completions") for server in both.values()]
    assert sum(asked) == one.calls.count("/v1/completions") + 1, "one more probe of the temperature"
    assert min(asked) > 3
    moved(reasoner.model)
    game.servers.check_updates(reasoner.model, tmp_path / "weights")
    game.servers.update_weights(reasoner.model, tmp_path / "weights")
    assert all(s.calls[-4:] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"] for s in both.values())
    greedy = records(game.play(PROBLEMS, seed=3, greedy=True))
    assert greedy == records(Game(reasoner, random, RULES).play(PROBLEMS, seed=3, greedy=True))


def test_the_standins_cache_would_be_stale_without_a_reset(reasoner, planner, standin, tmp_path, monkeypatch):
    """The test above can fail: with the reset left out, old results come back."""
    served = standin()
    game = Game(reasoner, planner, ON_SERVER)
    before = records(game.play(PROBLEMS, seed=0, greedy=True))
    moved(reasoner.model)
    monkeypatch.setattr(served, "cache", KeepsAll(served.cache))
    game.servers.update_weights(reasoner.model, tmp_path / "weights")
    assert records(game.play(PROBLEMS, seed=0, greedy=True)) == before


class KeepsAll(dict):
    def clear(self):
        pass


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))


def test_a_server_that_keeps_its_old_head_is_refused(reasoner, planner, standin, tmp_path):
    standin(keeps_head=True)
    with pytest.raises(UserError, match="rsim export"):
        Game(reasoner, planner, ON_SERVER).servers.check_updates(reasoner.model, tmp_path / "weights")


def config_for(folder, base_folder, *more):
    return load_config("nano", [
        f'out="{folder}/run"', f'models.reasoner="{base_folder}"', f'models.planner="{base_folder}"', "cold_start.episodes=0",
        'rollout.engine="vllm"', "train.questions=2", "train.group=4", "train.eval_every=0", "train.trackers=[]",
        "rollout.max_steps=3", "rollout.step_tokens=10", "rollout.max_tokens=64", "rollout.answer_tokens=6", "data.eval_size=4",
        "train.reasoner_lr=3e-3", "objective.mask_truncated=false", *more,
    ])  # fmt: skip


def test_joint_training_samples_from_the_updated_weights(base_folder, standin, tmp_path, monkeypatch):
    monkeypatch.setattr("rsim.rewards.rewards.grade", lambda problem, answer, **_: len(answer) % 2 == 0)
    rewarding = tmp_path / "reward.py"
    rewarding.write_text("def share(episode):\n    return sum(episode.token_ids) % 7 / 7\n")
    ratios = {}
    for synced in (True, False):
        standin()
        config = config_for(tmp_path / str(synced), base_folder, f'rewards.custom=["{rewarding}:share"]', "train.steps=3")
        trainer = Trainer(config)
        if not synced:
            monkeypatch.setattr(trainer, "_sync", lambda: None)
        ratios[synced] = [abs(trainer.train_step()["reasoner/ratio"] - 1) for _ in range(3)]
    assert max(ratios[True]) < 1e-4
    assert ratios[False][0] < 1e-4 < ratios[False][2], "without the hand-over the sampler falls behind"


def test_planner_alone_trains_without_the_reasoners_weights(base_folder, standin, tmp_path):
    served = standin()
    only = "stages.stage1.train_reasoner=false", "stages.stage2.train_reasoner=false", "train.steps=2"
    trainer = Trainer(config_for(tmp_path, base_folder, *only))
    assert trainer.reasoner.model.device.type == "meta"
    trainer.run()
    assert "/collective_rpc" not in served.calls
    final = tmp_path / "run" / "checkpoints" / "final"
    assert [p.name for p in final.iterdir() if p.is_dir()] == ["planner"]
    resumed = Trainer(trainer.config, resume=True)
    assert resumed.step == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    """vLLM's attention for CPUs wants a head size of at least 32."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=96, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("served") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@needs_vllm
def test_a_real_server(real_folder, lab_strategies, tmp_path):
    """Greedy equality, log-probs, a weight update with and without the cache's reset, and a joint run, on one real server."""
    from rsim.policies.loading import load_planner, load_reasoner

    with vllm_server(str(real_folder), "--max-model-len", "512") as client:
        rules = replace(ON_SERVER, vllm_url=str(client.base_url), temperature=0.7, max_tokens=96, step_tokens=24)
        reasoner = load_reasoner(str(real_folder))
        planner = load_planner(str(real_folder), lab_strategies, seed=0)
        game = Game(reasoner, planner, rules)
        native = Game(reasoner, planner, replace(rules, engine="native"))
        problems = [Problem(q + " " + q * 3, "1") for q in QUESTIONS]  # long enough to fill a block of the prefix cache
        old = native.play(problems, seed=0, greedy=True)
        assert records(game.play(problems, seed=0, greedy=True)) == records(old)
        for episode in game.play(problems, seed=1, group_size=2):
            table = torch.log_softmax(reasoner.model(torch.tensor([episode.token_ids])).logits[0] / 0.7, -1)
            for t, sampled in enumerate(episode.reasoner_mask):
                if sampled:
                    assert episode.logprobs[t] == pytest.approx(table[t - 1, episode.token_ids[t]].item(), abs=1e-3)
        moved(reasoner.model)
        assert game.servers is not None
        game.servers.check_updates(reasoner.model, tmp_path / "weights")
        new = native.play(problems, seed=0, greedy=True)
        assert records(new) != records(old)
        assert records(game.play(problems, seed=0, greedy=True)) == records(new)

        rewarding = tmp_path / "reward.py"
        rewarding.write_text("def share(episode):\n    return sum(episode.token_ids) % 7 / 7\n")
        config = config_for(tmp_path, real_folder, f'rollout.vllm_url="{client.base_url}"', "train.steps=3",
                            f'rewards.custom=["{rewarding}:share"]')  # fmt: skip
        trainer = Trainer(config)
        for _ in range(3):
            assert trainer.train_step()["reasoner/ratio"] == pytest.approx(1.0, abs=1e-3)


@needs_vllm
def test_joint_training_with_a_real_bfloat16_server(real_folder, tmp_path):
    """Sampling in bfloat16, masters in float32: the sampler stays near the trainer from update to update, and the gap is seen."""
    rewarding = tmp_path / "reward.py"
    rewarding.write_text("def share(episode):\n    return sum(episode.token_ids) % 7 / 7\n")
    with vllm_server(str(real_folder), "--max-model-len", "512", "--dtype", "bfloat16") as client:
        config = config_for(tmp_path, real_folder, f'rollout.vllm_url="{client.base_url}"', "objective.importance_cap=2.0",
                            "train.reasoner_lr=1e-3", f'rewards.custom=["{rewarding}:share"]')  # fmt: skip
        trainer = Trainer(config)
        for _ in range(3):
            metrics = trainer.train_step()
            assert metrics["reasoner/ratio"] == pytest.approx(1.0, abs=0.05)
            assert 1e-6 < metrics["reasoner/sampler_kl"] < 0.05
        assert all(p.dtype == torch.float32 for p in trainer.reasoner.model.parameters())


@needs_vllm
def test_a_real_prefix_cache_is_stale_until_it_is_reset(real_folder, tmp_path):
    """Why `update_weights` resets: after new weights alone, a cached prompt still answers with old keys and values."""
    from rsim.policies.loading import load_reasoner

    with vllm_server(str(real_folder), "--max-model-len", "512") as client:
        servers = vllm.VllmServers(str(client.base_url), 60)
        server = servers.servers[0]
        reasoner = load_reasoner(str(real_folder))
        prompt = reasoner.prompt_ids(QUESTIONS[2] * 4)

        def gap() -> float:
            """Between the server's log-prob and that of the weights at hand."""
            tokens, logprobs, _ = server.complete(prompt, max_tokens=1, temperature=0.0)
            own = torch.log_softmax(reasoner.model(torch.tensor([prompt])).logits[0, -1], -1)[tokens[0]]
            return abs(logprobs[0] - own.item())

        assert gap() < 1e-3
        assert gap() < 1e-3  # now from the cache
        moved(reasoner.model)
        vllm.save_untied(reasoner.model, tmp_path / "weights")
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights")}}
        client.post("/collective_rpc", json=reload).raise_for_status()
        assert gap() > 1e-2
        servers.update_weights(reasoner.model, tmp_path / "weights")
        assert gap() < 1e-3


def test_reasoner_shape_alone_knows_how_turns_end(base_folder):
    from rsim.policies.loading import load_reasoner

    whole, shape = load_reasoner(str(base_folder)), load_reasoner(str(base_folder), weights=False)
    assert isinstance(shape, Reasoner)
    assert shape.end_ids == whole.end_ids
    assert shape.prompt_ids("1+1=?") == whole.prompt_ids("1+1=?")
    assert shape.model.config.max_position_embeddings == whole.model.config.max_position_embeddings
