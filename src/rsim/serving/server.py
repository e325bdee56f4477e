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
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
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
from rsim.serving.said import UpstreamError, lost
from rsim.serving.state import Account, Refusal, ServeConfig, State, enter, finished, log, refusal_of, upstream_of
from rsim.serving.streams import WatchedStream, unless_gone
from rsim.serving.upstream_client import list_models, own_name, upstream_client
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
_INVALID = "invalid_request_error"
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
    lifespan = _lifespan(config, planner, reasoner, name, runner)
    app = FastAPI(title="rsim", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    for kind in (Refusal, api.BadRequest, UserError, UpstreamError, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(HTTPException, _nothing_there)
    if config.api_key:  # who has it may ask from any page; without one, see `_authorise`
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
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
    deadline = asyncio.get_running_loop().time() + state.config.request_seconds
    request.state.account = account = Account(WIRES[path].kind, deadline)
    reply: Response | None = None
    try:
        _authorise(request, state.config.api_key)
        raw = await _read_body(request, state.config)
        asked = _parsed(raw)
        kind, named = WIRES[path].kind, asked.get("model") or ""
        told = {"gen_ai.operation.name": kind, "gen_ai.provider.name": "rsim", "gen_ai.request.model": named}
        account.end = tracing.begin(f"{kind} {named}", request.headers, told)
        async with asyncio.timeout_at(deadline):
            reply = await unless_gone(request.receive, _reply(state, request, path, raw, asked, named))
    except Exception as error:
        reply = _refused(request, error)
    finally:
        account.status = reply.status_code if reply else 500
        if isinstance(reply, WatchedStream):  # it tells when it is over
            reply.done = partial(finished, state, request)
        else:
            finished(state, request)
    return reply


async def _reply(state: State, request: Request, path: str, raw: bytes, asked: dict[str, Any], named: str) -> Response:
    account: Account = request.state.account
    wire = WIRES[path]
    planned = (named.endswith(SUFFIX) or state.config.wrapped) and asked.get("rsim", True) is not False
    local = state.client is None
    body = wire.read(asked) if planned or local else asked
    account.planned = planned = planned and not api.passes_through(body, local=local)
    if not planned and state.client is not None:
        return await _pass_through(state, state.client, request, path, raw, asked, named)
    if state.client is None and named.removesuffix(SUFFIX) not in ("", state.local_model):
        known = f"{state.local_model}{SUFFIX} and {state.local_model}"
        raise Refusal(404, f"there is no model {named!r} here: {known} are served", _INVALID, "model")
    if api.passes_through(body, local=local):
        lacks = "echoes, suffixes, audio, stored prompts and responses, nor log-probs in /v1/responses"
        raise Refusal(400, f"a model in this process has no {lacks}", _INVALID)
    enter(state, account)
    return await answer(state, request, wire, body, asked, named.removesuffix(SUFFIX))


def _parsed(raw: bytes) -> dict[str, Any]:
    """A request's body. What Python reads beyond JSON is refused: NaN and infinity, halves of characters (lone surrogates)."""
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not valid JSON", _INVALID) from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", _INVALID)
    if not isinstance(body.get("model") or "", str):
        raise Refusal(400, "model must be a text", _INVALID, "model")
    return body


# --- without a planner ---


async def _pass_through(
    state: State, client: httpx.AsyncClient, request: Request, path: str, raw: bytes, body: dict[str, Any], named: str
) -> Response:
    """Sends the request on and the answer back, byte for byte; only a suffix and the field ``rsim`` are taken off."""
    account: Account = request.state.account
    if named.endswith(SUFFIX) or "rsim" in body:
        body = {k: v for k, v in body.items() if k != "rsim"} | {"model": named.removesuffix(SUFFIX)}
        raw = json.dumps(body).encode()
    withheld = () if state.config.wrapped else _PRIVATE
    headers = [(k, v) for k, v in own_headers(request) if not any(part in k for part in withheld)]
    given = [(k, v) for k, v in request.query_params.multi_items() if k not in client.params]
    query: list[tuple[str, Any]] = [(k, v) for k, v in given if not any(p in k.lower().encode() for p in withheld)]
    # What is no stream may say nothing for as long as the request may take.
    silence = state.config.upstream_seconds if body.get("stream") else state.config.request_seconds
    limit, passed = httpx.Timeout(silence, connect=10.0), tracing.passed_on(headers)
    sent = client.build_request("POST", path, content=raw, params=query or None, headers=passed, timeout=limit)
    response, content = await _sent_on(client, sent)
    response.headers.encoding = "latin-1"  # as they came
    kept = {k: response.headers[k] for k in _ANSWERED if k in response.headers}
    if content is not None:
        return Response(content, response.status_code, kept)

    async def stream() -> AsyncGenerator[bytes]:
        parts = response.aiter_bytes()  # decompressed: the header that says how is not handed on
        try:
            while True:
                async with asyncio.timeout_at(account.deadline):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
        except (httpx.RequestError, TimeoutError) as error:
            refusal = refusal_of(lost(error) if isinstance(error, httpx.RequestError) else error)
            account.status, grow = refusal.status, WIRES[path].grow
            for line in failure(grow(body) if grow else None, refusal.status, refusal.error):
                yield line
        finally:
            await response.aclose()

    return WatchedStream(stream(), response.status_code, kept)


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
    raise Refusal(404, f"there is no model {name!r} here", _INVALID, "model")


async def _listed(request: Request) -> list[dict[str, Any]]:
    """The models, those whose answers are planned first."""
    state: State = request.app.state.rsim
    _authorise(request, state.config.api_key)
    if state.client is None:
        listed = [{"id": state.local_model, "object": "model", "created": 0, "owned_by": "rsim"}]
    else:
        listed = await list_models(state.client)
    return [m | {"id": f"{m['id']}{SUFFIX}", "owned_by": "rsim"} for m in listed] + listed


async def _tokens(request: Request, path: str) -> Response:
    """A text's ids and ids' text, in vLLM's form: what clients that send prompts of token ids ask for."""
    state: State = request.app.state.rsim
    _authorise(request, state.config.api_key)
    body = _parsed(await _read_body(request, state.config))
    if not isinstance(state.upstream, LocalUpstream):
        raise Refusal(404, "the tokens are the upstream's: ask it", _INVALID)
    if path == "detokenize":
        return JSONResponse({"prompt": await state.upstream.text(Asked("", None, "", prompt_ids=body.get("tokens")))})
    if not isinstance(body.get("prompt"), str):
        raise Refusal(400, "prompt must be a text", _INVALID, "prompt")
    ids = await state.upstream.ids(body["prompt"], begins=body.get("add_special_tokens", True) is not False)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": state.upstream.context})


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


def _refused(request: Request, error: Exception) -> Response:
    """An error in the form of what was asked."""
    refusal = refusal_of(error)
    wire = WIRES.get(request.scope["path"].removeprefix("/v1/"), CHAT)  # a host that is none leaves no URL
    headers = {"Retry-After": refusal.retry_after} if refusal.retry_after else {}
    return JSONResponse(wire.error(refusal.status, {"error": refusal.error}), refusal.status, headers)


def _nothing_there(request: Request, error: Any) -> Response:
    """A path or a method that is not served."""
    reply = _refused(request, Refusal(error.status_code, f"{request.method} {request.scope['path']}: {error.detail}", _INVALID))
    reply.headers.update(error.headers or {})
    return reply


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
                    raise Refusal(413, f"the body exceeds {config.body_bytes} bytes", _INVALID)
                parts.append(part)
    except ClientDisconnect as error:
        raise Refusal(499, "the client went away", "client_disconnected") from error
    except TimeoutError as error:
        raise Refusal(408, "the body did not arrive in time", "timeout") from error
    return b"".join(parts)
