"""The wire formats over one inner form: OpenAI's chat bodies, answers and chunks, which `openai_api` reads and writes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rsim.serving.openai_api import BadRequest, Kind

Body = dict[str, Any]


class Growing(Protocol):
    """An answer in another format as it grows: ``whole``, and the events of a stream that add up to it.

    ``add`` takes a piece (see `pieces`); ``end`` a choice, which may have a ``finish_reason``, and a usage once it is known.
    """

    whole: Body

    def start(self, answer: Body) -> Iterator[bytes]: ...
    def add(self, kind: str, text: str, call: Body) -> Iterator[bytes]: ...
    def end(self, choice: Body, usage: Body | None) -> Iterator[bytes]: ...
    def failed(self, status: int, error: Body) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Wire:
    """``read`` makes the inner body of a request's, ``grow`` begins its answer (None: the inner form is the format's own),
    ``error`` is an OpenAI error object, and its status, in the format's form."""

    kind: Kind
    read: Callable[[Body], Body] = lambda body: body
    grow: Callable[[Body], Growing] | None = None
    error: Callable[[int, Body], Body] = lambda status, body: body


def whole(wire: Wire, asked: Body, answer: Body) -> Body:
    """An inner answer in a format; ``asked``: the request's own body."""
    if wire.grow is None:
        return answer
    growing, choice = wire.grow(asked), answer["choices"][0]
    made = [*growing.start(answer)]
    for piece in pieces(choice["message"]):
        made += growing.add(*piece)
    made += growing.end(choice, answer["usage"])
    return growing.whole | ({"rsim": answer["rsim"]} if "rsim" in answer else {})


def failure(growing: Growing | None, status: int, error: Body) -> Iterator[bytes]:
    """An error that ends a stream."""
    return growing.failed(status, error) if growing else iter([event_data({"error": error})])


async def events(wire: Wire, asked: Body, chunks: AsyncIterator[Body]) -> AsyncGenerator[bytes]:
    """A stream of inner chunks, which an ``error`` with its ``status`` may end, in a format."""
    growing, started = wire.grow(asked) if wire.grow else None, False
    async for chunk in chunks:
        if "error" in chunk:
            for line in failure(growing, chunk["status"], chunk["error"]):
                yield line
            return
        if growing is None:
            yield event_data(chunk)
            continue
        made = [] if started else [*growing.start(chunk)]
        started = True
        for choice in chunk["choices"] or [{}]:
            for piece in pieces(choice.get("delta", {})):
                made += growing.add(*piece)
            made += growing.end(choice, chunk.get("usage"))
        for line in made:
            yield line
    if growing is None:
        yield b"data: [DONE]\n\n"


def pieces(said: Body) -> Iterator[tuple[str, str, Body]]:
    """What a message or a delta says, in order: its kind (reasoning, text, tool), the text, and the call that it is of."""
    for name in ("reasoning_content", "reasoning"):
        if said.get(name):
            yield "reasoning", said[name], {}
    if said.get("content"):
        yield "text", said["content"], {}
    for call in said.get("tool_calls") or []:
        yield "tool", call["function"].get("arguments") or "", call


def event(kind: str, **fields: Any) -> bytes:
    """An event with a name."""
    return f"event: {kind}\n".encode() + event_data({"type": kind} | fields)


def event_data(data: Body) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def dicts(body: Body, key: str) -> list[Body]:
    """A list of objects in a body. Raises `BadRequest` for anything else."""
    given = body.get(key)
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise BadRequest(f"{key} must be a list of objects", key)
    return given


def object_in(body: Body, key: str) -> Body:
    """An object in a body; empty where there is none. Raises `BadRequest` for anything else."""
    given = body.get(key)
    if given is not None and not isinstance(given, dict):
        raise BadRequest(f"{key} must be an object", key)
    return given or {}


CHAT, COMPLETION = Wire("chat"), Wire("completion")
