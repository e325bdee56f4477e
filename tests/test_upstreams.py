"""What upstreams say, and in which forms: streams of several servers, errors, thinking; addresses, proxies and keys."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from typer.testing import CliRunner

import rsim.serving.http_upstream as http_upstream
from rsim.cli.main import app
from rsim.errors import UserError
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.proxies import proxy_of
from rsim.rules import PlayRules
from rsim.serving.play import TO_END, Asked, Until, Usage
from rsim.serving.said import UpstreamError, read
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from rsim.serving.upstream_client import check_address, first_model, upstream_client
from serving import serving
from studies.behaviours import BEHAVIOURS, wrong
from studies.streams import behind_the_server, fuzz

SCRIPTED = sequence_planner(load_strategies("default"), ["decomposition", "validation", "termination"])
RULES = PlayRules(paraphrase="first")
QUESTION = [{"role": "user", "content": "5+7?"}]
STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
COUNTED = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def chunk(content: Any = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content} | delta, "finish_reason": None}]}


def stream(*chunks: Any, done: bool = True) -> bytes:
    parts = [part if isinstance(part, bytes) else b"data: " + json.dumps(part).encode() + b"\n\n" for part in chunks]
    return b"".join(parts) + (b"data: [DONE]\n\n" if done else b"")


def ask(answers: Any, *, headers: Any = None, model: str = f"m{SUFFIX}", rules: PlayRules = RULES, **body: Any) -> Any:
    """The plug-in's response and the requests that the upstream got; ``answers``: a body, or a function of a request."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answers(request) if callable(answers) else httpx.Response(200, content=answers)

    async def asked() -> httpx.Response:
        async with behind_the_server(answer, SCRIPTED, rules=rules) as client:
            full = {"model": model, "messages": QUESTION, "temperature": 0} | body
            own = {"Content-Type": "application/json"}
            return await client.post("chat/completions", content=json.dumps(full), headers=own | (headers or {}))

    return asyncio.run(asked()), requests


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]


def bodies(requests: list[httpx.Request]) -> list[dict[str, Any]]:
    return [json.loads(request.content) for request in requests]


def test_mutated_streams_of_several_servers_pass_for_whole_only_if_they_are(capsys):
    found = asyncio.run(fuzz(60, seed=7))
    assert set(found) <= {"whole answer", "error", "upstream's own reason"}, capsys.readouterr().out
    assert found["whole answer"] > 10
    assert found["error"] > 10


@pytest.mark.parametrize(("said", "status", "told"), [
    (b'{"id": "x", "error": {"message": "provider overloaded", "code": 502}}', 502, "provider overloaded"),
    (b'{"error": {"message": "slow down", "code": 429}}', 429, "slow down"),
    (b"<html>sign in</html>", 502, "sign in"),
    (b"", 502, "broke off"),
    (stream(chunk("The sum "), done=False), 502, "broke off"),
    (stream(chunk("The sum ")), 502, "broke off"),
    (stream(chunk("The sum "), {"detail": "worker died"}), 502, "worker died"),
    (stream(chunk("The sum "), {"object": "error", "message": "too long", "code": 400}), 400, "too long"),
    (stream(chunk("The sum "), {"error": "overloaded"}), 502, "overloaded"),
    (stream(STOP), 502, "without a word"),
    (stream(STOP, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 40}}), 502, "without a word, of 40 tokens"),
    (b'{"message": "quota is out", "usage": {"prompt_tokens": 0}}', 502, "quota is out"),
    (stream(chunk(5), STOP), 502, "unknown form"),
])  # fmt: skip
def test_what_is_no_answer_is_an_error_that_says_what_the_upstream_said(said, status, told):
    reply, _ = ask(said)
    assert reply.status_code == status
    assert told in reply.json()["error"]["message"]


@pytest.mark.parametrize("said", [
    json.dumps({"choices": [{"message": {"content": "It is 12."}, "finish_reason": "stop"}]}, indent=1).encode(),
    stream(chunk("It is 12."), STOP, COUNTED | {"choices": None}),
    stream(chunk("It is 12."), STOP, {"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": None}}),
    stream(chunk([{"type": "text", "text": "It is "}, {"type": "text", "text": "12."}]), STOP),
    stream(b"data:\n\n", b": OPENROUTER PROCESSING\n\n", chunk("It is 12."), STOP, done=False),
])  # fmt: skip
def test_answers_in_other_forms_are_answers(said):
    reply, requests = ask(said)
    assert reply.json()["choices"][0]["message"]["content"].endswith("It is 12.")
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert len(requests) == 1, "the model ended its turn"


def test_characters_come_as_they_are():
    """U+2028 and U+0085 are no line breaks of the protocol; halves of a character meet; one alone is told as U+FFFD."""
    text = "a\u2028b\u2029c\u0085d"
    raw = stream(
        b"data: " + json.dumps(chunk(text), ensure_ascii=False).encode() + b"\n\n", chunk("\ud83d"), chunk("\ude42\ud83d"), STOP
    )
    for streamed in (False, True):
        reply, _ = ask(raw, stream=streamed)
        said = "".join(e["choices"][0]["delta"].get("content") or "" for e in events(reply)) if streamed else reply.json()["choices"][0]["message"]["content"]  # fmt: skip
        assert said.endswith(text + "🙂\ufffd")


@pytest.mark.parametrize("line_break", [b"\r", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_every_line_break_of_event_streams_ends_a_line(line_break, size):
    """However a body is cut into parts, between CR and LF too."""
    raw = stream(b": ping\n\n", chunk("It is "), b'data: {"choices":\ndata: []}\n\n', chunk("12."), STOP).replace(
        b"\n", line_break
    )

    async def parts() -> Any:
        for i in range(0, len(raw), size):
            yield raw[i : i + size]

    reply, _ = ask(lambda request: httpx.Response(200, content=parts()))
    assert reply.json()["choices"][0]["message"]["content"].endswith("It is 12.")


def test_seeds_of_steps_and_choices_stay_whole_numbers_of_64_bits():
    """Each step and choice draws other numbers."""
    for seed, other in ((5, 6), (2**63 - 1, 2**63 - 2), (-1, 0)):
        said = stream(chunk("One.\n\n"), STOP), stream(chunk("It is 12."), STOP)
        _, requests = ask(lambda request, said=said: httpx.Response(200, content=said["One." in request.content.decode()]), seed=seed, n=2, temperature=1)  # fmt: skip
        sent = {json.loads(request.content)["seed"] for request in requests}
        assert {seed, other} <= sent
        assert all(-(2**63) <= s < 2**63 for s in sent)


def test_another_reason_to_end_is_told_and_ends_the_answer():
    said = stream(chunk("The sum "), {"choices": [{"index": 0, "delta": {}, "finish_reason": "content_filter"}]})
    reply, requests = ask(said)
    assert reply.json()["choices"][0]["finish_reason"] == "content_filter"
    assert len(requests) == 1
    assert events(ask(said, stream=True)[0])[-1]["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    ("reason", "meant"),
    [("STOP", "stop"), ("end_turn", "stop"), ("FINISH_REASON_STOP", "stop"), ("eos", "stop"), ("COMPLETE", "stop"),
     ("MAX_TOKENS", "length"), ("max_tokens", "length"), ("model_length", "length"), ("SAFETY", "SAFETY")],
)  # fmt: skip
def test_reasons_to_end_under_other_names(reason, meant):
    """Gemini's, Anthropic's, Cohere's and Mistral's were told as reasons of their own, and ended the answer."""
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    assert asyncio.run(_read(stream(chunk("12"), end, COUNTED)))[-1].reason == meant


@pytest.mark.parametrize("reason", ["ERROR", "network_error"])
def test_reasons_to_end_that_are_faults(reason):
    with pytest.raises(UpstreamError, match=f"ended its answer with '{reason}'"):
        asyncio.run(_read(stream(chunk("12"), {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})))


async def _read(body: bytes) -> list[Any]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body))) as client:
        return [piece async for piece in read(await client.get("http://upstream"))]


@pytest.mark.parametrize("thought", ["Well.", [{"type": "text", "text": "Well."}]])
@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
@pytest.mark.parametrize("streamed", [True, False])
def test_parts_of_the_content_that_are_thinking(kind, thought, streamed):
    """As Anthropic's and Mistral's have them: a 502."""
    parts = [{"type": kind, kind: thought}, {"type": "text", "text": "It is "}, {"type": "output_text", "text": "12."}]
    reply, _ = ask(stream(chunk(parts), STOP, COUNTED), stream=streamed)
    deltas = [e["choices"][0]["delta"] for e in events(reply)] if streamed else [reply.json()["choices"][0]["message"]]
    assert "".join(d.get("reasoning_content") or "" for d in deltas).endswith("Well.")
    assert "".join(d.get("content") or "" for d in deltas).endswith("It is 12.")
    halves = [chunk([{"type": kind, kind: half}]) for half in ("\ud83d", "\ude42")]
    reply, _ = ask(stream(*halves, chunk("12."), STOP, COUNTED))
    assert reply.json()["choices"][0]["message"]["reasoning_content"].endswith("🙂")


def test_a_part_of_the_content_of_another_type_is_named():
    reply, _ = ask(stream(chunk([{"type": "image_url", "image_url": {"url": "x"}}]), STOP, COUNTED))
    assert reply.status_code == 502
    assert "a part of type 'image_url', which is no text" in reply.json()["error"]["message"]


def test_eval_counts_no_refusal_as_an_answer(tmp_path):
    """Every second request is refused with status 200: all are answered in the end, by asking again."""
    upstream, seen = FastAPI(), []

    @upstream.post("/v1/chat/completions")
    async def complete():
        seen.append(1)
        if len(seen) % 2:
            return JSONResponse({"error": {"message": "rate limited", "code": 429}})
        return Response(stream(chunk("\\boxed{12}"), STOP, COUNTED))

    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+{12 - i}=?", "answer": "12"}) + "\n" for i in range(4))
    )
    with serving(upstream) as url:
        arguments = ["eval", "plugin-qwen2.5-coder", "--data", str(tmp_path / "q.jsonl"), "--limit", "4", "--upstream", url,
                     "--model", "m", "--planner", "none", "--out", str(tmp_path / "o"), "--at-once", "1"]  # fmt: skip
        done = CliRunner().invoke(app, arguments)
    assert done.exception is None, done.output
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["accuracy"] == 1


# --- steps ---


def steps_of(reply: httpx.Response) -> list[str]:
    return [step["text"] for step in reply.json()["rsim"]["choices"][0]["steps"]]


def test_an_answer_ends_where_the_model_ends_it():
    """No upstream has to say at which string it stopped: the delimiter is found here."""
    texts = iter(["one\n", "three"])

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=stream(chunk(next(texts)), chunk("\ntwo"), STOP, COUNTED))

    reply, requests = ask(answer)
    assert steps_of(reply) == ["one\n\n", "three\ntwo"]
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert not any("stop" in body for body in bodies(requests))


def conversation(mode: str, answer: Any, asked: Asked) -> Any:
    client = httpx.AsyncClient(base_url="http://upstream/v1/", transport=httpx.MockTransport(answer))
    return http_upstream._HttpConversation(http_upstream.HttpUpstream(client, mode), asked)


@pytest.mark.parametrize("mode", ["prefill", "turn"])
def test_an_empty_first_prompt_sends_no_empty_message(mode):
    question = [{"role": "user", "content": [{"type": "text", "text": "5+7?"}]}]
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, content=stream(chunk("one\n\ntwo"), STOP))

    async def go() -> None:
        talk = conversation(mode, answer, Asked("m", question, None))
        for prompt in ("", "Then "):
            talk.inject(prompt)
            _ = [piece async for piece in talk.step(50, Until("\n\n"))]
        await talk.close()

    asyncio.run(go())
    assert sent[0]["messages"] == question
    assert "continue_final_message" not in sent[0]
    said = ["one\n\nThen "] if mode == "prefill" else ["one", "Then"]
    assert [message["content"] for message in sent[1]["messages"][1:]] == said


def test_in_turns_a_step_of_blank_space_leaves_no_empty_answer_and_no_two_user_messages():
    """The next strategy joins the one that got nothing."""
    sent: list[dict[str, Any]] = []
    steps = iter(("one\n", "\n", "two\n"))

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, content=stream(chunk(next(steps)), STOP))

    async def go() -> None:
        talk = conversation("turn", answer, Asked("m", QUESTION, None))
        for prompt in ("First:", "Next:", "Wait:"):
            talk.inject(prompt)
            _ = [piece async for piece in talk.step(50, Until("\n"))]
        await talk.close()

    asyncio.run(go())
    assert [(m["role"], m["content"]) for m in sent[2]["messages"][1:]] == [("assistant", "one"), ("user", "Next:\n\nWait:")]


# --- thinking ---


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("streamed", [False, True])
def test_thinking_is_passed_on_in_its_field_and_is_no_step(field, streamed):
    """It is not cut at its blank line, counts as no text, and has room of its own."""

    def answer(request: httpx.Request) -> httpx.Response:
        room = json.loads(request.content)["max_tokens"]
        thought = [chunk(None, **{field: "Hm.\n\n"})] * min(room, 300)
        if room <= 300:
            return httpx.Response(
                200, content=stream(*thought, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            )
        counted = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 302}}
        return httpx.Response(200, content=stream(*thought, chunk("\n\nIt is "), chunk("12."), STOP, counted))

    reply, requests = ask(answer, stream=streamed)
    if streamed:
        deltas = [event["choices"][0]["delta"] for event in events(reply)]
        thinking = "".join(delta.get(field, "") for delta in deltas)
        content = "".join(delta.get("content", "") for delta in deltas)
    else:
        message = reply.json()["choices"][0]["message"]
        thinking, content = message[field], message["content"]
        assert steps_of(reply) == ["It is 12."]
        assert reply.json()["usage"]["completion_tokens"] == 1 + 302, "what was thought without room is billed as well"
        assert reply.json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1 + 301}, "the blank line too"
    prompt = next(s.prompts[0] for s in SCRIPTED.strategies.strategies if s.name == "decomposition")
    assert thinking == prompt + "Hm.\n\n" * 300, "clients fold what was injected with the model's own thinking"
    assert content == "\n\nIt is 12."
    assert len(requests) == 2, "asked again with more room, once it is known to think"


def test_thinking_between_tags_stays_in_the_content_and_out_of_the_conversation():
    texts = iter(["<think>a\n\nb</think>\n\none\n\ntwo"] * 2 + ["<think>c</think>three"])
    reply, requests = ask(lambda request: httpx.Response(200, content=stream(*map(chunk, next(texts)), STOP, COUNTED)))
    assert steps_of(reply) == ["one\n\n", "three"]
    assert "<think>a\n\nb</think>\n\none" in reply.json()["choices"][0]["message"]["content"]
    assert bodies(requests)[2]["messages"][1] == {"role": "assistant", "content": "one"}


def test_a_model_whose_thinking_is_hidden_is_asked_again_with_room():
    def answer(request: httpx.Request) -> httpx.Response:
        usage = {"prompt_tokens": 7, "completion_tokens": 128, "completion_tokens_details": {"reasoning_tokens": 128}}
        if json.loads(request.content)["max_tokens"] == 128:
            return httpx.Response(200, content=stream({"choices": [{"delta": {}, "finish_reason": "length"}], "usage": usage}))
        return httpx.Response(200, content=stream(chunk("It is 12."), STOP, COUNTED))

    reply, requests = ask(answer)
    assert steps_of(reply) == ["It is 12."]
    assert [body["max_tokens"] for body in bodies(requests)] == [128, 128 + 1024]
    usage = reply.json()["usage"]
    assert [usage[kind] for kind in ("prompt_tokens", "completion_tokens")] == [7 + 7, 128 + 3]


def test_thinking_without_end_is_an_answer_that_was_cut():
    said = stream(chunk(None, reasoning="Hm. "), {"choices": [{"delta": {}, "finish_reason": "length"}]})
    reply, _ = ask(said)
    assert reply.json()["choices"][0]["finish_reason"] == "length"


def test_a_continued_answer_that_is_taken_for_thinking_is_an_error_with_its_remedy():
    said = stream(chunk(None, reasoning_content="So 12."), STOP, COUNTED)

    async def go() -> None:
        talk = conversation("prefill", lambda request: httpx.Response(200, content=said), Asked("m", QUESTION, None))
        talk.inject("Then ")
        _ = [piece async for piece in talk.step(50, Until("\n\n"))]

    with pytest.raises(UpstreamError, match="--mode turn"):
        asyncio.run(go())


# --- refusals ---


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("status", [429, 503, 400])
def test_a_refusal_keeps_its_status_also_where_a_stream_was_asked_for(status, streamed):
    headers = {"Retry-After": "77"}
    reply, requests = ask(
        lambda request: httpx.Response(status, json={"error": {"message": "no"}}, headers=headers), stream=streamed
    )
    assert (reply.status_code, reply.headers["retry-after"], reply.json()["error"]["message"]) == (status, "77", "no")
    assert len(requests) == 1, "the client may wait so long"


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_obeyed(monkeypatch, date):
    waited: list[float] = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(http_upstream.asyncio, "sleep", wait)
    after = formatdate(time.time() + 9, usegmt=True) if date else "2.5"
    answers = iter(
        [httpx.Response(429, headers={"Retry-After": after}), httpx.Response(200, content=stream(chunk("12"), STOP, COUNTED))]
    )
    client = httpx.AsyncClient(base_url="http://u/", transport=httpx.MockTransport(lambda request: next(answers)))
    asyncio.run(http_upstream.HttpUpstream(client, "turn").call("chat/completions", {}))
    assert 5 < waited[0] < 10 if date else waited == [2.5]


def test_causes_are_named(monkeypatch, no_proxies):
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@proxy.example:3128")

    def failing(error: Exception) -> Any:
        def answer(request: httpx.Request) -> httpx.Response:
            raise error

        return answer

    for cause in (ssl.SSLCertVerificationError("CERTIFICATE_VERIFY_FAILED"), "407 Proxy Authentication Required"):
        error = httpx.ProxyError(cause) if isinstance(cause, str) else httpx.ConnectError(str(cause))
        for model in (f"m{SUFFIX}", "m"):
            reply, _ = ask(failing(error), model=model)
            assert reply.status_code == 502
            told = reply.json()["error"]["message"]
            assert str(cause).split()[0] in told
            assert "through the proxy proxy.example:3128" in told
            assert "secret" not in told
    reply, _ = ask(lambda request: httpx.Response(401, json={"error": {"message": "no key"}}))
    assert reply.json()["error"]["message"] == "no key ($RSIM_UPSTREAM_API_KEY is not set)"


# --- what goes there ---


def test_fields_of_the_client_go_on_as_they_are():
    more = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "stop_token_ids": [5], "logit_bias": {},
            "presence_penalty": 0, "user": "me"}  # fmt: skip
    said = stream(chunk("12"), STOP, COUNTED)
    (body,) = bodies(ask(said, max_completion_tokens=50, tools=[], n=1, response_format={"type": "text"}, **more)[1])
    assert {key: body[key] for key in more} == more
    assert 1 <= body["max_completion_tokens"] <= 50
    assert not {"max_tokens", "tools", "n", "response_format"} & set(body)


def test_a_model_in_process_takes_neutral_values_and_refuses_others():
    config = ServeConfig(rules=PlayRules(delimiter="\n", max_steps=2, step_tokens=4, max_tokens=40, answer_tokens=8))
    lab = sequence_planner(load_strategies("lab"), ["continuation"])

    async def statuses() -> list[int]:
        application = create_app(config, lab, load_reasoner("nano-s"), name="nano-s")
        client = httpx.AsyncClient(base_url="http://rsim/v1/", transport=httpx.ASGITransport(application))
        async with application.router.lifespan_context(application), client:
            neutral = {
                "presence_penalty": 0,
                "frequency_penalty": 0.0,
                "logit_bias": {},
                "user": "me",
                "top_p": 1.0,
                "top_k": -1,
                "response_format": {"type": "text"},
            }
            given = (neutral, {"presence_penalty": 1}, {"logit_bias": {"5": 1}}, {"stop_token_ids": [1]}, {"top_k": 3})
            body = {"model": f"nano-s{SUFFIX}", "messages": QUESTION}
            return [(await client.post("chat/completions", json=body | more)).status_code for more in given]

    assert asyncio.run(statuses()) == [200, 400, 400, 400, 400]


@pytest.mark.parametrize("model", ["m", f"m{SUFFIX}"])
def test_keys_and_cookies_of_the_client_stay_here(model):
    private = {"Cookie": "s=1", "api-key": "k", "X-Api-Key": "k", "x-goog-api-key": "k", "Authorization": "Bearer k",
               "Proxy-Authorization": "k", "X-Auth-Token": "k"}  # fmt: skip
    reply, requests = ask(stream(chunk("12"), STOP, COUNTED), model=model, headers=private | {"X-Request-Id": "7"})
    assert reply.status_code == 200
    assert not set(map(str.lower, private)) & set(requests[0].headers)
    assert "x-request-id" in requests[0].headers or model != "m"


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200), ({"Origin": "http://rsim"}, 200), ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Host": "evil.example"}, 403), ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ({"Host": "[x"}, 403), ({"Origin": "http://[x"}, 403),
    ({"Host": "127.0.0.1:8017", "Origin": "http://127.0.0.1:8017"}, 200), ({"Host": "[::1]:8017"}, 200), ({"Host": "box.local"}, 200),
])  # fmt: skip
def test_a_page_of_another_site_cannot_use_a_server_without_a_key(headers, status):
    for model in ("m", f"m{SUFFIX}"):
        reply, requests = ask(stream(chunk("12"), STOP, COUNTED), headers=headers, model=model)
        assert reply.status_code == status
        assert bool(requests) == (status == 200)


def test_a_key_is_a_bearer_in_any_case_and_opens_the_server_to_any_page():
    async def statuses() -> list[int]:
        said = httpx.Response(200, content=stream(chunk("12"), STOP, COUNTED))
        async with behind_the_server(lambda request: said, SCRIPTED, api_key="secret") as client:
            found = []
            for given in ("Bearer secret", "bearer secret", "BEARER  secret", "secret", "Basic secret", ""):
                headers = {"Authorization": given, "Origin": "https://mine.example"}
                found.append(
                    (
                        await client.post("chat/completions", json={"model": "m", "messages": QUESTION}, headers=headers)
                    ).status_code
                )
            return found

    assert asyncio.run(statuses()) == [200, 200, 200, 401, 401, 401]


# --- the way there ---


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(("given", "asked"), [
    ("http://h:1", "http://h:1/v1/models"), ("http://h:1/", "http://h:1/v1/models"), ("http://h:1/v1/", "http://h:1/v1/models"),
    ("https://h/api/v1", "https://h/api/v1/models"), ("https://h/v1/chat/completions", "https://h/v1/models"),
    ("https://h/chat/completions", "https://h/models"), ("https://h/v1/models", "https://h/v1/models"),
    ("https://h/v1/responses", "https://h/v1/models"), ("https://h/v1/messages/", "https://h/v1/models"),
    ("https://h/openai/deployments/m?api-version=2024-10-21", "https://h/openai/deployments/m/models?api-version=2024-10-21"),
])  # fmt: skip
def test_addresses_are_put_right(given, asked, no_proxies):
    async def go() -> httpx.Request:
        async with upstream_client(given, "", httpx.Timeout(1)) as client:
            return client.build_request("GET", "models")

    assert str(asyncio.run(go()).url) == asked


@pytest.mark.parametrize(("key", "header"), [("k", ("authorization", "Bearer k")), ("api-key: k", ("api-key", "k"))])
def test_the_key_goes_in_the_header_that_it_names(key, header, no_proxies):
    async def go() -> httpx.Headers:
        async with upstream_client("http://h/v1", key, httpx.Timeout(1)) as client:
            return client.headers

    assert header in list(asyncio.run(go()).items())


def test_proxies_are_for_others_alone(monkeypatch, no_proxies):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example, 10.0.0.0/8")
    assert proxy_of("https://api.example/v1") == "http://proxy.example:3128"
    assert proxy_of("http://api.example/v1") == "socks5://127.0.0.1:1080"
    for here in (
        "http://127.0.0.1:8080/v1",
        "http://localhost/v1",
        "http://[::1]:80/v1",
        "http://a.inside.example/v1",
        "http://10.1.2.3/v1",
    ):
        assert proxy_of(here) == ""


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch, no_proxies, tmp_path):
    """And none is used for this machine."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    for command in (["serve", "--planner", "random"], ["eval", "nano", "--planner", "none", "--out", str(tmp_path / "o")]):
        result = CliRunner().invoke(app, [*command, "--upstream", "http://api.example/v1", "--model", "m"])
        assert isinstance(result.exception, UserError)
        assert "socks" in str(result.exception)
        assert "NO_PROXY" in str(result.exception)
    check_address("http://127.0.0.1:9/v1", "")
    monkeypatch.setenv("ALL_PROXY", "carrier-pigeon://h")
    with pytest.raises(UserError, match="carrier-pigeon"):
        check_address("http://api.example/v1", "")


@pytest.mark.parametrize(("answer", "status", "told"), [
    (httpx.Response(404, text="Not Found"), 404, "http://h/v1/models"), (httpx.Response(200, json={"data": []}), 502, "no model"),
    (httpx.Response(200, json={"models": []}), 502, "no list"), (httpx.Response(200, text="<html>"), 502, "<html>"),
    (httpx.Response(307, headers={"location": "https://there"}), 502, "https://there"),
    (httpx.Response(401, json={"error": "no key"}), 401, "RSIM_UPSTREAM_API_KEY is not set"),
])  # fmt: skip
def test_models_that_cannot_be_listed_say_why(answer, status, told):
    async def go() -> Any:
        async with httpx.AsyncClient(base_url="http://h/v1/", transport=httpx.MockTransport(lambda request: answer)) as client:
            return await first_model(client)

    with pytest.raises(UpstreamError, match=told) as failed:
        asyncio.run(go())
    assert failed.value.status == status


def test_a_call_that_is_hung_up_is_closed_and_its_tokens_are_estimated():
    closed: list[bool] = []

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                yield stream(chunk("on and\n\n"), done=False)

        async def aclose(self):
            closed.append(True)

    async def go() -> list[Any]:
        talk = conversation("turn", lambda request: httpx.Response(200, stream=Endless()), Asked("m", QUESTION, None))
        pieces = [piece async for piece in talk.step(20, Until("\n\n"))]
        await talk.close()
        return pieces

    text, end = asyncio.run(go())
    assert (text.text, end.reason, end.usage, closed) == ("on and\n\n", "delimiter", Usage(1, 1, 0, estimated=True), [True])
    assert TO_END.stops == ()


def test_a_model_that_knows_max_completion_tokens_alone_is_asked_with_it():
    """Its client had stated no limit: rsim's own was refused. The study finds what is not right."""
    assert asyncio.run(wrong(*BEHAVIOURS["max_completion_tokens alone"])) == ""
    assert "not ('5', 'stop')" in asyncio.run(wrong(BEHAVIOURS["plain"][0], ("5", "stop")))
