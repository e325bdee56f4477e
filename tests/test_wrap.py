"""``Planner.wrap`` in process, and what the plug-in does with upstreams of different kinds."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rsim import Planner
from rsim.answers.prefix import as_message
from rsim.config import load_config
from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.game.rollout import Game
from rsim.policies.fitted import FittedFor
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving import tracing
from rsim.serving.http_upstream import probe
from rsim.serving.play import Finished, Injected, TextDelta
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from rsim.serving.wrap import _Loop, wrap
from serving import serving
from studies.streams import behind_the_server
from tiny import named_planner

RULES = PlayRules(delimiter="\n", max_steps=5, step_tokens=48, max_tokens=240, answer_tokens=12)
PROBLEMS = load_problems("lab", "dev", limit=6, seed=5)
QUESTIONS = [p.question for p in PROBLEMS]


@pytest.fixture(scope="module")
def nano():
    return load_reasoner("nano-s")


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """Saved and loaded again: the folder holds its strategies."""
    folder = tmp_path_factory.mktemp("planner")
    named_planner(load_strategies("lab")).save_pretrained(folder)
    return Planner.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(nano, planner):
    rules = replace(load_config("nano").rollout, paraphrase="first")
    episodes = Game(nano, planner, rules).play(PROBLEMS, seed=0, greedy=True)
    return [nano.tokenizer.decode(e.token_ids[e.prompt_length :], skip_special_tokens=True) for e in episodes]


def test_a_wrapped_model_answers_as_the_game_does(nano, planner, expected):
    with planner.wrap(nano.model, nano.tokenizer, rules=RULES, slots=4) as planned:
        assert planned.generate(QUESTIONS[0]).text == expected[0]
        assert planned.generate([]) == []
        assert [a.text for a in planned.generate(QUESTIONS)] == expected
        chat = [{"role": "user", "content": QUESTIONS[1]}]
        assert planned.generate(chat).text == expected[1]
        events = list(planned.stream(QUESTIONS[2]))
        assert "".join(e.text for e in events if not isinstance(e, Finished)) == expected[2]
        assert isinstance(events[0], Injected)
        assert isinstance(events[-1], Finished)
        for event in planned.stream(QUESTIONS[3]):  # given up half-way: its slot is free again
            if isinstance(event, TextDelta):
                break

        async def later() -> tuple[list[str], str]:
            answers = await planned.agenerate(QUESTIONS)
            return [a.text for a in answers], "".join(
                [e.text async for e in planned.astream(QUESTIONS[0]) if hasattr(e, "text")]
            )

        assert asyncio.run(later()) == (expected, expected[0])
        deadline = time.monotonic() + 5
        while planned.upstream.free.qsize() < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert planned.upstream.free.qsize() == 4, "every slot is free again"


def test_a_wrapped_model_takes_lists_of_chats_and_is_closed_twice(nano, planner, expected):
    planned = planner.wrap(nano.model, nano.tokenizer, rules=RULES, slots=4)
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS[:2]]
    assert [a.text for a in planned.generate(chats)] == expected[:2]
    assert [a.text for a in planned.generate([chats[0], QUESTIONS[1]])] == expected[:2]
    planned.close()
    planned.close()


def test_nobody_waits_for_an_answer_that_will_not_come(nano):
    """Of a list in which one failed the others were played to their end; when the model was closed, who waited did so for ever."""
    rules = PlayRules(delimiter="\0", step_tokens=400, max_tokens=900, answer_tokens=8)
    planned = wrap(sequence_planner(load_strategies("lab"), ["continuation"]), nano.model, nano.tokenizer, rules=rules, slots=1)
    with pytest.raises(UserError, match="exceeds the model's context"):
        planned.generate([QUESTIONS[0], "x" * 9000])
    deadline = time.monotonic() + 2  # a decision that is being made keeps its slot so long
    while not planned.inner.planning.free.qsize() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert planned.inner.planning.free.qsize() == 1, "it is not played on"

    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(planned.generate, QUESTIONS[0]), threads.submit(list, planned.stream(QUESTIONS[1]))]
        while planned.inner.planning.free.qsize():
            time.sleep(0.01)
        planned.close()
        for future in waiting:
            assert isinstance(future.exception(timeout=5), (CancelledError, RuntimeError))
    with pytest.raises(RuntimeError, match="the wrapped model is closed"):
        planned.generate(QUESTIONS[0])


def test_nothing_starts_while_a_wrapped_model_is_being_closed(loop, monkeypatch):
    """What started then was never run, and who waited for it did so for ever."""
    stop, refused = loop._stop, []

    async def stopping():
        with pytest.raises(RuntimeError, match="the wrapped model is closed"):
            loop.start(asyncio.sleep(0))
        refused.append(True)
        await stop()

    monkeypatch.setattr(loop, "_stop", stopping)
    loop.close()
    assert refused


def test_what_cannot_be_wrapped_is_said(nano, planner):
    with pytest.raises(UserError, match="cannot wrap a dict"):
        wrap(planner, {})
    with pytest.raises(UserError, match="needs its tokenizer"):
        wrap(planner, nano.model)


@pytest.fixture
def loop():
    loop = _Loop(random_planner(load_strategies("lab")), 1)
    yield loop
    loop.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_ctrl_c_ends_what_was_waited_for(loop, streamed, monkeypatch):
    """A stream ended in a RuntimeError (aclose() of what is running), and whole answers were played on."""
    begun, ended, pressed = threading.Event(), threading.Event(), threading.Event()
    result = Future.result

    async def endless() -> AsyncGenerator[str]:
        try:
            yield "one"
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def whole() -> list[str]:
        return [event async for event in endless()]

    def interrupted(self: Future[Any], timeout: float | None = None) -> Any:
        """As if Ctrl-C came while the main thread waits; a signal of the test's own would end whatever runs the tests."""
        while not self.done() and not pressed.is_set():
            if begun.wait(0.01):
                pressed.set()
                raise KeyboardInterrupt
        return result(self, timeout)

    monkeypatch.setattr(Future, "result", interrupted)
    work: Callable[[], object] = (lambda: list(loop.iterate(endless()))) if streamed else (lambda: loop.wait(whole()))
    with pytest.raises(KeyboardInterrupt):
        work()
    assert ended.is_set() if streamed else ended.wait(10)


def test_what_fails_in_a_stream_is_raised_behind_what_came_before(loop):
    async def failing() -> AsyncGenerator[str]:
        yield "one"
        raise UserError("so")

    events = loop.iterate(failing())
    assert next(events) == "one"
    with pytest.raises(UserError, match="so"):
        next(events)


def test_spans_of_a_stream_are_of_one_context(loop, caplog):
    """Every step was logged as one whose context cannot be left."""
    pytest.importorskip("opentelemetry.sdk")

    async def spans() -> AsyncGenerator[int]:
        for step in range(3):
            with tracing.span("step", {}):
                yield step

    async def later() -> list[int]:
        return [step async for step in loop.aiterate(spans())]

    assert list(loop.iterate(spans())) == asyncio.run(later()) == [0, 1, 2]
    assert "detach" not in caplog.text


class StandIn:
    """An upstream that writes a fixed script, a blank line behind all but the last text, and remembers what it was asked.
    ``prefill``: whether it can continue a turn."""

    def __init__(self, script: list[str], *, prefill: bool = False, usage: bool = True, failures: int = 0) -> None:
        self.script = [f"{said}\n\nand so on" if said != "FAIL" else said for said in script[:-1]] + script[-1:]
        self.prefill, self.usage, self.failures = prefill, usage, failures
        self.bodies: list[dict] = []
        self.connections: set[tuple[str, int]] = set()
        self.cancelled = threading.Event()
        self.app = FastAPI()
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", lambda: {"data": [{"id": "m", "object": "model"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.connections.add(tuple(request.scope["client"]))
        said = [m for m in body["messages"] if m["role"] == "assistant"]
        if body.get("max_tokens") == 1 and not body.get("stream"):  # a probe: four tokens a turn, one a word
            words = sum(4 + len(str(m["content"]).split()) for m in body["messages"])
            continued = self.prefill and body.get("continue_final_message")
            tokens = words + (0 if continued else 3) - (1 if continued else 0)
            return JSONResponse({"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}})
        if self.failures:
            self.failures -= 1
            return JSONResponse({"error": {"message": "busy", "type": "overloaded"}}, 503)
        self.bodies.append(body)
        asked = sum(m["role"] == "user" for m in body["messages"]) if not self.prefill else None
        step = (asked - 1) if asked is not None else len(self.bodies) - 1
        text = self.script[min(step, len(self.script) - 1)]
        if text == "FAIL":
            return JSONResponse({"error": {"message": "no such model", "type": "not_found", "code": "x"}}, 404)
        assert said or step == 0
        return StreamingResponse(self.stream(text), media_type="text/event-stream")

    async def stream(self, text: str) -> AsyncIterator[str]:
        try:
            for word in text.split(" "):
                if word == "SLOW":
                    await asyncio.sleep(30)
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': word + ' '}}]})}\n\n"
                await asyncio.sleep(0)
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            if self.usage:
                tokens = {"prompt_tokens": 10, "completion_tokens": len(text.split()), "total_tokens": 0}
                yield f"data: {json.dumps({'choices': [], 'usage': tokens})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


SCRIPTED = sequence_planner(load_strategies("default"), ["decomposition", "validation", "termination"])
PROMPTS = [SCRIPTED.strategies[SCRIPTED.strategies.index(n)].prompts[0] for n in ("decomposition", "validation", "termination")]


def chat(url: str, **options: object):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    api = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
    return api.chat.completions.create(model=f"m{SUFFIX}", messages=messages, **options)


@pytest.mark.parametrize("prefill", [True, False])
def test_the_probe_tells_prefill_from_turn(prefill):
    async def asked(url: str) -> tuple[str, bool]:
        async with httpx.AsyncClient(base_url=f"{url}/") as http:
            return await probe(http, "m")

    with serving(StandIn([], prefill=prefill).app) as url:
        assert asyncio.run(asked(url)) == ("prefill" if prefill else "turn", False)


def test_an_upstream_that_does_not_count_cannot_be_probed_and_says_so():
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", lambda: {"choices": []}, methods=["POST"])
    app.add_api_route("/v1/models", lambda: {"data": [{"id": "m"}]})
    with serving(app) as there, serving(create_app(ServeConfig(upstream=there), SCRIPTED)) as url:
        with pytest.raises(openai.APIStatusError, match="state --mode") as refused:
            chat(url)
        assert refused.value.status_code == 501


def test_turn_mode_sends_strategies_as_messages_and_keeps_the_rest():
    upstream = StandIn(["one two", "three", "so 5"])
    config = partial(ServeConfig, rules=PlayRules(paraphrase="first"))
    with serving(upstream.app) as there, serving(create_app(config(upstream=there), SCRIPTED)) as url:
        reply = chat(url, extra_body={"top_k": 7}, temperature=0.5)
        streamed = chat(url, stream=True, stream_options={"include_usage": True})
        text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
    assert reply.rsim["mode"] == "turn"
    assert reply.rsim["approximate"]
    final = as_message(PROMPTS[2])
    assert reply.choices[0].message.content == text == f"{PROMPTS[0]}one two\n\n{PROMPTS[1]}three\n\n{final}so 5 "
    assert reply.usage.completion_tokens == 5
    assert reply.usage.prompt_tokens > 30
    assert reply.usage.estimated is True, "two calls were hung up"
    last = upstream.bodies[2]
    assert [m["role"] for m in last["messages"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert last["messages"][1]["content"] == f"How many?\n\n{PROMPTS[0]}"
    assert last["messages"][-1]["content"] == final
    assert (last["top_k"], last["temperature"], last["model"]) == (7, 0.5, "m")
    assert not any("stop" in body for body in upstream.bodies)


@pytest.mark.parametrize("own", ["system", "developer", None])
def test_a_fitted_planner_plays_behind_its_own_system_prompt(planner, nano, own):
    """What was measured was measured behind it; a client's own goes first, and what is not planned is passed on as it came."""
    fitted = replace(planner, fitted_for=FittedFor("m", {}, "", "", "Think in steps."))
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    chat = [{"role": own, "content": "Be brief."}, *chat] if own else chat
    behind = chat if own else [{"role": "system", "content": "Think in steps."}, *chat]
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content)["messages"])
        return httpx.Response(200, json={"choices": [{"message": {"content": "5"}, "finish_reason": "stop"}]})

    async def asked() -> None:
        async with behind_the_server(answer, fitted, rules=replace(RULES, max_steps=1)) as client:
            for model in (f"m{SUFFIX}", "m"):
                await client.post("chat/completions", json={"model": model, "messages": chat})

    asyncio.run(asked())
    assert [m["role"] for m in sent[0]][:-1] == [m["role"] for m in behind][:-1]
    assert sent[0][: len(behind) - 1] == behind[:-1]
    assert sent[-1] == chat
    with (
        fitted.wrap(nano.model, nano.tokenizer, rules=RULES) as ours,
        planner.wrap(nano.model, nano.tokenizer, rules=RULES) as plain,
    ):
        assert ours.generate(chat).text == plain.generate(behind).text


@pytest.mark.parametrize("to_end", [True, False])
def test_the_final_step_goes_to_the_end_of_the_turn_where_the_rules_say_so(to_end):
    upstream = StandIn(["one", "two", "so\n\n5"])
    config = partial(ServeConfig, rules=PlayRules(answer_to_end=to_end))
    with serving(upstream.app) as there, serving(create_app(config(upstream=there), SCRIPTED)) as url:
        said = chat(url).choices[0].message.content
    assert said.endswith("so\n\n5 " if to_end else "so\n\n")
    assert len(upstream.bodies) == 3


def test_prefill_mode_continues_the_open_turn_and_images_pass_through():
    upstream = StandIn(["one", "two", "three"], prefill=True)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there), SCRIPTED)) as url:
        api = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
        reply = api.chat.completions.create(model=f"m{SUFFIX}", messages=messages, temperature=0)
    assert reply.rsim["mode"] == "prefill"
    assert upstream.bodies[1]["messages"][0] == messages[0]
    assert upstream.bodies[1]["messages"][1]["content"] == f"{PROMPTS[0]}one\n\n{PROMPTS[1]}"
    assert upstream.bodies[1]["continue_final_message"] is True


def test_usage_is_marked_as_estimated_where_the_upstream_says_nothing():
    upstream = StandIn(["one two", "three", "four"], usage=False)
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there), SCRIPTED)) as url:
        usage = chat(url).usage
    assert usage.completion_tokens == 4
    assert usage.estimated is True


def test_retries_only_before_the_first_token_and_errors_keep_their_form():
    upstream = StandIn(["one", "FAIL"], failures=2)
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there), SCRIPTED)) as url:
        with pytest.raises(openai.NotFoundError) as refused:
            chat(url)
        assert refused.value.body["message"] == "no such model"
        assert len(upstream.bodies) == 2, "two refusals with 503 were tried again, 404 was not"
        with pytest.raises(openai.APIError, match="no such model"):
            list(chat(url, stream=True))
        upstream.failures = 9
        with pytest.raises(openai.InternalServerError, match="busy"):
            chat(url)
    with serving(create_app(ServeConfig(upstream="http://127.0.0.1:9/v1"), SCRIPTED)) as url:
        with pytest.raises(openai.InternalServerError, match=r"cannot be reached|cannot be listed") as down:
            chat(url)
        assert down.value.status_code == 502
        assert httpx.get(url.replace("/v1", "/healthz")).json()["status"] == "upstream not reached yet"


@pytest.mark.parametrize("said", ["<html>", '{"error": "overloaded"}', '{"error": null}', "[1]", '{"choices": []}'])
def test_an_upstream_that_answers_in_another_form_is_an_error_and_no_crash(said):
    app = FastAPI()

    async def answer(request: Request) -> Response:
        if request.url.path.endswith("models"):
            return JSONResponse({"data": [{"id": "m"}]})
        if (await request.json()).get("stream"):
            return Response(f"data: {said}\n\ndata: [DONE]\n\n", media_type="text/event-stream")
        return Response(said)

    app.router.add_route("/v1/{path:path}", answer, methods=["GET", "POST"])
    with serving(app) as there:
        for mode in ("prefill", None):  # None: the probe meets it
            config = ServeConfig(upstream=there, mode=mode)
            with serving(create_app(config, SCRIPTED)) as url:
                with pytest.raises(openai.APIStatusError) as refused:
                    chat(url)
                assert refused.value.status_code in (501, 502)
                assert 'status="50' in httpx.get(url.replace("/v1", "/metrics")).text


def test_a_compressed_stream_is_passed_on_readable():
    app = FastAPI()
    shown = b'data: {"choices": []}\n\ndata: [DONE]\n\n'

    async def answer(request: Request) -> Response:
        return Response(gzip.compress(shown), media_type="text/event-stream", headers={"Content-Encoding": "gzip"})

    app.router.add_route("/v1/{path:path}", answer, methods=["POST"])
    with serving(app) as there, serving(create_app(ServeConfig(upstream=there, mode="turn"), SCRIPTED)) as url:
        passed = httpx.post(f"{url}/chat/completions", json={"model": "m", "messages": [], "stream": True})
    assert passed.content == shown


@pytest.mark.parametrize(("stream", "model"), [(True, f"m{SUFFIX}"), (False, f"m{SUFFIX}"), (True, "m")])
def test_a_client_that_goes_away_cancels_the_upstream(stream, model):
    upstream = StandIn(["one SLOW"])
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there), SCRIPTED)) as url:
        body = {"model": model, "messages": [{"role": "user", "content": "q"}], "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/chat/completions", json=body, timeout=httpx.Timeout(1.0))
        assert upstream.cancelled.wait(10)
        for _ in range(50):
            if httpx.get(url.replace("/v1", "/healthz")).json()["active"] == 0:
                break
        assert httpx.get(url.replace("/v1", "/healthz")).json()["active"] == 0


def test_a_time_limit_is_an_error_and_not_a_hang():
    upstream = StandIn(["one SLOW"])
    config = ServeConfig(upstream="", request_seconds=1.0)
    with serving(upstream.app) as there, serving(create_app(replace(config, upstream=there), SCRIPTED)) as url:
        with pytest.raises(openai.InternalServerError, match="took too long") as late:
            chat(url)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="took too long"):
            list(chat(url, stream=True))


def test_upstream_connections_are_kept_and_keys_stay_apart(caplog):
    caplog.set_level("DEBUG")
    upstream = StandIn(["an answer to its end"])
    config = ServeConfig(upstream="", upstream_key="up-secret", api_key="own-secret")
    assert "secret" not in repr(config)
    with serving(upstream.app) as there, serving(create_app(replace(config, upstream=there), SCRIPTED)) as url:
        api = openai.OpenAI(base_url=url, api_key="own-secret", max_retries=0)
        for _ in range(4):
            api.chat.completions.create(model=f"m{SUFFIX}", messages=[{"role": "user", "content": "q"}])
    assert len(upstream.connections) <= 2
    assert "chat/completions" in caplog.text, "the log is looked at"
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("gate", "said", "calls"), [
    (0.5, ["one\n\n", "two\n\n", "so 5 "], 2), (0.5, ["one\n\n", "two "], 1), (1.0, ["one\n\ntwo\n\nthree "], 1),
])  # fmt: skip
def test_as_long_as_the_planner_says_nothing_one_call_goes_on(gate, said, calls):
    """To the end of the turn, or until termination is forced; a gate of 1 leaves the model alone."""
    upstream = StandIn(["".join(said)] if calls == 1 else ["one\n\ntwo\n\nthree", "so 5"])
    unsure, rules = random_planner(load_strategies("default")), PlayRules(gate=gate, max_steps=2)
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there, rules=rules), unsure)) as url:
        steps = chat(url, temperature=0).rsim["choices"][0]["steps"]
        assert "".join(c.choices[0].delta.content or "" for c in chat(url, stream=True, temperature=0)) == "".join(
            s["prompt"] + s["text"] for s in steps
        )
    assert [s["text"].rstrip(" ") for s in steps] == [text.rstrip(" ") for text in said]
    assert [s["prompt"] for s in steps[:2]] == ["", ""][: len(steps)]
    assert steps[-1]["forced"] == (calls == 2)
    assert len(upstream.bodies) == 2 * calls, "one answer, and its stream"
    assert "Go on." not in str(upstream.bodies)
