"""Prompts of token ids before an upstream: it reads them, and gets them back as they came."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving.server import SUFFIX
from studies.streams import behind_the_server

STRATEGIES = load_strategies("default")
SCRIPTED = sequence_planner(STRATEGIES, ["decomposition", "termination"])
PROMPTS = [next(s.prompts[0] for s in STRATEGIES.strategies if s.name == name) for name in ("decomposition", "termination")]
SAID = b'data: {"choices": [{"index": 0, "text": "ab\\n\\ncd"}]}\n\ndata: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\n'


def characters(request: httpx.Request, body: dict[str, Any], told: str) -> httpx.Response | None:
    """A server whose tokens are characters; ``told``: the field of a text."""
    if request.url.path == "/detokenize":
        return httpx.Response(200, json={told: "".join(map(chr, body["tokens"]))})
    if request.url.path == "/tokenize":
        assert body["add_special_tokens"] is False
        assert body["add_special"] is False
        return httpx.Response(200, json={"tokens": [ord(c) for c in body["prompt" if told == "prompt" else "content"]]})
    return None


def ask(prompt: Any, answers: Any) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """The plug-in's response, and the bodies that the completions endpoint got."""
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["model"] == "m"
        told = answers(request, body)
        if told is None:
            sent.append(body)
        return told or httpx.Response(200, content=SAID)

    async def asked() -> httpx.Response:
        async with behind_the_server(answer, SCRIPTED, rules=PlayRules(paraphrase="first")) as client:
            return await client.post("completions", json={"model": f"m{SUFFIX}", "prompt": prompt, "temperature": 0})

    return asyncio.run(asked()), sent


@pytest.mark.parametrize("told", ["prompt", "content"])  # vLLM's and llama.cpp's
def test_an_upstream_reads_token_ids_and_gets_them_as_they_came(told):
    ids = [ord(c) for c in "5+7=?"]
    reply, sent = ask(ids, lambda request, body: characters(request, body, told))
    assert [s["strategy"] for s in reply.json()["rsim"]["choices"][0]["steps"]] == ["decomposition", "termination"]
    assert sent[0]["prompt"] == ids + [ord(c) for c in PROMPTS[0]]
    assert sent[1]["prompt"] == ids + [ord(c) for c in f"{PROMPTS[0]}ab\n\n{PROMPTS[1]}"]
    several, sent = ask([ids, ids[:2]], lambda request, body: characters(request, body, told))
    assert len(several.json()["choices"]) == 2


@pytest.mark.parametrize(("status", "shown"), [(404, "send the prompt as text"), (503, "busy")])
def test_an_upstream_that_cannot_read_token_ids_is_named(status, shown):
    def answer(request: httpx.Request, body: dict[str, Any]) -> httpx.Response:
        assert request.url.path == "/detokenize"
        return httpx.Response(status, json={"error": {"message": "busy"}})

    reply, _ = ask([1, 2], answer)
    assert reply.status_code == (400 if status == 404 else status)
    assert shown in reply.json()["error"]["message"]


@pytest.mark.parametrize("said", ["<html>", "[1]", '{"tokens": "x"}', "{}", '{"content": 7}'])
@pytest.mark.parametrize("path", ["/detokenize", "/tokenize"])
def test_what_is_no_text_or_no_token_ids_is_the_upstreams_fault(said, path):
    """A fault of the server (500)."""

    def answer(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        return httpx.Response(200, text=said) if request.url.path == path else characters(request, body, "prompt")

    reply, _ = ask([ord("7")], answer)
    assert (reply.status_code, reply.json()["error"]["type"]) == (502, "upstream_error")
    assert f"the upstream's {path} answers in an unknown form" in reply.json()["error"]["message"]
