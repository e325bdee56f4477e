"""``rsim eval --upstream``: a model behind a server is measured as the same model in this process is."""

from __future__ import annotations

import json

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from rsim.cli.main import app
from rsim.errors import UserError
from rsim.evaluation.saved import EvalSettings, evaluate_into
from rsim.evaluation.upstream import ServedModel
from rsim.models import load_planner, load_reasoner
from rsim.planner.scripted import random_planner
from rsim.plugin.server import create_app
from rsim.plugin.state import ServeConfig
from rsim.strategies import load_strategies
from serving import serving

STRATEGIES = load_strategies("lab")


@pytest.fixture(scope="module")
def server():
    with serving(create_app(ServeConfig(slots=8), random_planner(STRATEGIES), load_reasoner("nano-s"), name="nano-s")) as url:
        yield url


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    load_planner("nano-s", STRATEGIES, seed=0, head="names").save_pretrained(folder)
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
    assert (there.accuracy, there.usage, there.flags) == (here.accuracy, here.usage, here.flags)
    assert 0 < there.accuracy < 1
    # the delimiter is the server's stop string: one sampled token less a step, but the last one
    assert abs(there.sampled_tokens - here.sampled_tokens) <= here.steps
    assert there.tflops == 0


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
