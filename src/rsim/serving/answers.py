"""How a request is answered: its plays, merged into one response or one stream."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from rsim.serving import openai_api as api
from rsim.serving import tracing
from rsim.serving.grammar import CALL, read_call
from rsim.serving.play import (
    Asked,
    Called,
    Event,
    Finished,
    Injected,
    StepEnd,
    TextDelta,
    Thought,
    Until,
    Upstream,
    Usage,
    play,
)
from rsim.serving.state import Account, State, refusal_of, upstream_of
from rsim.serving.streams import WatchedStream
from rsim.serving.wire import Body, Wire, events, whole

_HOP = {b"host", b"content-length", b"connection", b"transfer-encoding", b"keep-alive", b"accept-encoding", b"te", b"upgrade"}
_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


async def answer(state: State, request: Request, wire: Wire, body: Body, asked: Body, model: str) -> Response:
    """A response whose answers are played. ``body``: in the inner form; ``asked``: as it came."""
    account: Account = request.state.account
    planned = account.planned
    limit = state.config.rules.max_tokens if planned else state.config.plain_tokens
    wanted = api.read_request(wire.kind, body, state.local_model or model, state.config.rules, limit)
    if wire.grow and len(wanted.asked) > 1:
        raise api.BadRequest("n: there is one answer in this format", "n")
    headers = [(k, v) for k, v in own_headers(request) if k not in (b"content-type", b"accept")]
    headers = headers if state.config.wrapped else tracing.received(headers)
    wanted.asked = [replace(one, headers=headers) for one in wanted.asked]
    upstream = await upstream_of(state, model, headers)
    by_ids = {tuple(one.prompt_ids): one for one in wanted.asked if one.prompt_ids}
    texts = {ids: await upstream.text(one) for ids, one in by_ids.items()}
    wanted.asked = [replace(one, prompt=texts.get(tuple(one.prompt_ids or ()), one.prompt)) for one in wanted.asked]
    mode = upstream.mode if planned else None
    shown: dict[str, str] = {"X-Rsim-Mode": mode} if mode else {}
    merged = _merge([_play(state, upstream, one, wanted, planned=planned) for one in wanted.asked], account.deadline)
    # What the upstream says first decides between a stream and an error object.
    first = await _until_said(merged, state.config.first_token_seconds)
    if wanted.stream:
        chunks = _chunks(wanted, merged, first, account)
        return WatchedStream(events(wire, asked, chunks), 200, shown | _EVENTS)
    choices = [api.Choice() for _ in wanted.asked]
    for index, event in first:
        choices[index].add(event)
    async with aclosing(merged):
        async for index, event in merged:
            choices[index].add(event)
    used = [step["strategy"] for step in choices[0].steps]
    if planned:
        shown["X-Rsim-Strategies"] = quote(",".join(used), safe=",")  # a header is ASCII, a name is anything
    return JSONResponse(whole(wire, asked, api.whole(wanted, choices, mode)), headers=shown)


def own_headers(request: Request) -> list[tuple[bytes, bytes]]:
    """A request's headers but for those of its connection; bytes: any name, any value."""
    return [(k, v) for k, v in request.headers.raw if k not in _HOP and k != b"origin"]


async def _chunks(
    wanted: api.Request, events: AsyncGenerator[tuple[int, Event]], first: list[tuple[int, Event]], account: Account
) -> AsyncGenerator[Body]:
    """A stream's chunks. An error after the first event ends it with an error object, which OpenAI's clients raise."""
    choices: dict[int, api.Choice] = {}
    async with aclosing(events):
        try:
            while (event := first.pop(0) if first else await anext(events, None)) is not None:
                index, what = event
                new = index not in choices
                choice = choices.setdefault(index, api.Choice())
                choice.add(what)
                yield api.chunk(wanted, index, what, choice, first=new)
        except Exception as error:  # the status was sent: whatever went wrong can only be told within the stream
            refusal = refusal_of(error)
            account.status = refusal.status
            yield {"error": refusal.error, "status": refusal.status}
            return
    if wanted.include_usage:
        yield api.usage_chunk(wanted, choices.values())


async def _until_said(events: AsyncGenerator[tuple[int, Event]], seconds: float) -> list[tuple[int, Event]]:
    """The first events, up to the first that is not ours, which must come within so many ``seconds`` (0: any)."""
    first: list[tuple[int, Event]] = []
    try:
        async with asyncio.timeout(seconds or None) as limit:
            async for index, event in events:
                first.append((index, event))
                if isinstance(event, Thought | Called | Finished) or (isinstance(event, TextDelta) and event.sampled):
                    break
    except TimeoutError as error:
        raise TimeoutError(f"no token within {seconds:g} seconds" if limit.expired() else str(error)) from error
    return first


async def _play(state: State, upstream: Upstream, asked: Asked, wanted: api.Request, *, planned: bool) -> AsyncGenerator[Event]:
    """One answer, cut at the client's stop strings."""
    spent = Usage()
    async with state.slots:
        if planned:
            if asked.messages is not None:
                asked = replace(asked, messages=state.planning.behind(asked.messages))
            source = play(asked, state.planning, upstream, wanted.rules, wanted.limit, spent, state.runner)
        else:
            source = _plain(upstream, asked, wanted.limit, wanted.stops)
        async with (
            aclosing(api.Stops(wanted.stops, ends_there=not planned).cut(source, spent)) as cut,
            aclosing(_called(cut) if asked.tools else cut) as called,
            aclosing(_placed(called, state.config.show)) as events,
        ):
            async for event in events:
                if isinstance(event, Injected):
                    state.metrics.steps.labels(event.strategy).inc()
                elif isinstance(event, Finished):
                    state.metrics.spent(event.usage)
                yield event


_PLACES = {"content": None, "reasoning": "reasoning_content", "none": ""}  # None: as the game has it


async def _placed(events: AsyncGenerator[Event], show: str) -> AsyncGenerator[Event]:
    """Prompts and outputs in their place. "auto" and "reasoning": where the model thinks, if it does so in a field of its own;
    they wait until the model has said something."""
    held: list[Injected | TextDelta] = []
    known, place = show in ("content", "none"), _PLACES.get(show)
    async for event in events:
        if isinstance(event, Injected) or (isinstance(event, TextDelta) and event.output):
            if known:
                yield event if place is None else replace(event, place=place)
            else:
                held.append(event)
            continue
        if not known and isinstance(event, Thought) and event.place != "content":
            place = event.place
        for one in held:
            yield one if place is None else replace(one, place=place)
        known, held = True, []
        yield event


async def _plain(upstream: Upstream, asked: Asked, limit: int, stops: tuple[str, ...]) -> AsyncGenerator[Event]:
    """An answer of the model in this process without a planner."""
    conversation = await upstream.open(asked)
    until = Until(strings=stops, strict=asked.strict)
    try:
        async with aclosing(conversation.step(limit, until)) as pieces:
            async for piece in pieces:
                if isinstance(piece, StepEnd):
                    yield Finished("length" if piece.reason == "cap" else "stop", piece.usage)
                else:
                    yield piece
    finally:
        await conversation.close()


async def _called(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """Of an answer that may be a call of a tool: the call instead of its text, which is held back as long as it may be one."""
    held: str | None = ""
    async for event in events:
        if held is not None and isinstance(event, TextDelta) and event.sampled and event.place == "content":
            held += event.text
            if CALL.startswith(held) or held.startswith(CALL):
                if event.logprobs:
                    yield replace(event, text="")
                continue
            event, held = replace(event, text=held), None
        elif held and isinstance(event, Finished):
            call = read_call(held)
            yield Called(uuid.uuid4().hex[:9], *call) if call else TextDelta(held)
            event = replace(event, reason="tool_calls") if call else event
        yield event


async def _merge(plays: list[AsyncGenerator[Event]], deadline: float) -> AsyncGenerator[tuple[int, Event]]:
    """The events of all choices as they come, until ``deadline``."""
    events: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

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
            elif isinstance(event, Exception):
                raise event
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
