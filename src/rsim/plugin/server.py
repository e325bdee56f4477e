"""``rsim serve``: an OpenAI-compatible server whose answers are planned.

A model name with the suffix ``-rsim`` asks for a planned answer. The plain name, ``"rsim": false`` in the body, or a request
that planning has no part in (tools, log-probs) passes through untouched.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from rsim.errors import UserError
from rsim.planner.planner import AnyPlanner
from rsim.plugin import openai_api as api
from rsim.plugin.http_upstream import HttpUpstream, UpstreamError, probe
from rsim.plugin.local_upstream import LocalUpstream
from rsim.plugin.metrics import Metrics
from rsim.plugin.planning import Planning
from rsim.plugin.play import Asked, Event, Finished, Injected, Mode, Piece, PlayRules, StepEnd, Upstream, Usage, play
from rsim.plugin.streams import WatchedStream, cancel, client_gone
from rsim.rollout.reasoner import Reasoner

SUFFIX = "-rsim"
_HOP = {"host", "content-length", "connection", "authorization", "transfer-encoding", "keep-alive", "accept-encoding"}
_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_ANSWERED = ("content-type", "retry-after", "x-request-id")
log = logging.getLogger("rsim.serve")


@dataclass(frozen=True)
class ServeConfig:
    """``upstream`` is the base URL of an OpenAI-compatible server, up to and with ``/v1``; "": a model is in this process."""

    upstream: str = ""
    upstream_key: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)
    model: str = ""  # the upstream's model to probe with; "": the first that it lists
    mode: Mode | None = None  # None: probed
    rules: PlayRules = field(default_factory=PlayRules)
    slots: int = 64  # answers played at once
    waiting: int = 64  # requests that may wait for a slot; more are refused with 429
    request_seconds: float = 600.0
    body_bytes: int = 10 * 2**20
    body_seconds: float = 30.0
    upstream_seconds: float = 120.0  # without a byte from the upstream


@dataclass
class _State:
    """What the requests of one server share."""

    config: ServeConfig
    planning: Planning
    upstream: Upstream | None  # None: not probed yet
    client: httpx.AsyncClient | None
    metrics: Metrics
    slots: asyncio.Semaphore
    local_model: str = ""
    active: int = 0
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Refusal(Exception):
    """A request that is answered with an error object."""

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, retry_after: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, api.error_object(message, kind, param)
        self.headers = {"Retry-After": retry_after} if retry_after else {}


def create_app(config: ServeConfig, planner: AnyPlanner, reasoner: Reasoner | None = None, *, name: str = "local") -> FastAPI:
    """The server as an ASGI app.

    Args:
        reasoner: the model in this process; None: ``config.upstream`` is asked.
        name: of that model, in requests.
    """
    if (reasoner is None) == (not config.upstream):
        raise UserError("give an upstream or a model", "one of --upstream and --model")
    app = FastAPI(title="rsim", lifespan=_lifespan(config, planner, reasoner, name), docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, lambda request, error: JSONResponse(error.body, error.status, error.headers))
    routes: dict[str, tuple[str, Callable[..., Any]]] = {
        "/v1/chat/completions": ("POST", partial(_complete, kind="chat")),
        "/v1/completions": ("POST", partial(_complete, kind="completion")),
        "/v1/models": ("GET", _models),
        "/healthz": ("GET", _health),
        "/metrics": ("GET", _metrics),
        "/": ("GET", _playground),
    }
    for path, (method, handler) in routes.items():
        app.router.add_route(path, handler, methods=[method])
    return app


def _lifespan(
    config: ServeConfig, planner: AnyPlanner, reasoner: Reasoner | None, name: str
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        planning = Planning(planner, config.slots)
        worker = asyncio.create_task(planning.run())
        metrics, slots = Metrics(CollectorRegistry()), asyncio.Semaphore(config.slots)
        if reasoner is not None:
            local = LocalUpstream(reasoner, config.slots)
            app.state.rsim = _State(config, planning, local, None, metrics, slots, local_model=name)
            try:
                yield
            finally:
                worker.cancel()
                await asyncio.to_thread(local.close)
            return
        timeout = httpx.Timeout(config.upstream_seconds, connect=10.0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * config.slots)
        headers = {"Authorization": f"Bearer {config.upstream_key}"} if config.upstream_key else {}
        base = config.upstream.rstrip("/") + "/"
        async with httpx.AsyncClient(base_url=base, timeout=timeout, limits=limits, headers=headers) as client:
            app.state.rsim = state = _State(config, planning, None, client, metrics, slots)
            with suppress(UpstreamError, httpx.HTTPError):  # it may come up later; every request asks again until then
                await _upstream(state, "")
            yield
        worker.cancel()

    return lifespan


async def _upstream(state: _State, model: str) -> Upstream:
    """The upstream with its mode: as configured, or probed by the first request that finds it alive."""
    if state.upstream is None:
        async with state.probing:
            if state.upstream is None:
                assert state.client is not None
                mode = state.config.mode or await probe(state.client, model or state.config.model or await _first_model(state))
                log.info("injection mode: %s", mode)
                state.upstream = HttpUpstream(state.client, mode)
    return state.upstream


async def _first_model(state: _State) -> str:
    listed = await _upstream_models(state)
    if not listed:
        raise UpstreamError(502, {"message": "the upstream lists no model", "type": "upstream_error"})
    return str(listed[0]["id"])


async def _upstream_models(state: _State) -> list[dict[str, Any]]:
    assert state.client is not None
    try:
        response = await state.client.get("models")
        response.raise_for_status()
        return list(response.json().get("data", []))
    except (httpx.HTTPError, ValueError) as error:
        problem = {"message": f"the upstream's models cannot be listed ({type(error).__name__})", "type": "upstream_error"}
        raise UpstreamError(502, problem) from error


# --- a request ---


async def _complete(request: Request, kind: api.Kind) -> Response:
    state: _State = request.app.state.rsim
    _authorise(request, state.config.api_key)
    raw = await _read_body(request, state.config)
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Refusal(400, "the body is not valid JSON", "invalid_request_error") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_request_error")
    named = str(body.get("model") or "")
    planned = named.endswith(SUFFIX) and body.get("rsim", True) is not False and not api.passes_through(body)
    if not planned and state.client is not None:
        return await _pass_through(state, request, kind, raw, body, named)
    _enter(state)
    try:
        reply = await _answer(state, request, kind, body, named.removesuffix(SUFFIX), planned=planned)
    except BaseException:
        _leave(state)
        raise
    return reply


def _enter(state: _State) -> None:
    if state.active >= state.config.slots + state.config.waiting:
        state.metrics.refused.inc()
        raise Refusal(429, "too many requests at once", "rate_limit_error", retry_after="1")
    state.active += 1
    state.metrics.active.set(state.active)


def _leave(state: _State) -> None:
    state.active -= 1
    state.metrics.active.set(state.active)


async def _answer(
    state: _State, request: Request, kind: api.Kind, body: dict[str, Any], model: str, *, planned: bool
) -> Response:  # fmt: skip
    """A response whose answers are played; calls `_leave` when it is over."""
    began = time.perf_counter()
    deadline = asyncio.get_running_loop().time() + state.config.request_seconds
    try:
        wanted = api.read_request(kind, body, state.local_model or model, state.config.rules.max_tokens)
        upstream = await _upstream(state, model)
    except api.BadRequest as error:
        raise Refusal(400, str(error), "invalid_request_error", param=error.param) from error
    except UpstreamError as error:
        raise _from_upstream(error) from error
    mode = upstream.mode if planned else None
    headers = {"X-Rsim-Mode": mode} if mode else {}
    plays = [_play(state, upstream, asked, wanted, planned=planned) for asked in wanted.asked]
    merged = _merge(plays, deadline)
    if wanted.stream:
        first = await _first(merged)  # decides between a stream and an error object
        outcome = _Outcome()

        def done() -> None:
            _leave(state)
            state.metrics.done(kind, planned=planned, status=outcome.status, seconds=time.perf_counter() - began)

        return WatchedStream(_chunks(wanted, merged, first, outcome), 200, headers | _EVENTS, done)
    choices = [api.Choice() for _ in wanted.asked]

    async def collect() -> None:
        async with aclosing(merged):
            async for index, event in merged:
                choices[index].add(event)

    await _unless_gone(request, collect())
    _leave(state)
    state.metrics.done(kind, planned=planned, status=200, seconds=time.perf_counter() - began)
    used = [step["strategy"] for step in choices[0].steps]
    shown = {"X-Rsim-Strategies": ",".join(used)} if planned else {}
    return JSONResponse(api.whole(wanted, choices, mode), headers=headers | shown)


async def _first(stream: AsyncGenerator[tuple[int, Event]]) -> tuple[int, Event]:
    try:
        return await anext(stream)
    except UpstreamError as error:
        raise _from_upstream(error) from error
    except UserError as error:
        raise Refusal(400, str(error), "invalid_request_error") from error
    except TimeoutError as error:
        raise Refusal(504, "the request took too long", "timeout") from error


async def _unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Waits for ``work``, and cancels it when the client goes away."""

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(client_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client went away", "client_disconnected")
        await task
    except UpstreamError as error:
        raise _from_upstream(error) from error
    except UserError as error:
        raise Refusal(400, str(error), "invalid_request_error") from error
    except TimeoutError as error:
        raise Refusal(504, "the request took too long", "timeout") from error
    finally:
        await cancel(task, watch)


@dataclass
class _Outcome:
    """How a streamed answer ended; for the metrics."""

    status: int = 200


async def _chunks(
    wanted: api.Request, events: AsyncGenerator[tuple[int, Event]], first: tuple[int, Event], outcome: _Outcome
) -> AsyncGenerator[bytes]:
    """A stream's chunks. An error after the first event ends it with an error object, which OpenAI's clients raise."""
    seen: set[int] = set()
    usages: list[Usage] = []
    event: tuple[int, Event] | None = first
    async with aclosing(events):
        try:
            while event is not None:
                index, what = event
                yield _data(api.chunk(wanted, index, what, first=index not in seen))
                seen.add(index)
                if isinstance(what, Finished):
                    usages.append(what.usage)
                event = await anext(events, None)
        except UpstreamError as error:
            outcome.status = error.status
            yield _data({"error": error.error})
            return
        except TimeoutError:
            outcome.status = 504
            yield _data(api.error_object("the request took too long", "timeout"))
            return
    if wanted.include_usage:
        yield _data(api.usage_chunk(wanted, usages))
    yield b"data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def _play(
    state: _State, upstream: Upstream, asked: Asked, wanted: api.Request, *, planned: bool
) -> AsyncGenerator[Event]:  # fmt: skip
    """One answer, cut at the client's stop strings."""
    async with state.slots:
        if planned:
            source = play(asked, state.planning, upstream, state.config.rules, wanted.limit)
        else:
            source = _plain(upstream, asked, wanted.limit)
        async with aclosing(api.Stops(wanted.stops).cut(source)) as events:
            async for event in events:
                if isinstance(event, Injected):
                    state.metrics.steps.labels(event.strategy).inc()
                elif isinstance(event, Finished):
                    state.metrics.spent(event.usage)
                yield event


async def _plain(upstream: Upstream, asked: Asked, limit: int) -> AsyncGenerator[Event]:
    """An answer of the model in this process without a planner."""
    conversation = await upstream.open(asked)
    try:
        async for piece in conversation.step("", limit, None):
            if isinstance(piece, StepEnd):
                yield Finished("length" if piece.reason == "limit" else "stop", piece.usage)
            else:
                yield Piece(piece)
    finally:
        await conversation.close()


async def _merge(
    plays: list[AsyncGenerator[Event]], deadline: float
) -> AsyncGenerator[tuple[int, Event]]:  # fmt: skip
    """The events of all choices as they come, until ``deadline``."""
    events: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def run(index: int, source: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(source):
                async for event in source:
                    events.put_nowait((index, event))
            events.put_nowait((index, None))
        except Exception as error:
            events.put_nowait((index, error))

    tasks = [asyncio.create_task(run(i, source)) for i, source in enumerate(plays)]
    open_plays = len(tasks)
    try:
        while open_plays:
            async with asyncio.timeout_at(deadline):
                index, event = await events.get()
            if event is None:
                open_plays -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- without a planner ---


async def _pass_through(
    state: _State, request: Request, kind: api.Kind, raw: bytes, body: dict[str, Any], named: str
) -> Response:  # fmt: skip
    """Sends the request on and the answer back, byte for byte; only a suffix and the field ``rsim`` are taken off."""
    began = time.perf_counter()
    assert state.client is not None
    if named.endswith(SUFFIX) or "rsim" in body:
        body = {k: v for k, v in body.items() if k != "rsim"} | {"model": named.removesuffix(SUFFIX)}
        raw = json.dumps(body).encode()
    headers = {k: v for k, v in request.headers.items() if k not in _HOP}
    path = "chat/completions" if kind == "chat" else "completions"
    try:
        sent = state.client.build_request("POST", path, content=raw, headers=headers)
        response = await state.client.send(sent, stream=True)
    except httpx.TimeoutException as error:
        raise Refusal(504, "the upstream did not answer in time", "timeout") from error
    except httpx.TransportError as error:
        raise Refusal(502, "the upstream cannot be reached", "connection_error") from error
    kept = {k: response.headers[k] for k in _ANSWERED if k in response.headers}
    state.metrics.done(kind, planned=False, status=response.status_code, seconds=time.perf_counter() - began)
    if "event-stream" not in response.headers.get("content-type", ""):
        content = await response.aread()
        await response.aclose()
        return Response(content, response.status_code, kept)

    async def stream() -> AsyncGenerator[bytes]:
        try:
            async for part in response.aiter_raw():
                yield part
        except httpx.HTTPError:
            yield _data(api.error_object("the connection to the upstream broke", "connection_error"))
        finally:
            await response.aclose()

    return WatchedStream(stream(), response.status_code, kept)


# --- the small routes ---


async def _models(request: Request) -> Response:
    state: _State = request.app.state.rsim
    _authorise(request, state.config.api_key)
    if state.client is None:
        listed = [{"id": state.local_model, "object": "model", "created": 0, "owned_by": "rsim"}]
    else:
        try:
            listed = await _upstream_models(state)
        except UpstreamError as error:
            raise _from_upstream(error) from error
    planned = [m | {"id": f"{m['id']}{SUFFIX}", "owned_by": "rsim"} for m in listed]
    return JSONResponse({"object": "list", "data": [*planned, *listed]})


async def _health(request: Request) -> Response:
    state: _State = request.app.state.rsim
    mode = state.upstream.mode if state.upstream else None
    return JSONResponse({
        "status": "ok" if mode else "upstream not reached yet",
        "mode": mode,
        "approximate": mode != "exact",
        "strategies": list(state.planning.strategies.names),
        "gate": state.config.rules.gate,
        "active": state.active,
    })  # fmt: skip


async def _metrics(request: Request) -> Response:
    state: _State = request.app.state.rsim
    state.metrics.planner_seconds.set(state.planning.seconds)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _playground(request: Request) -> Response:
    return FileResponse(Path(__file__).with_name("playground.html"), media_type="text/html")


def _authorise(request: Request, key: str) -> None:
    """Compares in constant time; without a key the server is open (to 127.0.0.1 by default)."""
    if not key:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, "wrong or missing API key", "authentication_error")


async def _read_body(request: Request, config: ServeConfig) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > config.body_bytes:
                    raise Refusal(413, f"the body exceeds {config.body_bytes} bytes", "invalid_request_error")
                parts.append(part)
    except TimeoutError as error:
        raise Refusal(408, "the body did not arrive in time", "timeout") from error
    return b"".join(parts)


def _from_upstream(error: UpstreamError) -> Refusal:
    refusal = Refusal(error.status, error.error.get("message", ""), "upstream_error", retry_after=error.retry_after)
    refusal.body = {"error": {"param": None, "code": None} | error.error}
    return refusal
