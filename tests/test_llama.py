"""llama.cpp as an engine: against a stand-in server, and against the real one where it was built."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import httpx
import pytest
import torch

from rsim.config import load_config
from rsim.engine import llama
from rsim.engine.llama_process import llama_servers, server_program
from rsim.engine.sampling import DelimiterStop, Vocabulary
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.game.record import episode_json
from rsim.game.rollout import Game
from rsim.models.weights import cache_folder, package_file
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.training.trainer import Trainer
from standin_llama import StandIn
from tiny import RULES

QUESTIONS = [
    "4*17+38=?",
    "7=?",
    "Ann has 3 boxes of 17, finds 12 pens. how many?",
    "x-38=4*17, x=?",
    "12+13+14+15-9=?",
]
PROBLEMS = [Problem(q, "1") for q in QUESTIONS]
ON_SERVER = replace(RULES, engine="llama")
needs_server = pytest.mark.skipif(
    not (os.environ.get("RSIM_REAL_SERVERS") and server_program().is_file()),
    reason="a real server: studies/llama_server.sh builds one, make test-full asks for it",
)


@pytest.fixture
def standin(monkeypatch, reasoner):
    """What `Game` connects to is a stand-in that serves a copy of the tiny reasoner."""

    def serve(**settings) -> StandIn:
        settings = {"eog": reasoner.end_ids} | settings
        server = StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer, **settings)
        monkeypatch.setattr("rsim.engine.llama.LlamaServer", partial(llama.LlamaServer, transport=server))
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
        Game(reasoner, planner, rules).play(PROBLEMS, seed=0, greedy=True) for rules in (long, replace(long, engine="llama"))
    )
    assert records(here) == records(there)


def test_an_end_of_turn_that_is_the_servers_alone_ends_no_step(reasoner, lab_strategies, standin):
    """llama.cpp takes more tokens for the end of a turn than the reasoner's own configuration."""
    game = Game(reasoner, random_planner(lab_strategies), RULES)
    native = game.play(PROBLEMS, seed=0, greedy=True)
    inside = next(e.token_ids[s.body] for e in native for s in e.steps if s.end - s.body > 2)  # the first token of a step
    server = standin(eog={inside} | reasoner.end_ids)
    served = Game(reasoner, random_planner(lab_strategies), ON_SERVER).play(PROBLEMS, seed=0, greedy=True)
    assert records(served) == records(native)
    assert len(server.asked) > sum(len(e.steps) for e in served), "some steps took more than one request"


def test_an_end_of_turn_that_the_server_does_not_know_ends_the_step(reasoner, planner, standin):
    standin(eog=set())
    first = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True)
    inside = next(e.token_ids[s.body + 1] for e in first for s in e.steps if s.end - s.body > 2)
    reasoner.model.generation_config.eos_token_id = [reasoner.tokenizer.eos_token_id, inside]
    native = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True)
    assert any(e.reasoner_ended for e in native)
    assert records(Game(reasoner, planner, ON_SERVER).play(PROBLEMS, seed=0, greedy=True)) == records(native)


def test_samples_depend_on_seed_and_key_alone(reasoner, lab_strategies, standin):
    standin()
    game = Game(reasoner, random_planner(lab_strategies), ON_SERVER)
    whole = game.play(PROBLEMS, seed=5, group_size=2)
    few = Game(reasoner, random_planner(lab_strategies), replace(ON_SERVER, batch=2)).play(PROBLEMS, seed=5, group_size=2)
    assert records(whole) == records(few)
    assert records(whole) != records(game.play(PROBLEMS, seed=6, group_size=2))
    assert whole[0].token_ids != whole[1].token_ids


def test_recorded_logprobs_are_the_servers(reasoner, lab_strategies, standin):
    standin()
    game = Game(reasoner, random_planner(lab_strategies), replace(ON_SERVER, temperature=1.0))
    given = 0
    for episode in game.play(PROBLEMS, seed=1):
        table = torch.log_softmax(reasoner.model(torch.tensor([episode.token_ids])).logits[0], -1)
        for t, sampled in enumerate(episode.reasoner_mask):
            if sampled and not math.isnan(episode.logprobs[t]):
                assert episode.logprobs[t] == pytest.approx(table[t - 1, episode.token_ids[t]].item(), abs=1e-4)
                given += 1
            elif not sampled:
                assert episode.logprobs[t] == 0
    assert given > 50


def test_logprobs_can_be_had_at_the_sampling_temperature(reasoner, standin):
    standin()
    prompt = reasoner.prompt_ids(QUESTIONS[0])
    servers = llama.LlamaServers("http://a", 10)
    how = {"seed": 0, "temperature": 0.7, "end_ids": reasoner.end_ids}
    steps = []
    for logprobs in (True, False):
        engine = llama.LlamaEngine(servers, 1, **how, logprobs=logprobs)
        engine.start([0], [prompt], ["k"])
        engine.submit(0, [], 12, None)
        steps += engine.advance()
        engine.release(0)
        engine.close()
    table = torch.log_softmax(reasoner.model(torch.tensor([prompt + steps[0].tokens])).logits[0] / 0.7, -1)
    for i, token in enumerate(steps[0].tokens):
        assert steps[0].logprobs[i] == pytest.approx(table[len(prompt) - 1 + i, token].item(), abs=1e-4)
    assert steps[1].tokens == steps[0].tokens
    assert all(map(math.isnan, steps[1].logprobs))


def test_a_step_reads_its_new_tokens_alone_and_a_question_is_read_once(reasoner, lab_strategies, standin):
    server = standin(slots=1)
    planner = sequence_planner(lab_strategies, ["decomposition", "validation", "termination"])
    game = Game(reasoner, planner, replace(ON_SERVER, batch=1, paraphrase="first"))
    steps = game.play(PROBLEMS[:1], seed=0)[0].steps
    injected = [after.body - before.end for before, after in itertools.pairwise(steps)]
    assert len(injected) > 1
    # A step's last token was sampled and not read; it is read with the next prompt.
    assert server.read == [steps[0].body] + [n + 1 for n in injected]
    game.play(PROBLEMS[:1], seed=1)  # another engine, the same servers: question and first prompt are there
    assert server.read[len(steps)] == 1


@pytest.mark.parametrize("batch", [8, 3])
def test_a_question_is_read_once_for_the_episodes_of_a_group(reasoner, lab_strategies, standin, batch):
    """Side by side too; nothing but what is read depends on it."""
    planner = sequence_planner(lab_strategies, ["decomposition", "termination"])
    played, read = {}, {}
    for copies in (False, True):
        server = standin(slots=batch, copies=copies)
        game = Game(reasoner, planner, replace(ON_SERVER, batch=batch, paraphrase="first"))
        played[copies] = game.play(PROBLEMS[:2], seed=0, group_size=4)
        read[copies] = sum(server.read)
    assert records(played[True]) == records(played[False])
    questions = [played[True][i].prompt_length for i in (0, 4)]
    if batch == 8:
        assert read[False] - read[True] == 3 * sum(questions)


def test_arms_of_a_question_return_to_the_slot_that_holds_it(reasoner, standin):
    server = standin(slots=3)
    servers = llama.LlamaServers("http://a", 10)
    first, second = [1, 2, 3, 4], [1, 2, 9, 9]
    seats = [servers.take(prompt) for prompt in (first, second)]
    assert seats[0].index != seats[1].index
    for seat, prompt in zip(seats, (first, second), strict=True):
        seat.held, seat.taken = [*prompt, 5, 6], False
    assert [servers.take(prompt).index for prompt in (second, first)] == [seats[1].index, seats[0].index]
    assert servers.take(second).index not in {seats[0].index, seats[1].index}
    assert server.read == []


def test_what_greedy_arms_begin_with_is_sampled_once(reasoner, lab_strategies, standin):
    """Else a log pays twice for it, and rounding could make two arms differ before they part."""
    server = standin(slots=1)
    servers = llama.LlamaServers("http://a", 10)

    def play(*names, temperature=0.0):
        rules = replace(ON_SERVER, batch=1, paraphrase="first", temperature=temperature or 1.0)
        game = Game(reasoner, sequence_planner(lab_strategies, [*names, "termination"]), rules)
        game.servers = servers
        return game.play(PROBLEMS[:1], seed=0, greedy=not temperature)[0]

    first = play("decomposition")
    asked = len(server.asked)
    assert asked == len(first.steps)
    second = play("decomposition", "validation")
    shared = first.steps[0].end
    assert second.token_ids[:shared] == first.token_ids[:shared]
    assert len(server.asked) == asked + len(second.steps) - 1
    play("decomposition", temperature=1.0)
    assert len(server.asked) > asked + len(second.steps) - 1  # a sample is drawn each time


def test_several_servers_share_the_episodes(reasoner, lab_strategies, standin, monkeypatch):
    """What is sampled does not depend on their number."""
    random = random_planner(lab_strategies)
    standin()
    alone = records(Game(reasoner, random, ON_SERVER).play(PROBLEMS, seed=3, group_size=2))
    both = {
        f"http://{name}": StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer, eog=reasoner.end_ids, slots=6)
        for name in ("a", "b")
    }
    connect = llama.LlamaServer.func  # the class behind the fixture's partial
    monkeypatch.setattr("rsim.engine.llama.LlamaServer", lambda url, timeout: connect(url, timeout, transport=both[url]))
    game = Game(reasoner, random, replace(ON_SERVER, llama_url="http://a, http://b", batch=12))
    assert records(game.play(PROBLEMS, seed=3, group_size=2)) == alone
    assert min(len(server.asked) for server in both.values()) > 3
    with pytest.raises(UserError, match=r"13 episodes at a time on 12 slots"):
        Game(reasoner, random, replace(game.rules, batch=13)).play(PROBLEMS * 3, seed=3)


def test_another_models_server_is_refused(reasoner, planner, standin, monkeypatch):
    server = standin()
    monkeypatch.setattr(server.model.config, "vocab_size", 7)
    with pytest.raises(UserError, match="knows 7 tokens"):
        Game(reasoner, planner, ON_SERVER)
    monkeypatch.undo()
    server = standin()
    monkeypatch.setattr("rsim.engine.llama.LlamaServer", partial(llama.LlamaServer, transport=server))
    own, shifted = server.tokenizer, copy.deepcopy(server.tokenizer)
    monkeypatch.setattr(shifted, "decode", lambda ids: own.decode([i + 1 for i in ids]))
    monkeypatch.setattr(server, "tokenizer", shifted)
    with pytest.raises(UserError, match=r"another tokenizer.*same model"):
        Game(reasoner, planner, ON_SERVER)


def test_a_step_cut_by_the_servers_context_is_an_error(reasoner, planner, standin):
    for context in (20, 4):
        standin(context=context)
        with pytest.raises(UserError, match="ctx-size"):
            Game(reasoner, planner, ON_SERVER).play(PROBLEMS, seed=0)


def test_no_server_is_one_line(reasoner, planner):
    with pytest.raises(UserError, match=r"no llama.cpp server at http://127.0.0.1:9"):
        Game(reasoner, planner, replace(ON_SERVER, llama_url="http://127.0.0.1:9"))


def config_for(folder, base_folder, *more):
    models = (f'models.reasoner="{base_folder}"', f'models.planner="{base_folder}"', f'out="{folder}/run"')
    rollout = ('engine="llama"', "max_steps=3", "step_tokens=10", "max_tokens=64", "answer_tokens=6", "batch=64")
    train = ("questions=2", "group=4", "eval_every=0", "trackers=[]")
    rest = ("cold_start.episodes=0", "data.eval_size=4", *more)
    return load_config("nano", [*models, *(f"rollout.{r}" for r in rollout), *(f"train.{t}" for t in train), *rest])


PRETENDER = """#!{python}
import http.server, sys
class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Well).serve_forever()
"""


def program(path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    told = "from rsim.engine.llama_process import llama_servers; from pathlib import Path; import time\n"
    told += f"with llama_servers(Path('model'), Path({str(tmp_path / 'log')!r}), slots=1, context=8) as url:\n"
    told += "    print(url, flush=True); time.sleep(100)\n"
    environment = os.environ | {"RSIM_LLAMA_SERVER": program(tmp_path / "server", PRETENDER.format(python=sys.executable))}
    with subprocess.Popen([sys.executable, "-c", told], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        assert httpx.get(f"{address}/health").status_code == 200
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{address}/health", timeout=1)
        except httpx.TransportError:
            return
        time.sleep(0.1)
    pytest.fail("the server is still there")


@pytest.mark.parametrize(
    ("script", "seconds", "told"),
    [("exit 7", 30.0, "ended with 7"), ("exec sleep 100", 1.0, "did not answer within 1 s")],
)
def test_a_server_that_does_not_come_up_is_one_line(tmp_path, monkeypatch, script, seconds, told):
    monkeypatch.setenv("RSIM_LLAMA_SERVER", program(tmp_path / "server", f"#!/bin/sh\n{script}\n"))
    monkeypatch.setattr("rsim.engine.llama_process._SECONDS", seconds)
    with (
        pytest.raises(UserError, match=f"{told}.*log"),
        llama_servers(tmp_path / "model", tmp_path / "log", slots=1, context=8),
    ):
        pass


def test_planner_alone_trains_without_the_reasoners_weights(base_folder, standin, tmp_path):
    standin()
    with pytest.raises(UserError, match="takes no new weights"):
        config_for(tmp_path, base_folder)
    only = "stages.stage1.train_reasoner=false", "stages.stage2.train_reasoner=false", "train.steps=2"
    trainer = Trainer(config_for(tmp_path, base_folder, *only))
    assert trainer.reasoner.model.device.type == "meta"
    trainer.run()
    final = tmp_path / "run" / "checkpoints" / "final"
    assert [p.name for p in final.iterdir() if p.is_dir()] == ["planner"]


class Scripted:
    """A server that says ``said``, a token a character, whatever it is asked; it stops as llama.cpp does."""

    def __init__(self, said: str) -> None:
        self.said, self.asked, self.url = said, [], "http://scripted"
        self.seats = [llama.Seat(self, 0)]

    def complete(self, prompt, seat, n_predict, stop, **_):
        written = prompt.index(0) + 1 if 0 in prompt else 0
        so_far = "".join(map(chr, prompt[written:]))
        self.asked.append(so_far)
        rest = self.said[len(so_far) :]
        ends = [rest.index(word) + len(word) for word in stop if word in rest]
        taken = rest[: min([*ends, n_predict])]
        kind = "word" if ends and len(taken) == min(ends) else "limit"
        return {"tokens": [ord(c) for c in taken], "stop_type": kind}


def test_a_blank_line_inside_a_code_block_ends_no_step():
    from test_code_blocks import PROGRAM, Characters

    stop = DelimiterStop(Vocabulary(Characters(), 128), "\n\n")

    def played(cap: int, stop: DelimiterStop | None) -> tuple[str, str, int]:
        server = Scripted(PROGRAM)
        servers = llama.LlamaServers.__new__(llama.LlamaServers)
        servers.servers = [server]
        engine = llama.LlamaEngine(servers, 1, seed=0, temperature=0.0, end_ids={1})
        engine.start([0], [[0]], ["k"])
        engine.submit(0, [], cap, stop)
        step = engine.advance()[0]
        engine.close()
        return Characters().decode(step.tokens), step.end, len(server.asked)

    assert played(1000, stop) == (PROGRAM.removesuffix("Done."), "delimiter", 3)
    assert played(30, stop) == (PROGRAM[:30], "cap", 2)
    assert played(len(PROGRAM), None) == (PROGRAM, "cap", 1)


# --- the real server ---


@pytest.fixture(scope="module")
def smollm():
    return load_reasoner("smollm2-135m")


@pytest.fixture(scope="module")
def real(tmp_path_factory, smollm):
    log = tmp_path_factory.mktemp("llama") / "log"
    with llama_servers(package_file("smollm2-135m"), log, slots=4, context=400) as url:
        yield url


LONG = replace(
    RULES,
    engine="llama",
    max_tokens=90,
    step_tokens=24,
    answer_tokens=16,
    max_steps=2,
    delimiter="\n\n",
    batch=4,
)


@needs_server
def test_a_real_server_goes_on_from_ids_as_it_would_have_without_a_stop(real, smollm):
    """Ids out and in again, step by step, give the same tokens as one request; only what is new is read."""
    server = llama.LlamaServer(real, 600)
    server.check(smollm.tokenizer, smollm.vocabulary_size)
    prompt = smollm.prompt_ids("What is 17 + 25? Explain in a few short paragraphs.")
    greedy = llama.sampling(0.0, logprobs=False) | {"seed": 1}
    whole = server.complete(prompt, 0, n_predict=48, stop=[], **greedy)
    assert len(whole["tokens"]) == 48 or whole["stop_type"] == "eos"
    ids = list(prompt)
    for _ in range(12):
        part = server.complete(ids, 1, n_predict=4, stop=[], **greedy)
        assert part["timings"]["cache_n"] >= len(ids) - 1 or ids == prompt
        ids += part["tokens"]
        if part["stop_type"] == "eos":
            break
    assert ids[len(prompt) :] == whole["tokens"]
    injected = smollm.injected_ids(" Wait, let me check that.")
    reply = server.complete(ids + injected, 1, n_predict=4, stop=[], **greedy)
    assert reply["timings"]["prompt_n"] <= len(injected) + 1


@needs_server
def test_a_real_servers_stop_string_keeps_the_token_that_completes_it(real, smollm):
    server = llama.LlamaServer(real, 600)
    prompt = smollm.prompt_ids("Why does it rain?")
    reply = server.complete(prompt, 0, n_predict=100, stop=[" the"], seed=1, **llama.sampling(0.0, logprobs=True))
    assert reply["stop_type"] == "word"
    decode = smollm.tokenizer.decode
    assert " the" in decode(reply["tokens"])
    assert " the" not in decode(reply["tokens"][:-1])
    values = llama.aligned(reply["tokens"], reply["completion_probabilities"])
    assert math.isnan(values[-1]), "the server leaves the stop string's log-prob out"
    assert all(value <= 0 for value in values[:-1])


QWEN = cache_folder() / "qwen2.5-coder-1.5b.gguf"  # joined there once it was loaded


@needs_server
@pytest.mark.skipif(not QWEN.is_file(), reason="no Qwen2.5-Coder in the cache, whose weights llama.cpp would repack")
def test_a_real_servers_tokens_do_not_depend_on_what_is_sampled_beside_them(tmp_path):
    """To the last bit of their log-probs; repacked weights are multiplied with four tokens at a time."""
    with llama_servers(QWEN, tmp_path / "log", slots=5, context=128) as url:
        server = llama.LlamaServer(url, 600)
        prompts = [server.call("POST", "/tokenize", {"content": q})["tokens"] for q in QUESTIONS]

        def ask(slot: int) -> tuple[list[int], list[float]]:
            how = llama.sampling(0.0, logprobs=True) | {"n_predict": 6, "stop": [], "seed": 1, "ignore_eos": True}
            reply = server.complete(prompts[slot], slot, **how)
            return reply["tokens"], llama.aligned(reply["tokens"], reply["completion_probabilities"])

        for slot in range(5):
            ask(slot)  # reads the prompt
        alone = [ask(slot) for slot in range(5)]
        with ThreadPoolExecutor(5) as threads:
            assert list(threads.map(ask, range(5))) == alone


@needs_server
def test_a_real_servers_episodes(real, smollm):
    """Steps of a planned game; log-probs near those of the dequantised weights; the same again with the seed."""
    strategies = load_strategies("default")
    planner = sequence_planner(strategies, ["decomposition", "termination"])
    game = Game(smollm, planner, replace(LONG, llama_url=real, temperature=1.0))
    problems = PROBLEMS[:3]
    episodes = game.play(problems, seed=1)
    assert not all(episode.reasoner_ended for episode in episodes)
    differences = []
    for episode in episodes:
        chosen = [strategies.names.index("decomposition"), strategies.termination]
        assert [step.strategy for step in episode.steps] == chosen[: 1 if episode.reasoner_ended else 2]
        step = episode.steps[0]
        ends = "\n\n" in smollm.tokenizer.decode(episode.token_ids[step.body : step.end])
        assert ends or step.end - step.body == 24 or episode.reasoner_ended
        table = torch.log_softmax(smollm.model(torch.tensor([episode.token_ids])).logits[0], -1)
        for t, sampled in enumerate(episode.reasoner_mask):
            if sampled and not math.isnan(episode.logprobs[t]):
                differences.append(abs(episode.logprobs[t] - table[t - 1, episode.token_ids[t]].item()))
    assert len(differences) > 20
    assert sum(differences) / len(differences) < 0.1
    one = replace(game.rules, batch=1)
    again = [Game(smollm, planner, one).play(problems[:1], seed=1)[0].token_ids for _ in range(2)]
    assert again[0] == again[1]


@needs_server
def test_a_group_on_a_real_server_is_played_from_copies_of_one_question(real, smollm):
    planner = sequence_planner(load_strategies("default"), ["decomposition", "termination"])
    game = Game(smollm, planner, replace(LONG, llama_url=real))
    episodes = game.play([Problem("What is 17 + 25?", "42")], seed=0, greedy=True, group_size=4)
    (server,) = game.servers.servers
    assert list(server.files.values()) == [episodes[0].token_ids[: episodes[0].prompt_length]]
    assert all(e.token_ids == episodes[0].token_ids for e in episodes)
