"""``rsim eval --upstream``: a model behind a server is measured as the same model in this process is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from rsim.cli.main import app
from rsim.config import PRESETS, load_config
from rsim.data.load import load_problems
from rsim.engine import llama_process
from rsim.engine.llama import LlamaServer
from rsim.engine.vllm import VllmServer
from rsim.errors import UserError
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedGame, ServedModel
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.loading import load_reasoner
from rsim.policies.planner import Planner
from rsim.policies.scripted import random_planner
from rsim.policies.strategies import load_strategies
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving
from tiny import named_planner

STRATEGIES = load_strategies("lab")


@pytest.fixture(scope="module")
def server():
    with serving(create_app(ServeConfig(slots=8), random_planner(STRATEGIES), load_reasoner("nano-s"), name="nano-s")) as url:
        yield url


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    named_planner(STRATEGIES).save_pretrained(folder)
    return str(folder)


def settings(planner: str, limit: int = 12) -> EvalSettings:
    return EvalSettings("nano", planner, "", "lab", "test", limit, 0, True, 1, ('rollout.paraphrase="first"',))


def records(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


KEYS = ("predicted", "correct", "flexible", "flags", "strategies", "step_count", "index", "sample")


@pytest.mark.parametrize("planned", [False, True])
def test_a_served_model_answers_as_the_one_in_this_process(server, planner, tmp_path, planned):
    spec = planner if planned else "none"
    there = evaluate_into(tmp_path / "there", settings(spec), served=ServedModel(server, "nano-s", at_once=4))
    here = evaluate_into(tmp_path / "here", settings(spec))
    for a, b in zip(records(tmp_path / "there"), records(tmp_path / "here"), strict=True):
        assert {k: a[k] for k in KEYS} == {k: b[k] for k in KEYS}
        assert [s["text"].split() for s in a["steps"]] == [s["text"].split() for s in b["steps"]]
        assert [s["probabilities"] for s in a["steps"]] == [s["probabilities"] for s in b["steps"]]
        assert [a[k] for k in ("sampled_tokens", "injected_tokens")] == [b[k] for k in ("sampled_tokens", "injected_tokens")]
    assert (there.accuracy, there.usage, there.flags) == (here.accuracy, here.usage, here.flags)
    assert 0 < there.accuracy < 1
    assert there.tflops == 0


def test_a_gate_acts_alike_on_a_served_model(server, planner, tmp_path):
    gated = replace(settings(planner), overrides=('rollout.paraphrase="first"', "rollout.gate=0.45"))
    there = evaluate_into(tmp_path / "there", gated, served=ServedModel(server, "nano-s", at_once=4))
    here = evaluate_into(tmp_path / "here", gated)
    for a, b in zip(records(tmp_path / "there"), records(tmp_path / "here"), strict=True):
        assert {k: a[k] for k in KEYS} == {k: b[k] for k in KEYS}
        assert [s["text"].split() for s in a["steps"]] == [s["text"].split() for s in b["steps"]]
    assert 0 < there.injected_tokens < there.steps, "some decisions are sure and some are not"
    assert (there.accuracy, there.usage) == (here.accuracy, here.usage)


def test_random_planners_are_repeatable_and_resumed(server, tmp_path):
    """What is drawn depends on the question's number, not on which answers are under way together."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate_into(whole, settings("random", 10), served=ServedModel(server, "nano-s", at_once=5))
    evaluate_into(parts, settings("random", 10), served=ServedModel(server, "nano-s", at_once=1))
    assert records(whole) == records(parts)
    lines = (parts / "episodes.jsonl").read_text().splitlines(keepends=True)
    (parts / "episodes.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # stopped while writing
    evaluate_into(parts, settings("random", 10), served=ServedModel(server, "nano-s", at_once=2))
    assert records(whole) == records(parts)
    assert len({tuple(r["strategies"]) for r in records(whole)}) > 3


def test_a_planner_whose_context_is_full_ends_the_answer(server, planner, tmp_path):
    """As in training: termination is forced."""
    small = tmp_path / "small"
    shutil.copytree(planner, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    found = evaluate_into(tmp_path / "e", settings(str(small)), served=ServedModel(server, "nano-s"))
    for record in records(tmp_path / "e"):
        forced = [s["forced"] for s in record["steps"]]
        assert forced == sorted(forced)
        assert [s["probabilities"] is None for s in record["steps"]] == forced
    assert found.flags["forced"] > 0


def test_sampled_answers_have_sampled_decisions(server, planner, tmp_path):
    several = replace(settings(planner, 4), greedy=False, samples=6)
    evaluate_into(tmp_path / "there", several, served=ServedModel(server, "nano-s"))
    firsts = {(r["index"], r["strategies"][0]) for r in records(tmp_path / "there")}
    assert len(firsts) > 6, "a planner that is sampled from does not begin every answer to a question alike"


def test_another_model_or_config_is_another_evaluation(server, planner, tmp_path):
    (tmp_path / "mine.toml").write_text((PRESETS / "nano.toml").read_text())
    mine = replace(settings("none", 4), run=str(tmp_path / "mine.toml"))
    first = evaluate_into(tmp_path / "e", mine)
    assert evaluate_into(tmp_path / "e", mine) == first, "asked for again it is what it was"
    assert "gate" not in json.loads((tmp_path / "e" / "settings.json").read_text())["means"]["rollout"], (
        "as before there was one"
    )
    with pytest.raises(UserError, match="other settings"):
        evaluate_into(tmp_path / "e", replace(mine, overrides=(*mine.overrides, "rollout.gate=0.5")))
    text = (tmp_path / "mine.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("max_tokens = ", "max_tokens = 1"))
    with pytest.raises(UserError, match="other settings"):
        evaluate_into(tmp_path / "e", mine)
    evaluate_into(tmp_path / "s", settings("none", 2), served=ServedModel(server, "nano-s"))
    with pytest.raises(UserError, match="other settings"):
        evaluate_into(tmp_path / "s", settings("none", 2), served=ServedModel(server, f"nano-s{SUFFIX}"))


def test_where_nothing_was_answered_another_evaluation_may_begin(server, tmp_path):
    """A model's name that was mistyped is put right in the same folder."""
    with pytest.raises(UserError, match="failed"):
        evaluate_into(tmp_path / "e", settings("none", 2), served=ServedModel(server, "mistyped"))
    evaluate_into(tmp_path / "e", settings("none", 2), served=ServedModel(server, "nano-s"))
    assert len(records(tmp_path / "e")) == 2


def test_an_upstream_that_fails_is_one_line_and_keeps_what_was_answered(server, tmp_path):
    broken = FastAPI()
    seen = []

    @broken.get("/v1/models")
    async def models():
        return {"data": [{"id": "nano-s"}]}

    @broken.post("/v1/chat/completions")
    async def complete():
        seen.append(1)
        if len(seen) > 3:
            return JSONResponse({"error": {"message": "out of order"}}, 400)
        answer = httpx.post(f"{server}/chat/completions", json={"model": "nano-s", "stream": True,
                            "messages": [{"role": "user", "content": "3+4=?"}]}, timeout=60)  # fmt: skip
        from fastapi.responses import Response

        return Response(answer.content, media_type="text/event-stream")

    with serving(broken) as url:
        with pytest.raises(UserError, match="out of order"):
            evaluate_into(tmp_path / "e", settings("none"), served=ServedModel(url, at_once=1))
        assert len(records(tmp_path / "e")) == 2
    arguments = ["eval", "nano", "--planner", "none", "--limit", "2", "--out", str(tmp_path / "x"), "--upstream"]
    for url, message in (("http://127.0.0.1:9/v1", "cannot be listed"), ("localhost", "base URL")):
        result = CliRunner().invoke(app, [*arguments, url])
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)
    for options in (["--planner", "shuffled"], ["--match-tokens", "x"]):
        result = CliRunner().invoke(app, [*arguments, server, *options])
        assert isinstance(result.exception, UserError)


def test_what_the_planner_read_and_chose_is_recorded_as_in_this_process(server, planner):
    """Training learns from these ids and decisions."""
    config = load_config("nano", ['rollout.paraphrase="first"'])
    problems = load_problems("lab", "test", limit=6, seed=0)
    chosen = Planner.from_pretrained(planner)
    there = ServedGame(ServedModel(server, "nano-s", at_once=3), chosen, config).play(problems, seed=0, greedy=True)
    here = Game(load_reasoner("nano-s"), chosen, config.rollout).play(problems, seed=0, greedy=True)
    for a, b in zip(there, here, strict=True):
        assert a.planner_ids == b.planner_ids
        assert [(d.position, d.action) for d in a.decisions] == [(d.position, d.action) for d in b.decisions]
        assert [d.logprob for d in a.decisions] == pytest.approx([d.logprob for d in b.decisions], abs=1e-4)
        assert (a.sampled_tokens, a.injected_tokens) == (b.sampled_tokens, b.injected_tokens)


@pytest.mark.parametrize("planner", [None, random_planner(STRATEGIES)])
def test_eval_says_what_the_upstream_cut_short(planner, caplog):
    """A filtered answer counted as wrong, and nothing said so."""
    choice = {"message": {"content": "The "}, "finish_reason": "content_filter"}
    upstream = FastAPI()

    @upstream.post("/v1/chat/completions")
    async def complete():
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})

    with serving(upstream) as url:
        game = ServedGame(ServedModel(url, "m", "turn"), planner, load_config("nano"))
        game._begin("turn") if planner else None
        game.play([Problem("5+7=?", "12")] * 2, seed=0)
    assert "2 of 2 answers were ended by the upstream with 'content_filter'" in caplog.text


def test_engines_ask_this_machine_without_a_proxy(monkeypatch):
    """A server that a run samples with, and the question whether it is well, were a traceback beside ``ALL_PROXY``."""
    for name in ("NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    assert not llama_process._answers("http://127.0.0.1:9")
    for server in (VllmServer, LlamaServer):
        with pytest.raises(UserError, match=r"no .* server at http://127\.0\.0\.1:9"):
            server("http://127.0.0.1:9", 5.0)
        with pytest.raises(UserError, match=r"socks.*NO_PROXY"):
            server("http://api.example", 5.0)
