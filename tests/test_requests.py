"""What clients send: read as it is meant, or refused with 400; never a fault of the server."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import Response

from rsim.policies.loading import load_reasoner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import StrategySet, load_strategies
from rsim.rules import PlayRules
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving

RULES = PlayRules(delimiter="\n", max_steps=2, step_tokens=8, max_tokens=40, answer_tokens=8)
USER = {"role": "user", "content": "7=?"}
PLANNER = sequence_planner(load_strategies("lab"), ["continuation", "termination"])
# Gemma's and the first Mistrals' do so.
_STRICT = (
    "{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('no such role here') }}"
    "{% endif %}<q>{{ m['content'] }}{% endfor %}<a>"
)


@pytest.fixture(scope="module")
def nano():
    return load_reasoner("nano-s", device="cpu")


@pytest.fixture(scope="module")
def local(nano):
    with serving(create_app(ServeConfig(rules=RULES, slots=4), PLANNER, nano, name="nano-s")) as url:
        yield url


@pytest.fixture(scope="module")
def proxied(local):
    with serving(create_app(ServeConfig(upstream=local, mode="prefill", rules=RULES, slots=4), PLANNER)) as url:
        yield url


@pytest.fixture(
    scope="module", params=[(place, model) for place in ("local", "proxied") for model in ("nano-s", f"nano-s{SUFFIX}")]
)
def ask(request):
    """Asks the model in the server's process, or a server before that one; planned, or not."""
    place, model = request.param
    url = request.getfixturevalue(place)

    def post(body, headers=None, kind="chat/completions"):
        raw = (
            body
            if isinstance(body, bytes)
            else json.dumps({"model": model, "messages": [USER], "max_tokens": 20} | body).encode()
        )
        return httpx.post(f"{url}/{kind}", content=raw.replace(b"MODEL", model.encode()), headers=headers, timeout=60)

    return post


_CHAT = b'{"model": "MODEL", "messages": [{"role": "user", "content": "7=?"}], '


@pytest.mark.parametrize(
    "body",
    [
        {"top_p": float("inf")},
        {"top_p": float("nan")},
        _CHAT + b'"top_p": 1e999}',
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        {"stop": "\udc00"},
        b'{"model": "MODEL", "messages": [{"role": "user", "content": "\xed\xa0\xbd"}]}',
        _CHAT + b'"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        _CHAT + b'"max_tokens": ' + b"1" * 5000 + b"}",
        {"temperature": 10**400},
        {"model": ["nano-s"]},
    ],
    ids=lambda body: str(body)[-40:],
)
def test_what_is_no_json_or_no_number_is_refused(ask, body):
    """Infinity, a lone surrogate, nesting and an integer beyond floats were faults of the server (500)."""
    reply = ask(body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 0])
def test_a_temperature_of_next_to_nothing_is_none(ask, temperature):
    """Logits divided by it were no numbers: 500."""
    replies = [ask({"temperature": t}).json()["choices"][0]["message"]["content"] for t in (temperature, 0)]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": {"text": "7=?"}}],
        [{"role": "user", "content": ["7=?"]}],
        [{"role": "user", "content": [{"type": "text", "text": 7}]}],
        [{"role": {"user": 1}, "content": "7=?"}],
        [USER, {"role": "assistant", "content": None}, USER],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "7=?"}]}],
    ],
    ids=lambda messages: str(messages)[-50:],
)
def test_contents_that_a_model_of_text_cannot_read_are_refused(ask, messages):
    """They became Python's repr of them, or nothing."""
    reply = ask({"messages": messages})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "messages[" in reply.json()["error"]["message"]


def test_parts_are_their_texts(ask):
    whole, parts = ({"temperature": 0, "messages": [{"role": "user", "content": content}]}
                    for content in ("7\n=?", [{"type": "text", "text": "7"}, {"type": "text", "text": "=?"}]))  # fmt: skip
    assert ask(parts).json()["choices"][0]["message"] == ask(whole).json()["choices"][0]["message"]


def test_headers_of_any_bytes_pass(ask):
    """Values outside ASCII were faults of the server before an upstream."""
    for value in ("ü".encode("latin-1"), "日本".encode()):
        assert ask({}, headers=[(b"x-note", value), (b"authorization", b"Bearer " + value)]).status_code == 200


def test_an_answers_header_of_any_bytes_passes():
    upstream = FastAPI()

    @upstream.post("/v1/chat/completions")
    async def complete():
        return Response(b"{}", headers={"x-request-id": "日本".encode().decode("latin-1")})

    with serving(upstream) as behind, serving(create_app(ServeConfig(upstream=behind, mode="turn"), PLANNER)) as url:
        reply = httpx.post(f"{url}/chat/completions", json={"model": "m", "messages": [USER]})
    assert reply.status_code == 200
    assert reply.headers["x-request-id"] == "日本"


def test_strategies_of_any_name_are_told_in_a_header(nano):
    """A name outside Latin-1 was a fault of the server, after the answer had been made."""
    named = tuple(replace(s, name="続ける") if s.name == "continuation" else s for s in load_strategies("lab").strategies)
    planner = sequence_planner(StrategySet(named), ["続ける", "termination"])
    with serving(create_app(ServeConfig(rules=RULES, slots=1), planner, nano, name="nano-s")) as url:
        reply = httpx.post(f"{url}/chat/completions", json={"model": f"nano-s{SUFFIX}", "messages": [USER], "temperature": 0})
    assert reply.status_code == 200
    assert unquote(reply.headers["x-rsim-strategies"]) == "続ける,termination"


def test_what_a_template_refuses_is_the_clients_to_put_right(nano):
    """A system role, or two user messages in a row: 500."""
    tokenizer = copy.deepcopy(nano.tokenizer)
    tokenizer.chat_template = _STRICT
    strict = Reasoner(nano.model, tokenizer)
    with serving(create_app(ServeConfig(rules=RULES, slots=1), PLANNER, strict, name="nano-s")) as url:
        for model in ("nano-s", f"nano-s{SUFFIX}"):
            for messages, status in (
                ([{"role": "system", "content": "Be brief."}, USER], 400),
                ([USER, USER], 400),
                ([USER], 200),
            ):
                reply = httpx.post(f"{url}/chat/completions", json={"model": model, "messages": messages, "max_tokens": 20})
                assert reply.status_code == status
                assert ("no such role here" in reply.text) == (status == 400)


def test_what_is_to_be_tokenised_is_a_text_that_a_context_may_hold(local):
    """A chat's messages were "", null was "None", and any length was taken."""
    url = local.removesuffix("/v1")
    assert httpx.post(f"{url}/tokenize", json={"prompt": "7=?"}).json()["count"] > 1
    for body in ({"messages": [USER]}, {"prompt": None}, {"prompt": ["7=?"]}, {"prompt": "1+1=? " * 300_000}):
        reply = httpx.post(f"{url}/tokenize", json=body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("POST", "messages/count_tokens", 404), ("POST", "embeddings", 404), ("GET", "chat/completions", 405), ("OPTIONS", "models", 405),
])  # fmt: skip
def test_what_is_not_served_is_an_error_object(local, method, path, status):
    """Clients showed a number and no words."""
    reply = httpx.request(method, f"{local}/{path}")
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")
    assert f"{method} /v1/{path}" in reply.json()["error"]["message"]
    assert ("allow" in reply.headers) == (status == 405)


@pytest.mark.parametrize("stream", ["false", 0.5, [True]])
def test_what_is_no_yes_or_no_asks_for_no_stream(local, stream):
    for model in ("nano-s", f"nano-s{SUFFIX}"):
        body = {"model": model, "messages": [USER], "stream": stream}
        reply = httpx.post(f"{local}/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")


def test_pages_of_other_sites_may_ask_who_have_the_key(nano):
    """A browser asks first whether it may send a key; without an answer to that, the key was of no use to a page."""
    asked = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    body = {"model": "nano-s", "messages": [USER], "max_tokens": 2}
    for key, status in (("k", 200), ("", 403)):
        with serving(create_app(ServeConfig(rules=RULES, slots=1, api_key=key), PLANNER, nano)) as url:
            first = httpx.options(f"{url}/chat/completions", headers=asked)
            headers = {"Origin": asked["Origin"], "Authorization": "Bearer k"}
            reply = httpx.post(f"{url}/chat/completions", json=body | {"model": "local"}, headers=headers)
        assert (first.status_code == 200) == bool(key)
        assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (status, "*" if key else None)
