"""``rsim serve``: an OpenAI-compatible server whose answers are planned.

A model name with the suffix ``-rsim`` asks for a planned answer. The plain name, ``"rsim": false`` in the body, or a request
that planning has no part in (an upstream's tools, log-probs) passes through untouched.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import ClientDisconnect

from rsim.errors import UserError
from rsim.game.tools import Runner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner
from rsim.rewards.programs import allowed
from rsim.serving import openai_api as api
from rsim.serving import openapi, tracing
from rsim.serving.answers import answer, own_headers
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.messages_api import MESSAGES
from rsim.serving.metrics import Metrics
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked
from rsim.serving.responses_api import RESPONSES
from rsim.serving.said import UpstreamError
from rsim.serving.state import Refusal, ServeConfig, State, begun, enter, finished, from_upstream, leave, log, upstream_of
from rsim.serving.streams import ClientGone, WatchedStream, unless_gone
from rsim.serving.upstream_client import list_models, own_name, unanswered, upstream_client
from rsim.serving.wire import CHAT, COMPLETION, failure

SUFFIX = "-rsim"
WIRES = {"chat/completions": CHAT, "completions": COMPLETION, "responses": RESPONSES, "messages": MESSAGES}
_PRIVATE = (b"auth", b"cookie", b"key", b"token", b"secret")  # in a header's name: it is the client's and this server's alone
_PAGE = Path(__file__).with_name("page")
# The page loads and runs nothing but its own files, and talks to nobody but this server.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ANSWERED = ("content-type", "retry-after", "x-request-id")


def create_app(config: ServeConfig, planner: AnyPlanner, reasoner: Reasoner | None = None, *, name: str = "local") -> FastAPI:
    """The server as an ASGI app.

    Args:
        reasoner: the model in this process; None: ``config.upstream`` is asked.
        name: of that model, in requests.
    """
    if (reasoner is None) == (not config.upstream):
        raise UserError("give an upstream or a model", "one of --upstream and --model")
    runner = allowed(planner, config.tools)
    app = FastAPI(
        title="rsim",
        lifespan=_lifespan(config, planner, reasoner, name, runner),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(Exception, _broken)
    routes: dict[str, tuple[str, Callable[..., Any]]] = {
        **{f"/v1/{path}": ("POST", partial(_complete, path=path)) for path in WIRES},
        **{f"/{path}": ("POST", partial(_tokens, path=path)) for path in ("tokenize", "detokenize")},
        "/v1/models": ("GET", _models),
        "/v1/models/{name:path}": ("GET", _model),
        "/healthz": ("GET", _health),
        "/openapi.json": ("GET", _openapi),
        "/metrics": ("GET", _metrics),
        "/": ("GET", _playground),
    }
    for path, (method, handler) in routes.items():
        app.router.add_route(path, handler, methods=[method])
    app.mount("/page", StaticFiles(directory=_PAGE))
    return app


def _lifespan(
    config: ServeConfig, planner: AnyPlanner, reasoner: Reasoner | None, name: str, runner: Runner | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        planning = PlannerBatcher(planner, config.slots)
        worker = asyncio.create_task(planning.run())
        metrics, slots = Metrics(CollectorRegistry()), asyncio.Semaphore(config.slots)
        local = LocalUpstream(reasoner, config.slots, config.rules.day) if reasoner is not None else None
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(_client(config)) if local is None else None
            app.state.rsim = state = State(
                config, planning, local, client, metrics, runner, slots, local_model=name if local else ""
            )
            if not config.wrapped:
                try:
                    await upstream_of(state, "")
                except UpstreamError as error:  # it may come up later: every planned request asks again until then
                    log.warning("the upstream is not ready: %s", error)
            try:
                yield
            finally:
                worker.cancel()
                if local is not None:
                    await asyncio.to_thread(local.close)

    return lifespan


def _client(config: ServeConfig) -> httpx.AsyncClient:
    """Of the upstream; as many connections as there are requests."""
    timeout = httpx.Timeout(config.upstream_seconds, connect=10.0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * config.slots)
    return upstream_client(config.upstream, config.upstream_key, timeout, limits)


# --- a request ---


async def _complete(request: Request, path: str) -> Response:
    """Whatever becomes of a request, it is told to the metrics and the log."""
    state: State = request.app.state.rsim
    begun(request, WIRES[path].kind)
    streams, status = False, 500
    try:
        reply = await _reply(state, request, path)
        streams, status = isinstance(reply, WatchedStream), reply.status_code
        return reply
    except Refusal as refusal:
        status = refusal.status
        raise
    finally:
        if not streams:  # a stream tells when it is over
            finished(state, request, status)


async def _reply(state: State, request: Request, path: str) -> Response:
    _authorise(request, state.config.api_key)
    raw = await _read_body(request, state.config)
    asked, wire = _parsed(raw), WIRES[path]
    named = asked.get("model") or ""
    told = {"gen_ai.operation.name": wire.kind, "gen_ai.provider.name": "rsim", "gen_ai.request.model": named}
    request.state.end = tracing.begin(f"{wire.kind} {named}", request.headers, told)
    planned = (named.endswith(SUFFIX) or state.config.wrapped) and asked.get("rsim", True) is not False
    try:
        body = wire.read(asked) if planned or state.client is None else asked
    except api.BadRequest as error:
        raise Refusal(400, str(error), "invalid_request_error", param=error.param) from error
    local = state.client is None
    request.state.planned = planned = planned and not api.passes_through(body, local=local)
    if not planned and state.client is not None:
        return await _pass_through(state, request, path, raw, asked, named)
    if state.client is None and named.removesuffix(SUFFIX) not in ("", state.local_model):
        known = f"{state.local_model}{SUFFIX} and {state.local_model}"
        raise Refusal(404, f"there is no model {named!r} here: {known} are served", "invalid_request_error", param="model")
    if api.passes_through(body, local=local):
        lacks = "echoes, suffixes, stored prompts and responses, nor log-probs in /v1/responses"
        raise Refusal(400, f"a model in this process has no {lacks}", "invalid_request_error")
    enter(state)
    streams = False
    try:
        reply = await answer(state, request, wire, body, named.removesuffix(SUFFIX), planned=planned, asked=asked)
        streams = isinstance(reply, WatchedStream)
    finally:
        if not streams:  # a stream leaves when it is over
            leave(state)
    return reply


def _parsed(raw: bytes) -> dict[str, Any]:
    """A request's body. What Python reads beyond JSON is refused: NaN and infinity, halves of characters (lone surrogates)."""
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not valid JSON", "invalid_request_error") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_request_error")
    if not isinstance(body.get("model") or "", str):
        raise Refusal(400, "model must be a text", "invalid_request_error", param="model")
    return body


# --- without a planner ---


async def _pass_through(state: State, request: Request, path: str, raw: bytes, body: dict[str, Any], named: str) -> Response:
    """Sends the request on and the answer back, byte for byte; only a suffix and the field ``rsim`` are taken off."""
    deadline = asyncio.get_running_loop().time() + state.config.request_seconds
    assert state.client is not None
    if named.endswith(SUFFIX) or "rsim" in body:
        body = {k: v for k, v in body.items() if k != "rsim"} | {"model": named.removesuffix(SUFFIX)}
        raw = json.dumps(body).encode()
    withheld = () if state.config.wrapped else _PRIVATE
    headers = [(k, v) for k, v in own_headers(request) if not any(part in k for part in withheld)]
    given = [(k, v) for k, v in request.query_params.multi_items() if k not in state.client.params]
    query: list[tuple[str, Any]] = [(k, v) for k, v in given if not any(p in k.lower().encode() for p in withheld)]
    # What is no stream may say nothing for as long as the request may take.
    silence = state.config.upstream_seconds if body.get("stream") else state.config.request_seconds
    limit, passed = httpx.Timeout(silence, connect=10.0), tracing.passed_on(headers)
    sent = state.client.build_request("POST", path, content=raw, params=query or None, headers=passed, timeout=limit)
    try:
        async with asyncio.timeout_at(deadline):
            response, content = await unless_gone(request.receive, _sent_on(state.client, sent))
    except (httpx.RequestError, TimeoutError, ClientGone) as error:
        raise _not_sent_on(error) from error
    response.headers.encoding = "latin-1"  # as they came
    kept = {k: response.headers[k] for k in _ANSWERED if k in response.headers}
    if content is not None:
        return Response(content, response.status_code, kept)
    status = response.status_code

    async def stream() -> AsyncGenerator[bytes]:
        nonlocal status
        parts = response.aiter_bytes()  # decompressed: the header that says how is not handed on
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
        except (httpx.HTTPError, TimeoutError) as error:
            broke = Refusal(502, "the connection to the upstream broke", "connection_error")
            refusal = _not_sent_on(error) if isinstance(error, TimeoutError) else broke
            status, grow = refusal.status, WIRES[path].grow
            for line in failure(grow(body) if grow else None, status, refusal.body["error"]):
                yield line
        finally:
            await response.aclose()

    return WatchedStream(stream(), response.status_code, kept, lambda: finished(state, request, status))


def _not_sent_on(error: httpx.RequestError | TimeoutError | ClientGone) -> Refusal:
    if isinstance(error, ClientGone):
        return Refusal(499, "the client went away", "client_disconnected")
    if isinstance(error, TimeoutError):
        return Refusal(504, "the request took too long", "timeout")
    return from_upstream(unanswered(error))


async def _sent_on(client: httpx.AsyncClient, sent: httpx.Request) -> tuple[httpx.Response, bytes | None]:
    """The upstream's response, read to its end unless it is a stream."""
    response = await client.send(sent, stream=True)
    if "event-stream" in response.headers.get("content-type", ""):
        return response, None
    try:
        return response, await response.aread()
    finally:
        await response.aclose()


# --- the small routes ---


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": await _listed(request)})


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    for model in await _listed(request):
        if model["id"] == name:
            return JSONResponse(model)
    raise Refusal(404, f"there is no model {name!r} here", "invalid_request_error", param="model")


async def _listed(request: Request) -> list[dict[str, Any]]:
    """The models, those whose answers are planned first."""
    state: State = request.app.state.rsim
    _authorise(request, state.config.api_key)
    if state.client is None:
        listed = [{"id": state.local_model, "object": "model", "created": 0, "owned_by": "rsim"}]
    else:
        try:
            listed = await list_models(state.client)
        except UpstreamError as error:
            raise from_upstream(error) from error
    return [m | {"id": f"{m['id']}{SUFFIX}", "owned_by": "rsim"} for m in listed] + listed


async def _tokens(request: Request, path: str) -> Response:
    """A text's ids and ids' text, in vLLM's form: what clients that send prompts of token ids ask for."""
    state: State = request.app.state.rsim
    _authorise(request, state.config.api_key)
    body = _parsed(await _read_body(request, state.config))
    if not isinstance(state.upstream, LocalUpstream):
        raise Refusal(404, "the tokens are the upstream's: ask it", "invalid_request_error")
    try:
        if path == "tokenize":
            begins = body.get("add_special_tokens", True) is not False
            if not isinstance(body.get("prompt"), str):
                raise Refusal(400, "prompt must be a text", "invalid_request_error", param="prompt")
            ids = await state.upstream.ids(body["prompt"], begins=begins)
            return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": state.upstream.context})
        return JSONResponse({"prompt": await state.upstream.text(Asked("", None, "", prompt_ids=body.get("tokens")))})
    except UserError as error:
        raise Refusal(400, str(error), "invalid_request_error") from error


async def _health(request: Request) -> Response:
    state: State = request.app.state.rsim
    mode = state.upstream.mode if state.upstream else None
    told = {
        "status": "ok" if mode else "upstream not reached yet",
        "mode": mode,
        "approximate": mode != "exact",
        "strategies": list(state.planning.strategies.names),
        "gate": state.config.rules.gate,
        "active": state.active,
    }
    return JSONResponse(told)


async def _openapi(request: Request) -> Response:
    return JSONResponse(openapi.DOCUMENT)


async def _metrics(request: Request) -> Response:
    state: State = request.app.state.rsim
    if state.config.guard_metrics:
        _authorise(request, state.config.api_key)
    state.metrics.planner_seconds.set(state.planning.seconds)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _playground(request: Request) -> Response:
    return FileResponse(_PAGE / "index.html", headers={"Content-Security-Policy": _PAGE_POLICY})


def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours; what happened is in the log."""
    return _refused(request, Refusal(500, "the request failed in this server", "server_error"))


def _refused(request: Request, error: Any) -> Response:
    """A `Refusal` in the form of what was asked."""
    wire = WIRES.get(request.scope["path"].removeprefix("/v1/"), CHAT)  # a host that is none leaves no URL
    return JSONResponse(wire.error(error.status, error.body), error.status, error.headers)


def _authorise(request: Request, key: str) -> None:
    """Compares in constant time. Without a key the server is open (to 127.0.0.1 by default), but for pages of other sites: they
    name themselves in ``Origin`` or come under a name of their own that leads here."""
    if not key:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        try:
            foreign = not own_name(host) or (origin is not None and urlsplit(origin).netloc != host)
        except ValueError:  # no name at all
            foreign = True
        if foreign:
            raise Refusal(403, f"a server without $RSIM_API_KEY does not serve {origin or host}", "permission_error")
        return
    scheme, _, given = request.headers.get("authorization", "").strip().partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")  # Anthropic's clients'
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
    except ClientDisconnect as error:
        raise Refusal(499, "the client went away", "client_disconnected") from error
    except TimeoutError as error:
        raise Refusal(408, "the body did not arrive in time", "timeout") from error
    return b"".join(parts)
