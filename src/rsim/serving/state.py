"""What the requests of one plug-in server share, and how they are refused."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Literal

import httpx
from fastapi import Request

from rsim.errors import UserError
from rsim.game.tools import Runner
from rsim.rules import PlayRules
from rsim.serving import openai_api as api
from rsim.serving.http_upstream import HttpUpstream, probe
from rsim.serving.metrics import Metrics
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Headers, Mode, Upstream
from rsim.serving.said import UpstreamError
from rsim.serving.streams import ClientGone
from rsim.serving.tracing import Note
from rsim.serving.upstream_client import first_model, unanswered

log = logging.getLogger("rsim.serve")

_PROBE_SECONDS = 60.0  # that finding out what an upstream is may take; others wait for it


@dataclass(frozen=True)
class ServeConfig:
    """``upstream`` is the base URL of an OpenAI-compatible server, see `upstream_client`; "": a model is in this process."""

    upstream: str = ""
    upstream_key: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)
    guard_metrics: bool = False  # they too are for who has the key
    model: str = ""  # the upstream's model to probe with; "": the first that it lists
    mode: Mode | None = None  # None: probed
    rules: PlayRules = field(default_factory=PlayRules)
    tools: tuple[str, ...] = ()  # "python": programs that the model writes are run, in the sandbox
    plain_tokens: int = 4096  # of an unplanned answer of a model in this process that states no limit
    slots: int = 64  # answers played at once
    waiting: int = 64  # requests that may wait for a slot; more are refused with 429
    request_seconds: float = 600.0
    first_token_seconds: float = 0.0  # that an answer's first token may take; 0: as long as the request
    body_bytes: int = 10 * 2**20
    body_seconds: float = 30.0
    upstream_seconds: float = 120.0  # without a byte from the upstream
    show: Literal["auto", "content", "reasoning", "none"] = "auto"  # where a client sees what was injected
    retries: int = 2  # of an upstream's call
    wrapped: bool = False  # a client of this process is served, see `Planner.wrap`: every model is planned, its headers go on


@dataclass
class State:
    """What the requests of one server share."""

    config: ServeConfig
    planning: PlannerBatcher
    upstream: Upstream | None  # None: not probed yet
    client: httpx.AsyncClient | None
    metrics: Metrics
    runner: Runner | None
    slots: asyncio.Semaphore
    local_model: str = ""
    active: int = 0
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Refusal(Exception):
    """A request that is answered with an ``error`` object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.error = {"message": message, "type": kind, "param": param, "code": None}


def refusal_of(error: Exception) -> Refusal:
    """What an error is to the client. One that is not expected here is a fault of ours: it is logged, not told."""
    if not isinstance(error, Refusal):
        refusal = _meaning(error)
        error.__traceback__ = None  # its frames hold the request, and it: a ring that stays until Python looks for rings
        return refusal
    return error


def _meaning(error: Exception) -> Refusal:
    if isinstance(error, httpx.RequestError):
        error = unanswered(error)
    if isinstance(error, UpstreamError):
        refusal = Refusal(error.status, "", "upstream_error", retry_after=error.retry_after)
        refusal.error |= error.error
        return refusal
    if isinstance(error, api.BadRequest):
        return Refusal(400, str(error), "invalid_request_error", error.param)
    if isinstance(error, UserError):
        return Refusal(400, str(error), "invalid_request_error")
    if isinstance(error, TimeoutError):
        return Refusal(504, str(error) or "the request took too long", "timeout")
    if isinstance(error, ClientGone):
        return Refusal(499, "the client went away", "client_disconnected")
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the request failed in this server", "server_error")


@dataclass
class Account:
    """What is told of a request when it is over; ``end`` ends its span."""

    kind: str
    deadline: float  # by the event loop's clock
    began: float = field(default_factory=time.perf_counter)
    planned: bool = False
    status: int = 500
    entered: bool = False  # it is one of those in hand
    end: Note = lambda more: None


def enter(state: State, account: Account) -> None:
    """Raises `Refusal` where too many are in hand."""
    if state.active >= state.config.slots + state.config.waiting:
        state.metrics.refused.inc()
        raise Refusal(429, "too many requests at once", "rate_limit_error", retry_after="1")
    account.entered = True
    state.active += 1
    state.metrics.active.set(state.active)


def finished(state: State, request: Request) -> None:
    """Tells the metrics, the log and the request's span how it ended."""
    own: Account = request.state.account
    if own.entered:
        state.active -= 1
        state.metrics.active.set(state.active)
    seconds = time.perf_counter() - own.began
    state.metrics.done(own.kind, planned=own.planned, status=own.status, seconds=seconds)
    own.end({"http.response.status_code": own.status})
    told = {"kind": own.kind, "planned": own.planned, "status": own.status, "seconds": round(seconds, 4)}
    log.info("a request ended", extra={"told": told | {"traceparent": request.headers.get("traceparent")}})


async def upstream_of(state: State, model: str, headers: Headers = ()) -> Upstream:
    """The upstream with its mode: as configured, or probed by the first request that finds it alive."""
    async with state.probing:
        if state.upstream is None:
            assert state.client is not None
            mode, tells = state.config.mode, False
            if mode is None:
                try:
                    async with asyncio.timeout(_PROBE_SECONDS):
                        named = model or state.config.model or await first_model(state.client)
                        mode, tells = await probe(state.client, named, headers)
                except TimeoutError as error:
                    problem = f"the upstream did not answer in {_PROBE_SECONDS:g} seconds: state --mode"
                    raise UpstreamError(504, {"message": problem, "type": "timeout"}) from error
            log.info("injection mode: %s", mode)
            count, retries = state.planning.count, state.config.retries
            state.upstream = HttpUpstream(state.client, mode, count=count, tells=tells, retries=retries)
        return state.upstream
