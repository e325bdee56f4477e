"""What those who run a server count on: one request is one request's fault, memory comes back, nobody waits for another's bulk."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack

import httpx
import psutil
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from typer.testing import CliRunner

from rsim.cli.main import app as commands
from rsim.cli.serve import _listen, _log_as
from rsim.engine.cache import SlotCache
from rsim.engine.native import NativeEngine
from rsim.engine.sampling import StringStop, choose
from rsim.errors import UserError
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving import tracing
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, StepEnd, Until
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving

RULES = PlayRules(delimiter="\n", max_steps=2, step_tokens=8, max_tokens=40, answer_tokens=8)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PLANNER = sequence_planner(load_strategies("lab"), ["continuation", "termination"])


@pytest.fixture(scope="module")
def nano():
    return load_reasoner("nano-s", device="cpu")


def tokens_of(engine: NativeEngine, slots: dict[int, str], reasoner, more: dict | None = None) -> dict[int, list[int]]:
    """Greedy steps of 12 tokens, all together."""
    for slot, text in slots.items():
        engine.start([slot], [reasoner.prompt_ids(text)], [text])
        engine.submit(slot, [], 12, None, (more or {}).get(slot))
    found: dict[int, list[int]] = {}
    while engine.running:
        try:
            found |= {step.slot: step.tokens for step in engine.advance()}
        except FloatingPointError:
            for slot in list(engine.steps):
                try:
                    found |= {step.slot: step.tokens for step in engine.advance([slot])}
                except FloatingPointError:
                    engine.cancel(slot)
    return found


def engine_of(reasoner, **more) -> NativeEngine:
    return NativeEngine(reasoner, 3, seed=0, temperature=0.0, max_tokens=200, longest_prompt=0, **more)


def test_a_sequence_without_numbers_fails_alone_and_leaves_nothing_behind(nano):
    """It was "index out of bounds" for everybody."""
    asked = {0: "7=?", 1: "4*17+38=?", 2: "12-5=?"}
    alone = tokens_of(engine_of(nano), asked, nano)
    engine = engine_of(nano)
    broken = lambda logits, tokens: logits * float("nan") if len(tokens) == 3 else logits  # noqa: E731
    with_it = tokens_of(engine, asked, nano, {1: broken})
    assert with_it == {slot: alone[slot] for slot in (0, 2)}
    for slot in asked:
        engine.release(slot)
    assert tokens_of(engine, asked, nano) == alone


def test_scores_that_are_no_numbers_choose_a_token_all_the_same():
    index, logprob = choose(torch.tensor([[float("nan")] * 300, [0.0] * 300]), 1.0, torch.tensor([0.5, 0.5]))
    assert 0 <= int(index[0]) < 300
    assert torch.isnan(logprob).tolist() == [True, False]


async def said(upstream: LocalUpstream, text: str, until: Until) -> str:
    conversation = await upstream.open(Asked("m", None, text, {"temperature": 0}))
    try:
        return "".join([p.text async for p in conversation.step(12, until) if not isinstance(p, StepEnd)])
    finally:
        await conversation.close()


def test_an_answer_that_fails_fails_alone(nano, monkeypatch):
    ended = StringStop.ended
    monkeypatch.setattr(StringStop, "ended", lambda stop, tokens: ended(stop, tokens) if stop.strings != ("boom",) else 1 / 0)

    async def both(*untils: Until) -> list[object]:
        upstream = LocalUpstream(nano, 4)
        try:
            work = [said(upstream, text, until) for text, until in zip(("7=?", "4*17+38=?", "12-5=?"), untils, strict=False)]
            return await asyncio.gather(*work, return_exceptions=True)
        finally:
            upstream.close()

    fine = asyncio.run(both(Until(), Until(), Until()))
    mixed = asyncio.run(both(Until(), Until(strings=("boom",)), Until()))
    assert isinstance(mixed[1], ZeroDivisionError)
    assert (mixed[0], mixed[2]) == (fine[0], fine[2])


def test_a_question_that_the_planner_fails_on_fails_alone(monkeypatch, caplog):
    async def two() -> list[object]:
        batcher = PlannerBatcher(PLANNER, 2)
        start = batcher.session.start

        def started(slots, questions, openings=None):
            assert "boom" not in questions
            start(slots, questions, openings)

        monkeypatch.setattr(batcher.session, "start", started)
        worker = asyncio.create_task(batcher.run())
        answers = [await batcher.open(question) for question in ("7=?", "boom")]
        decided = await asyncio.gather(*(a.decide() for a in answers), return_exceptions=True)
        worker.cancel()
        return decided

    fine, broken = asyncio.run(two())
    assert isinstance(broken, AssertionError)
    assert fine.probabilities
    assert "2 decisions together failed" in caplog.text, "an operator is told"


def test_a_long_sequence_takes_its_own_memory_and_gives_it_back():
    """64 slots for one prompt of 3,000 tokens took 64 times as much, for ever."""
    cache, held = SlotCache(64, 256, torch.float32, torch.device("cpu")), psutil.Process().memory_info
    before, one = held().rss, 4 * 3000 * 64 * 4 * 2  # bytes of the sequence's keys and values
    cache.make_room(3000)
    rows = torch.ones(4, 3000, 64)
    keys, _ = cache.write(0, torch.full((3000,), 5), torch.arange(3000), rows, rows)
    cache.lengths[5] = 3000
    assert one / 2 < held().rss - before < 3 * one + rows.nbytes
    cache.make_room(5000)
    assert torch.equal(cache.keys[0][5, :, :3000], rows)
    del rows, keys
    full = held().rss
    cache.release(5)
    assert full - held().rss > 0.8 * one
    assert cache.capacity >= 5000
    assert not cache.keys[0][5, :, 100:2900].any()


def test_long_prompts_are_read_piece_by_piece_with_the_same_result(nano):
    asked = {0: "7=?", 1: "4*17+38=? " * 12, 2: "12-5=?"}
    assert tokens_of(engine_of(nano, chunk=16), asked, nano) == tokens_of(engine_of(nano), asked, nano)


@pytest.fixture(scope="module")
def local(nano):
    with serving(create_app(ServeConfig(rules=RULES, slots=4), PLANNER, nano, name="nano-s")) as url:
        yield url


@pytest.mark.parametrize("model", ["nano-s", f"nano-s{SUFFIX}"])
def test_a_question_beyond_any_context_is_refused_at_once(local, model):
    """9 MB took 35 s to tokenise, and everybody waited."""
    body = {"model": model, "messages": [{"role": "user", "content": "1+1=? " * 1_500_000}]}
    began = time.process_time()
    reply = httpx.post(f"{local}/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "exceeds the model's context" in reply.json()["error"]["message"]
    assert time.process_time() - began < 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_that_is_refused_is_not_kept(local, stream):
    """The error's traceback held it, 9 MB or not, until Python looked for rings of objects: memory grew and grew."""
    gc.collect()
    gc.disable()
    try:
        long = {"messages": [{"role": "user", "content": "1+1=? " * 100_000}]}
        assert chat(local, stream, more=long).status_code == 400
        deadline = time.monotonic() + 30
        while any(type(o) is Asked for o in gc.get_objects()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(type(o) is Asked for o in gc.get_objects())
    finally:
        gc.enable()


def test_nobody_waits_while_a_question_is_tokenised(nano, monkeypatch):
    monkeypatch.setattr(LocalUpstream, "_prompt", lambda upstream, asked: time.sleep(0.5) or [5, 6, 7])

    async def ticks() -> int:
        upstream, count = LocalUpstream(nano, 1), 0
        opening = asyncio.create_task(upstream.open(Asked("m", None, "7=?")))
        while not opening.done():
            await asyncio.sleep(0.01)
            count += 1
        upstream.close()
        return count

    assert asyncio.run(ticks()) > 5


def chat(url: str, stream: bool = False, **more: object) -> httpx.Response:
    body = {"model": f"nano-s{SUFFIX}", "messages": [{"role": "user", "content": "7=?"}], "temperature": 0, "stream": stream}
    body |= more.pop("more", {})
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60, **more)


def test_streams_are_finished_before_the_server_ends(nano):
    with ExitStack() as stack:
        url = stack.enter_context(serving(create_app(ServeConfig(rules=RULES, slots=1), PLANNER, nano, name="nano-s")))
        body = {"model": f"nano-s{SUFFIX}", "messages": [{"role": "user", "content": "7=?"}], "stream": True}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            ending = threading.Thread(target=stack.close)
            ending.start()
            assert [*lines][-2:] == ["data: [DONE]", ""]
        ending.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_first_token_may_take_only_so_long(nano, monkeypatch, stream):
    monkeypatch.setattr(LocalUpstream, "begin", lambda *whatever: None)
    config = ServeConfig(rules=RULES, slots=1, first_token_seconds=0.1)
    with serving(create_app(config, PLANNER, nano, name="nano-s")) as url:
        for _ in range(2):  # its slot is free again
            reply = chat(url, stream)
            assert (reply.status_code, reply.json()["error"]["message"]) == (504, "no token within 0.1 seconds")


@pytest.mark.parametrize(("stream", "status"), [(False, 200), (True, 504)])
def test_an_upstream_may_think_as_long_as_the_request_over_what_is_no_stream(stream, status):
    """Whole answers that took more than two minutes were cut off with 504."""
    upstream = FastAPI()

    async def late() -> JSONResponse:
        await asyncio.sleep(0.6)
        return JSONResponse({"choices": []})

    upstream.add_api_route("/v1/chat/completions", late, methods=["POST"])
    with serving(upstream) as there:
        config = ServeConfig(upstream=there, mode="turn", upstream_seconds=0.3)
        with serving(create_app(config, PLANNER)) as url:
            reply = httpx.post(f"{url}/chat/completions", json={"model": "m", "messages": [], "stream": stream}, timeout=60)
    assert reply.status_code == status


def test_logs_are_lines_of_json(local, capsys):
    _log_as("json")
    try:
        chat(local, headers={"traceparent": TRACE})
        logging.getLogger("rsim.serve").error("it failed", exc_info=ValueError("so"))
    finally:
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
        logging.getLogger("rsim.serve").setLevel(logging.NOTSET)
    ended, failed = (json.loads(line) for line in capsys.readouterr().err.splitlines() if '"rsim.serve"' in line)
    assert (ended["kind"], ended["planned"], ended["status"], ended["traceparent"]) == ("chat", True, 200, TRACE)
    assert failed["level"] == "ERROR"
    assert "ValueError: so" in failed["exception"]
    with pytest.raises(UserError, match="--log-format xml"):
        _log_as("xml")


def test_the_published_schema_is_of_what_is_served(local):
    base = local.removesuffix("/v1")
    document = httpx.get(f"{base}/openapi.json").json()
    app = create_app(ServeConfig(upstream="http://x"), PLANNER)
    served = {route.path.replace(":path", "") for route in app.routes if not route.path.startswith("/page")} - {
        "/",
        "/openapi.json",
    }
    assert set(document["paths"]) == served
    schemas, text = document["components"]["schemas"], json.dumps(document)
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) == set(schemas)
    answer, fields = chat(local).json(), schemas["ChatAnswer"]["properties"]
    assert set(answer) == set(fields)
    assert set(answer["choices"][0]) == set(fields["choices"]["items"]["properties"])
    assert set(answer["rsim"]["choices"][0]["steps"][0]) == set(schemas["Step"]["properties"])


def upstream_of(seen: list[str | None]) -> FastAPI:
    """A chat server that notes each call's trace and ends its turn after a word."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        seen.append(request.headers.get("traceparent"))
        chunk = {
            "choices": [{"index": 0, "delta": {"content": "yes\n"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2},
        }
        return Response(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")

    return app


@pytest.mark.parametrize("planned", [False, True])
def test_a_trace_goes_on_to_the_upstream(planned):
    seen: list[str | None] = []
    model = f"m{SUFFIX}" if planned else "m"
    with (
        serving(upstream_of(seen)) as behind,
        serving(create_app(ServeConfig(upstream=behind, mode="turn", rules=RULES), PLANNER)) as url,
    ):
        body = {"model": model, "messages": [{"role": "user", "content": "7=?"}], "stream": True}
        httpx.post(f"{url}/chat/completions", json=body, headers={"traceparent": TRACE}, timeout=60).raise_for_status()
    assert seen
    assert all(trace and trace.split("-")[1] == TRACE.split("-")[1] for trace in seen)


def test_spans_of_request_decision_and_step(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    seen: list[str | None] = []
    with (
        serving(upstream_of(seen)) as behind,
        serving(create_app(ServeConfig(upstream=behind, mode="turn", rules=RULES), PLANNER)) as url,
    ):
        body = {"model": f"m{SUFFIX}", "messages": [{"role": "user", "content": "7=?"}]}
        httpx.post(f"{url}/chat/completions", json=body, headers={"traceparent": TRACE}, timeout=60).raise_for_status()
    made = {span.name: span for span in spans.get_finished_spans()}
    assert set(made) == {f"chat m{SUFFIX}", "rsim.decision", "chat m"}
    request, step = made[f"chat m{SUFFIX}"], made["chat m"]
    assert format(request.context.trace_id, "032x") == TRACE.split("-")[1]
    assert format(request.parent.span_id, "016x") == TRACE.split("-")[2]
    assert {made[name].parent.span_id for name in ("rsim.decision", "chat m")} == {request.context.span_id}
    assert request.attributes["http.response.status_code"] == 200
    assert step.attributes["gen_ai.usage.output_tokens"] == 1
    assert format(step.context.span_id, "016x") in {trace and trace.split("-")[2] for trace in seen}


def test_metrics_are_behind_the_key_if_wanted():
    for guarded, status in ((True, 401), (False, 200)):
        config = ServeConfig(upstream="http://127.0.0.1:9", mode="turn", api_key="k", guard_metrics=guarded)
        with serving(create_app(config, PLANNER)) as url:
            metrics = url.replace("/v1", "/metrics")
            assert httpx.get(metrics).status_code == status
            assert httpx.get(metrics, headers={"authorization": "bearer k"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": {"function": 1}}]}),
        ("chat/completions", {"tools": [{"function": {"name": "f"}}], "tool_choice": {"function": "f"}}),
        ("messages", {"max_tokens": 9, "tools": [{"name": "f"}], "tool_choice": {"type": ["auto"], "name": "g"}}),
    ],
)
def test_what_fuzzing_found_is_the_clients_to_put_right(local, path, body):
    reply = httpx.post(f"{local}/{path}", json={"messages": [{"role": "user", "content": "7=?"}]} | body, timeout=60)
    assert reply.status_code == 400


def test_an_empty_answer_of_an_earlier_turn_is_read(local):
    turns = [{"role": "user", "content": "7=?"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "So?"}]
    assert httpx.post(f"{local}/chat/completions", json={"messages": turns, "max_tokens": 9}, timeout=60).status_code == 200


def test_an_effort_of_no_kind_is_none(local):
    assert chat(local, more={"reasoning_effort": ["high"]}).status_code in (200, 400)


@pytest.mark.parametrize("option", ["--request-seconds", "--first-token-seconds"])
def test_seconds_without_end_are_refused_before_anything_is_loaded(option):
    refused = CliRunner().invoke(commands, ["serve", "--planner", "no/folder", "--model", "no/model", option, "inf"])
    assert isinstance(refused.exception, UserError)
    assert option in str(refused.exception)


def test_spans_without_an_exporter_are_an_error_with_its_remedy(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"pip install 'rsim-rl\[otel\]'"):
        tracing.export()


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_counted_and_no_fault(local, caplog):
    url = httpx.URL(local)
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    counted, deadline = 'rsim_requests_total{kind="chat",planned="false",status="499"}', time.monotonic() + 10
    while counted not in (shown := httpx.get(local.replace("/v1", "/metrics")).text):
        assert time.monotonic() < deadline, shown
    assert "Traceback" not in caplog.text


def test_every_refusal_is_counted_logged_and_the_end_of_its_span(nano, caplog, monkeypatch):
    caplog.set_level("INFO", "rsim.serve")
    ended: list[dict[str, int]] = []
    monkeypatch.setattr(tracing, "begin", lambda *told: ended.append)
    config = ServeConfig(rules=RULES, slots=1, waiting=-1, api_key="k", body_bytes=200)  # too many at once from the first
    good = {"messages": [{"role": "user", "content": "7=?"}]}
    asked = {401: good, 413: good | {"user": "x" * 300}, 404: good | {"model": "other"}, 400: good | {"echo": True}, 429: good}
    with serving(create_app(config, PLANNER, nano, name="nano-s")) as url:
        for status, body in asked.items():
            headers = {"authorization": "Bearer k" if status != 401 else "no"}
            assert httpx.post(f"{url}/chat/completions", json=body, headers=headers).status_code == status
        shown = httpx.get(url.replace("/v1", "/metrics")).text
    for status in asked:
        assert f'rsim_requests_total{{kind="chat",planned="false",status="{status}"}} 1.0' in shown
    assert [r.told["status"] for r in caplog.records if hasattr(r, "told")] == list(asked)
    assert [told["http.response.status_code"] for told in ended] == [404, 400, 429]


def test_what_the_server_says_is_sent_at_once():
    """A body waited 40 ms for the receipt of its header: asyncio turns that off only for sockets whose protocol is named."""
    delays = []

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delays.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def called() -> None:
        listening = _listen("127.0.0.1", 0)
        async with await asyncio.start_server(met, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(called())
    assert delays == [1]


def test_who_reads_the_address_can_ask_at_once(monkeypatch):
    """The address was shown before anybody listened there."""
    reached = []

    def run(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        with socket.create_connection(sockets[0].getsockname(), timeout=5):
            reached.append(True)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    asked = ["serve", "--planner", "random", "--upstream", "http://127.0.0.1:9/v1", "--port", "0"]
    result = CliRunner().invoke(commands, asked)
    assert (result.exit_code, reached) == (0, [True]), result.output
