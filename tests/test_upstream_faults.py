"""What goes wrong at an upstream: its status and its words are told, its key is not, and what it wrote is counted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response
from typer.testing import CliRunner

from rsim.cli.main import app
from rsim.config import load_config
from rsim.errors import UserError, key_from
from rsim.evaluation.upstream import ServedGame, ServedModel
from rsim.game.problem import Problem
from rsim.serving import state
from rsim.serving.http_upstream import HttpUpstream
from rsim.serving.play import Asked, StepEnd, Until
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from rsim.serving.upstream_client import KEY, list_models, upstream_client
from serving import serving
from studies.streams import behind_the_server
from test_upstreams import COUNTED, QUESTION, SCRIPTED, STOP, ask, bodies, chunk, events, stream

MODELS = ("m", f"m{SUFFIX}")


# --- its key ---


def test_a_key_loses_the_line_break_that_came_with_it(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret\r\n")
    assert key_from(KEY) == "sk-secret"
    monkeypatch.delenv(KEY)
    assert key_from(KEY) == ""


@pytest.mark.parametrize("key", ["sk-\rsecret", "sk-secret\u2028x", "sk-sécret"])
def test_a_key_that_no_header_can_hold_is_named_and_not_shown(monkeypatch, key, tmp_path):
    upstream = ["--upstream", "http://127.0.0.1:9/v1", "--model", "m", "--planner"]
    commands = (
        ["serve", *upstream, "random", "--port", "0"],
        ["eval", "nano", *upstream, "none", "--out", str(tmp_path / "o")],
    )
    for variable, command in ((KEY, commands[0]), ("RSIM_API_KEY", commands[0]), (KEY, commands[1])):
        monkeypatch.setenv(variable, key)
        refused = CliRunner().invoke(app, command).exception
        monkeypatch.delenv(variable)
        assert isinstance(refused, UserError)
        assert f"${variable}" in str(refused)
        assert "cret" not in str(refused)


def test_a_header_that_cannot_be_sent_is_not_shown():
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer sk-secret\\r'")

    for model in MODELS:
        reply, _ = ask(answer, model=model)
        assert reply.status_code == 502
        assert "LocalProtocolError" in reply.text
        assert "secret" not in reply.text


def test_an_upstreams_cookie_for_one_client_is_not_sent_for_the_next():
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("cookie"))
        return httpx.Response(200, json={"data": []}, headers={"Set-Cookie": "session=1; Path=/"})

    async def twice() -> None:
        async with upstream_client("http://upstream.example/v1", "", httpx.Timeout(5)) as client:
            client._transport = httpx.MockTransport(answer)
            for _ in range(2):
                await list_models(client)

    asyncio.run(twice())
    assert sent == [None, None]


# --- its errors ---


class BreaksOff(httpx.AsyncByteStream):
    async def __aiter__(self):
        yield b'{"error": '
        raise httpx.RemoteProtocolError("peer closed connection")


def test_a_retry_after_of_any_bytes_is_handed_on():
    """One outside Latin-1 was a fault of the server."""
    answer = httpx.Response(429, json={"error": "late"}, headers=[(b"retry-after", "明日".encode())])
    reply, _ = ask(lambda request: answer)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "明日")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_upstream_that_sends_many_tokens_at_once_is_held_to_the_budget(streamed):
    """Each piece was taken for a token: 550 were written where 100 were asked for, and 5 told."""
    said, counted = "word " * 100 + "\n\nmore", {"prompt_tokens": 9, "completion_tokens": 101}
    message = {"choices": [{"index": 0, "message": {"content": said}, "finish_reason": "stop"}], "usage": counted}
    body = stream(chunk(said), STOP, COUNTED) if streamed else json.dumps(message).encode()
    reply, requests = ask(body, max_tokens=100)
    assert len(requests) == 2, "the first takes all of the budget: the answer is due"
    assert 200 <= reply.json()["usage"]["completion_tokens"] <= 300
    reply, _ = ask(body, max_tokens=400, stop="word word")
    assert 100 <= reply.json()["usage"]["completion_tokens"] <= 150


def test_an_error_whose_body_breaks_off_keeps_its_status_and_is_tried_again():
    replies = iter([httpx.Response(503, stream=BreaksOff()), httpx.Response(200, content=stream(chunk("12"), STOP, COUNTED))])
    reply, _ = ask(lambda request: next(replies))
    assert reply.status_code == 200
    reply, _ = ask(lambda request: httpx.Response(402, stream=BreaksOff()))
    assert (reply.status_code, reply.json()["error"]["message"]) == (402, "the upstream answered 402")


@pytest.mark.parametrize("error", [
    '{"message": "no \\ud83d", "type": "t\\udc00", "code": "\\ud800"}', '"no \\ud83d"', '{"message": "no \\ufffd", "code": NaN}',
])  # fmt: skip
def test_half_a_character_in_an_error_leaves_it_its_status(error):
    reply, _ = ask(lambda request: httpx.Response(402, content=f'{{"error": {error}}}'.encode()))
    assert (reply.status_code, reply.json()["error"]["message"]) == (402, "no \ufffd")


class Ends(httpx.AsyncByteStream):
    """An answer whose response breaks off, or is left open."""

    def __init__(self, said: bytes, *, breaks: bool) -> None:
        self.said, self.breaks = said, breaks

    async def __aiter__(self):
        yield self.said
        if self.breaks:
            raise httpx.RemoteProtocolError("peer closed connection")
        await asyncio.Event().wait()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("said", "breaks"), [
    ([chunk("12"), STOP], True),
    ([chunk("12"), STOP, COUNTED, "data: [DONE]\n\n"], False),
    ([chunk("12"), STOP, COUNTED, "data: [DONE]\n\n", chunk(" and more")], True),
])  # fmt: skip
def test_what_follows_when_all_was_said_changes_no_answer(monkeypatch, said, breaks, streamed):
    """It was a 502, or a 504 two minutes later; OpenAI's clients read to [DONE]."""
    monkeypatch.setattr("rsim.serving.said._LAST_SECONDS", 0.1)
    raw = "".join(part if isinstance(part, str) else f"data: {json.dumps(part)}\n\n" for part in said).encode()
    reply, _ = ask(lambda request: httpx.Response(200, stream=Ends(raw, breaks=breaks)), stream=streamed)
    assert reply.status_code == 200
    told = events(reply) if streamed else [reply.json()]
    assert "error" not in told[-1]
    said_all = "".join((c.get("delta") or c.get("message") or {}).get("content") or "" for e in told for c in e["choices"])
    assert said_all.endswith("12")


@pytest.mark.parametrize("streamed", [False, True])
def test_half_a_character_in_a_reason_to_end_is_told_as_none(streamed):
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "odd\ud83d"}]}
    reply, _ = ask(stream(chunk("12"), end, COUNTED), stream=streamed)
    told = events(reply)[-1] if streamed else reply.json()
    assert told["choices"][0]["finish_reason"] == "odd\ufffd"


# --- what it thinks and what is counted ---

CUT = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}


def test_of_several_first_calls_to_a_model_that_thinks_each_is_asked_again():
    """All but one were told as cut, without a word."""

    async def go() -> list[StepEnd]:
        together = asyncio.Barrier(8)

        async def answer(request: httpx.Request) -> httpx.Response:
            thought = chunk(None, reasoning="Hm.")
            if json.loads(request.content)["max_tokens"] > 50:
                return httpx.Response(200, content=stream(thought, chunk("It is "), chunk("12."), STOP, COUNTED))
            await together.wait()
            return httpx.Response(200, content=stream(thought, CUT))

        async def last() -> StepEnd:
            talk = await upstream.open(Asked("m", QUESTION, None, thinking=100))
            return [piece async for piece in talk.step(50, Until("\n\n"))][-1]

        async with httpx.AsyncClient(base_url="http://upstream/v1/", transport=httpx.MockTransport(answer)) as client:
            upstream = HttpUpstream(client, "turn")
            return await asyncio.gather(*(last() for _ in range(8)))

    for end in asyncio.run(go()):
        assert (end.text, end.reason, end.told, end.tokens) == ("It is 12.", "end_of_turn", "", 2)
        assert end.usage.completion_tokens == 1 + 3


def test_from_round_to_round_it_is_known_that_a_model_thinks():
    limits: list[int] = []
    upstream = FastAPI()

    @upstream.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        limits.append((await request.json())["max_tokens"])
        return Response(stream(chunk(None, reasoning="Hm."), chunk("5\n\n6"), STOP, COUNTED))

    with serving(upstream) as url:
        game = ServedGame(ServedModel(url, "m", "turn"), SCRIPTED, load_config("nano"))
        game._begin("turn")
        game.play([Problem("5+7=?", "12")], seed=0)
        first = limits.copy()
        game.play([Problem("5+7=?", "12")], seed=1)
    assert first[0] < min(first[1:])
    assert limits[len(first) :] == first[1:]


@pytest.mark.parametrize(("stop", "steps", "completion"), [("one", 1, 1), ("two", 2, 2), ("5", 3, 4), ("never", 3, 4)])
def test_a_step_that_a_stop_string_cuts_is_counted_with_its_prompt(stop, steps, completion):
    """Its prompt's tokens were left out: they were 0 where the string was met in the first step."""
    said = iter([[chunk("one\n\n")], [chunk("two\n\n")], [chunk("so "), chunk("5"), STOP]])
    reply, requests = ask(lambda request: httpx.Response(200, content=stream(*next(said))), stop=[stop])
    prompts = ["".join(str(m["content"]) for m in body["messages"]) for body in bodies(requests)]
    usage = reply.json()["usage"]
    assert len(prompts) == steps
    assert usage["prompt_tokens"] == pytest.approx(sum(map(len, prompts)) / 4, abs=2 * steps)
    assert (usage["completion_tokens"], usage["estimated"]) == (completion, True)


# --- what hangs ---


async def hangs(request: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


def probed_at_the_first_request(requests: int, **config: Any) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        app = create_app(ServeConfig(upstream="http://127.0.0.1:9/v1", **config), SCRIPTED)
        asking = httpx.AsyncClient(base_url="http://rsim/v1/", transport=httpx.ASGITransport(app))
        async with app.router.lifespan_context(app), asking:
            app.state.rsim.client = httpx.AsyncClient(base_url="http://up/v1/", transport=httpx.MockTransport(hangs))
            body = {"model": f"m{SUFFIX}", "messages": QUESTION}
            posts = (asking.post("chat/completions", json=body) for _ in range(requests))
            return await asyncio.wait_for(asyncio.gather(*posts), 30)

    return asyncio.run(go())


def test_an_upstream_that_hangs_at_the_first_question_keeps_nobody_longer_than_a_request_may_take():
    for reply in probed_at_the_first_request(3, request_seconds=0.2):
        assert (reply.status_code, reply.json()["error"]["message"]) == (504, "the request took too long")


def test_finding_out_what_an_upstream_is_has_a_time_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(state, "_PROBE_SECONDS", 0.05)
    (reply,) = probed_at_the_first_request(1)
    assert reply.status_code == 504
    assert "in 0.05 seconds: state --mode" in reply.json()["error"]["message"]


def passed(answer: Any, path: str, *, model: str = "m", more: dict[str, Any] | None = None, **config: Any) -> httpx.Response:
    """The server's response to a request in the form of ``path``."""

    async def go() -> httpx.Response:
        async with behind_the_server(answer, SCRIPTED, **config) as client:
            asked = {"input": "5+7?"} if path.startswith("responses") else {"messages": QUESTION, "max_tokens": 9}
            asked = {"prompt": [1, 2]} if path == "completions" else asked
            return await client.post(path, json={"model": model} | asked | (more or {}))

    return asyncio.run(go())


@pytest.mark.parametrize(("path", "model"), [("completions", f"m{SUFFIX}"), ("chat/completions", "m"), ("messages", "m")])
def test_what_hangs_later_takes_no_longer_either(path, model):
    """Token ids that are read, and what is passed on."""
    reply = passed(hangs, path, model=model, request_seconds=0.2)
    assert (reply.status_code, reply.json()["error"]["message"]) == (504, "the request took too long")


class Stream(httpx.AsyncByteStream):
    """One event; then the connection breaks, or says nothing."""

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks

    async def __aiter__(self):
        yield b"event: ping\ndata: {}\n\n"
        if self.breaks:
            raise httpx.ReadError("gone")
        await asyncio.Event().wait()


@pytest.mark.parametrize(("path", "where"), [("chat/completions", "error"), ("messages", "error"), ("responses", "")])
@pytest.mark.parametrize("breaks", [True, False])
def test_a_stream_that_is_passed_on_and_breaks_off_ends_in_its_own_form(path, where, breaks):
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Stream(breaks), headers={"content-type": "text/event-stream"})

    reply = passed(answer, path, more={"stream": True}, request_seconds=60 if breaks else 0.2)
    *_, last = reply.text.strip().split("\n\n")
    assert last.startswith("event: error\n") == (path != "chat/completions")
    told = json.loads(last.partition("data: ")[2])
    cause = "the connection to the upstream broke (ReadError: gone)" if breaks else "the request took too long"
    assert (told[where] if where else told)["message"] == cause


def test_the_query_of_what_is_passed_on_goes_with_it_but_for_keys():
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={})

    assert passed(answer, "messages?beta=true&x=1&x=2&api-key=k").status_code == 200
    assert passed(answer, "messages").status_code == 200
    assert [str(request.url).partition("/v1/")[2] for request in requests] == ["messages?beta=true&x=1&x=2", "messages"]


@pytest.mark.parametrize("more", [
    {"background": True}, {"prompt": {"id": "pmpt_1"}, "input": None}, {"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]},
])  # fmt: skip
def test_responses_with_what_cannot_be_planned_go_on_as_they_came(more):
    """They were answered without it, and without a word."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={"id": "resp_1"})

    assert passed(answer, "responses", model=f"m{SUFFIX}", more=more).json() == {"id": "resp_1"}
    assert bodies(requests) == [{"model": "m", "input": "5+7?"} | more]


def test_responses_count_what_was_thought():
    said = stream(chunk(None, reasoning="Hm."), chunk("12"), STOP, COUNTED)
    reply = passed(lambda request: httpx.Response(200, content=said), "responses", model=f"m{SUFFIX}",
                   more={"include": ["reasoning.encrypted_content"]})  # fmt: skip
    usage = reply.json()["usage"]
    assert (usage["output_tokens"], usage["output_tokens_details"]) == (1 + 3, {"reasoning_tokens": 2})


@pytest.mark.parametrize("path", ["chat/completions", "messages"])
def test_prompts_that_are_shown_as_thinking_stand_in_the_models_own_field(path):
    """In two fields their order was lost: all prompts, then all thoughts."""
    said = stream(chunk(None, reasoning="Hm."), chunk("12\n\nmore"), STOP, COUNTED)
    reply = passed(lambda request: httpx.Response(200, content=said), path, model=f"m{SUFFIX}", show="reasoning",
                   more={"max_tokens": 400}).json()  # fmt: skip
    prompts = [step["prompt"] for step in reply["rsim"]["choices"][0]["steps"]]
    assert len(prompts) > 1
    thought = reply["content"][0]["thinking"] if path == "messages" else reply["choices"][0]["message"]["reasoning"]
    assert thought == "".join(f"{prompt}Hm." for prompt in prompts)


def test_what_only_one_format_has_is_not_sent_to_chats():
    """OpenAI's chats refuse a cache_control; Claude Code sends it with every request. What asks for sound is not planned."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, content=stream(chunk("12"), STOP, COUNTED))

    text = {"type": "text", "text": "5+7?", "cache_control": {"type": "ephemeral"}, "citations": None}
    more = {"system": [text], "messages": [{"role": "user", "content": [text]}], "cache_control": {"type": "ephemeral"}}
    assert passed(answer, "messages", model=f"m{SUFFIX}", more=more).status_code == 200
    assert passed(answer, "responses", model=f"m{SUFFIX}", more={"max_tool_calls": 3}).status_code == 200
    assert not any(
        b"cache_control" in r.content or b"citations" in r.content or b"max_tool_calls" in r.content for r in requests
    )
    sound = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
    assert passed(answer, "chat/completions", model=f"m{SUFFIX}", more=sound).status_code == 200
    assert bodies(requests)[-1].items() >= sound.items()
    assert bodies(requests)[-1]["messages"] == QUESTION
