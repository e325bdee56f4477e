"""Upstream streams in the shapes of real servers, mutated: what breaks the plug-in, and what is told as whole that is not.

The shapes are those of OpenAI, vLLM, llama.cpp, Ollama, TGI, LiteLLM, OpenRouter, Gemini and Mistral. Each stream is one
answer, asked for through the server's own app, which leaves the model alone (a gate of 1). *harmless* changes keep the answer:
it must come through, character by character. Any other must end in an error or in the upstream's own reason, unless the
answer is whole all the same.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from rsim.policies.protocol import AnyPlanner
from rsim.policies.scripted import random_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from studies.ledger import Row

ISSUE = 13
Chunk = dict[str, Any]
Draw = random.Random
TEXTS = (
    "It is 12.",
    "First, 3*4 = 12.\n\nThen:\n```python\nx = 1\n\nprint(x)\n```\n\nSo \\boxed{12}",
    "Größe 日本語 🙂🙃 fine\u2028next\u2029then\u0085end 👩‍🚀",
    'He said: "data: [DONE]"\n\ndata: {"a": 1}\n\n: a comment\n\nevent: x\r\n',
    "a <think> that is no thinking </think> and <b>html</b>",
)


def run(count: int = 1000, seed: int = 0) -> Iterator[Row]:
    found = asyncio.run(fuzz(count, seed))
    what = f"{count} mutated streams in {len(SHAPES)} servers' shapes"
    for fault in ("crash", "wrong answer told as whole", "harmless change told as an error"):
        yield Row(f"{what}: {fault}", found[fault], goal="0", met=found[fault] == 0, seeds=[seed])
    for outcome in ("whole answer", "upstream's own reason", "error"):
        yield Row(f"{what}: {outcome}", found[outcome], seeds=[seed])


# --- the shapes ---


@dataclass(frozen=True)
class Shape:
    """What a server's deltas and chunks hold beside the text. ``counts``: of the chunk with the usage; None: it sends none."""

    first: Chunk | None = None
    delta: Chunk = field(default_factory=dict)
    chunk: Chunk = field(default_factory=dict)
    last: Chunk = field(default_factory=dict)
    reason: str = "stop"
    counts: Chunk | None = field(default_factory=lambda: {"choices": []})


_ROLE = {"role": "assistant"}
_MORE = {"function_call": None, "tool_calls": None, "audio": None}
SHAPES = {
    "OpenAI": Shape(_ROLE | {"content": "", "refusal": None}, chunk={"usage": None, "obfuscation": "a1"}),
    "vLLM": Shape(_ROLE | {"content": ""}, last={"content": ""}),
    "llama.cpp": Shape(_ROLE | {"content": None}, counts={"choices": [], "timings": {"prompt_n": 7, "predicted_ms": 1.5}}),
    "Ollama": Shape(None, _ROLE, {"system_fingerprint": "fp_ollama"}, _ROLE | {"content": ""}),
    "TGI": Shape(None, _ROLE, last={"content": ""}, reason="eos_token", counts=None),
    "LiteLLM": Shape(_ROLE | _MORE | {"content": None}, last={"content": None}, counts=None),
    "OpenRouter": Shape(
        None, _ROLE | {"reasoning": None}, {"provider": "P"}, _ROLE | {"content": ""}, counts={"provider": "P"}
    ),
    "Gemini": Shape(None, _ROLE, reason="STOP", counts=None),
    "Mistral": Shape(_ROLE | {"content": ""}, last={"content": ""}, reason="end_turn"),
}


def _chunk(delta: Chunk, finish: str | None = None) -> Chunk:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def _usage(pieces: int) -> Chunk:
    return {"prompt_tokens": 7, "completion_tokens": pieces + 1, "total_tokens": pieces + 8}


def _shaped(shape: Shape, pieces: list[str]) -> list[Chunk]:
    said = [shape.first] if shape.first else []
    chunks = [_chunk(delta) for delta in (*said, *(shape.delta | {"content": piece} for piece in pieces))]
    chunks = [chunk | shape.chunk for chunk in (*chunks, _chunk(dict(shape.last), shape.reason))]
    chunks[-1]["choices"][0]["stop_reason"] = None
    counts = [] if shape.counts is None else [_chunk({}) | {"usage": _usage(len(pieces))} | shape.counts]
    return chunks + counts


# --- what is changed: harmless ---


def _deltas(chunks: list[Chunk]) -> list[Chunk]:
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"] or [] if choice["delta"].get("content")]


def _parts(draw: Draw, chunks: list[Chunk]) -> None:
    for delta in (delta for delta in _deltas(chunks) if isinstance(delta["content"], str)):
        delta["content"] = [{"type": "text", "text": delta["content"]}]


def _nulls(draw: Draw, chunks: list[Chunk]) -> None:
    chunks.insert(draw.randint(0, len(chunks)), _chunk({"content": None}) | {"choices": None, "usage": None, "error": None})


def _filters(draw: Draw, chunks: list[Chunk]) -> None:
    chunks.insert(0, _chunk({}) | {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]})


def _uncounted(draw: Draw, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        chunk["usage"] = {"prompt_tokens": None, "completion_tokens": None}


def _thinking(draw: Draw, chunks: list[Chunk]) -> None:
    field, pieces = draw.choice(("reasoning_content", "reasoning", "text", "parts")), ("First ", "I think.\n\n", "Then 🙂.")
    thoughts: list[Chunk] = [{"content": None, field: said} for said in pieces]
    if field in ("text", "parts"):  # of the content: as Anthropic's and as Mistral's have it
        said = [piece if field == "text" else [{"type": "text", "text": piece}] for piece in pieces]
        thoughts = [{"content": [{"type": "thinking", "thinking": one}]} for one in said]
        thoughts[-1]["content"] += [{"type": "text", "text": "So: "}] if draw.random() < 0.5 else []
    chunks[:0] = [_chunk(delta) for delta in thoughts]


def _behind_tags(draw: Draw, chunks: list[Chunk]) -> None:
    chunks[:0] = [_chunk({"content": said}) for said in ("<thi", "nk>\nWell.", "\n\nSo.</th", "ink>")]


def _one_error_that_is_none(draw: Draw, chunks: list[Chunk]) -> None:
    draw.choice(chunks)["error"] = None


# --- what is changed: the answer is broken ---


def _replaced(what: Any) -> Callable[[Draw, list[Any]], None]:
    def change(draw: Draw, chunks: list[Any]) -> None:
        chunks[draw.randrange(len(chunks))] = what

    return change


def _reported(what: Any) -> Callable[[Draw, list[Any]], None]:
    """In the middle, and nothing follows."""

    def change(draw: Draw, chunks: list[Any]) -> None:
        chunks[draw.randrange(len(chunks)) :] = [what]

    return change


def _finishes(reason: str | None) -> Callable[[Draw, list[Chunk]], None]:
    def change(draw: Draw, chunks: list[Chunk]) -> None:
        for choice in (choice for chunk in chunks for choice in chunk["choices"] or []):
            choice["finish_reason"] = reason if choice["finish_reason"] else None
        if reason:
            del chunks[draw.randrange(len(chunks) // 2) : len(chunks) // 2]

    return change


def _content(value: Any) -> Callable[[Draw, list[Chunk]], None]:
    def change(draw: Draw, chunks: list[Chunk]) -> None:
        draw.choice(_deltas(chunks))["content"] = value

    return change


def _choice(**fields: Any) -> Callable[[Draw, list[Chunk]], None]:
    def change(draw: Draw, chunks: list[Chunk]) -> None:
        draw.choice([c for chunk in chunks for c in chunk["choices"] or [] if c["delta"].get("content")]).update(fields)

    return change


HARMLESS = (_parts, _nulls, _filters, _uncounted, _thinking, _behind_tags, _one_error_that_is_none)
BROKEN = (
    _reported({"error": {"message": "the engine died", "code": 500}}), _reported({"error": "overloaded"}),
    _reported({"detail": "worker died"}), _reported({"object": "error", "message": "bad", "code": 400}),
    _replaced([]), _replaced("x"), _replaced({"choices": "x"}), _replaced({"choices": [5]}), _replaced({}), _replaced(None),
    _finishes(None), _finishes("content_filter"), _finishes("length"), _finishes("error"), _content(5), _content({"text": "x"}),
    _finishes("MAX_TOKENS"), _finishes("SAFETY"), _content([{"type": "image_url", "image_url": {"url": "x"}}]),
    _content([{"type": "text"}]), _content([7]), _choice(index=1), _choice(delta=[1]), _choice(delta="x"),
    _choice(finish_reason=7), _choice(error={"message": "gone", "code": 502}),
)  # fmt: skip


# --- the same on the wire ---


class Wire(httpx.AsyncByteStream):
    def __init__(self, parts: list[bytes], breaks: bool) -> None:
        self.parts, self.breaks = parts, breaks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
        if self.breaks:
            raise httpx.ReadError("reset by peer")


_BETWEEN = (": OPENROUTER PROCESSING", "event: message\nid: 1", "retry: 3000", "data:", ":", "event: ping")


def _framed(draw: Draw, chunks: list[Any], ascii_only: bool) -> bytes:
    """An event stream, in one of the forms that mean the same."""
    end, before = draw.choice(("\n", "\n", "\r\n")), draw.choice(("data: ", "data: ", "data:"))
    lines = []
    for chunk in chunks:
        if draw.random() < 0.1:
            lines.append(draw.choice(_BETWEEN))
        said = json.dumps(chunk, ensure_ascii=ascii_only)
        if draw.random() < 0.05 and said.startswith('{"id": "x", '):  # one event in two lines of data
            said = said.replace(", ", f",\n{before}", 1)
        lines.append(f"{before}{said}")
    if draw.random() < 0.8:
        lines.append(f"{before}[DONE]")
    text = "".join(line.replace("\n", end) + end + end for line in lines)
    text = text.rstrip("\r\n") if draw.random() < 0.2 else text
    return (b"\xef\xbb\xbf" if draw.random() < 0.1 else b"") + text.encode()


def _of_part(part: Any) -> str:
    said = part[part["type"]]
    return said if isinstance(said, str) else "".join(map(_of_part, said))


def _said(chunks: list[Chunk], field: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """All that is said in a field, halves of characters joined; of its parts those of some ``kinds``."""
    said = ""
    for choice in (choice for chunk in chunks for choice in chunk["choices"] or []):
        value = choice["delta"].get(field) or ""
        parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
        said += "".join(_of_part(part) for part in parts if part["type"] in kinds)
    return said.encode("utf-16", "surrogatepass").decode("utf-16")


def _whole(draw: Draw, chunks: list[Chunk]) -> bytes:
    """No stream, though one was asked for."""
    message: Chunk = {"role": "assistant"} | {field: _said(chunks, field) for field in ("reasoning_content", "reasoning")}
    parts = [{"type": kind, kind: _said(chunks, "content", (kind,))} for kind in ("thinking", "text")]
    message["content"] = parts if parts[0]["thinking"] else parts[1]["text"]
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": _usage(3)}, indent=draw.choice((None, 2))).encode()


def _lost(draw: Draw, wire: bytes) -> bytes:
    """A byte of what frames an event."""
    starts = [at for at in range(len(wire)) if wire.startswith(b"data:", at) and wire[at - 1 : at] in (b"", b"\n")]
    at = draw.choice(starts) + draw.randrange(5)
    return wire[:at] + wire[at + 1 :]


def _cut(draw: Draw, wire: bytes) -> bytes:
    return wire[: draw.randrange(len(wire))]


def _not_utf8(draw: Draw, wire: bytes) -> bytes:
    at = draw.randrange(len(wire))
    return wire[:at] + draw.choice((b"\xff", b"\xc3", b"\xed\xa0\x80")) + wire[at:]


def _page(draw: Draw, wire: bytes) -> bytes:
    at = draw.choice((0, draw.choice([at for at in range(len(wire)) if wire[at - 1 : at] == b"\n"] or [0])))
    return wire[:at] + b"<html><body><h1>502 Bad Gateway</h1>\n</body></html>\n"


def _no_stream(draw: Draw, wire: bytes) -> bytes:
    problem = {"error": {"message": "rate limited", "code": draw.choice((429, "busy", None))}}
    return draw.choice((json.dumps(problem).encode(), b"", b"[DONE]", b"data: [DONE]\n\n", b"[" * 100_000, b"null"))


WIRE = (_lost, _cut, _cut, _cut, _not_utf8, _page, _no_stream)


# --- one after the other ---


def _pieces(draw: Draw, text: str, halves: bool) -> list[str]:
    """The text in pieces of some characters; ``halves``: pairs of UTF-16 may be torn apart."""
    units = text.encode("utf-16-le")
    unit = [units[i : i + 2].decode("utf-16-le", "surrogatepass") for i in range(0, len(units), 2)] if halves else list(text)
    pieces = []
    while unit:
        count = draw.randint(1, 6)
        pieces.append("".join(unit[:count]))
        del unit[:count]
    return pieces


def _stream(draw: Draw) -> tuple[list[bytes], bool, str, str, bool]:
    """What goes over the wire, whether the connection breaks then, the content and the thinking that were said, and whether
    the answer is whole."""
    halves = draw.random() < 0.3
    chunks: list[Any] = _shaped(draw.choice(list(SHAPES.values())), _pieces(draw, draw.choice(TEXTS), halves))
    for change in draw.sample(HARMLESS, draw.choice((0, 1, 1, 2))):
        change(draw, chunks)
    content = _said(chunks, "content")
    thinking = "".join(_said(chunks, *where) for where in (("reasoning_content",), ("reasoning",), ("content", ("thinking",))))
    fate = draw.random()
    if fate < 0.3:
        draw.choice(BROKEN)(draw, chunks)
    wire = _whole(draw, chunks) if fate > 0.95 else _framed(draw, chunks, halves or draw.random() < 0.5)
    if 0.3 <= fate < 0.6:
        wire = draw.choice(WIRE)(draw, wire)
    parts, most = [], draw.choice((1, 7, 60, 10**6))
    while wire:
        size = draw.randint(1, most)
        parts.append(wire[:size])
        wire = wire[size:]
    return parts, fate < 0.6 and draw.random() < 0.2, content, thinking, fate >= 0.6


@asynccontextmanager
async def behind_the_server(
    answer: Callable[[httpx.Request], httpx.Response], planner: AnyPlanner, **config: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the plug-in server, in this process, whose upstream's responses are what ``answer`` gives."""
    app = create_app(ServeConfig(upstream="http://upstream/v1", mode="turn", **config), planner)
    async with app.router.lifespan_context(app):
        client = httpx.AsyncClient(base_url="http://upstream/v1/", transport=httpx.MockTransport(answer))
        app.state.rsim.client = app.state.rsim.upstream.client = client
        app.state.rsim.upstream.backoff = 0.0
        async with httpx.AsyncClient(base_url="http://rsim/v1/", transport=httpx.ASGITransport(app)) as asking:
            yield asking


async def fuzz(count: int, seed: int) -> Counter[str]:
    """How many of ``count`` streams came to what."""
    draw, found = Draw(seed), Counter[str]()
    now: dict[str, Wire] = {}
    planner, alone = random_planner(load_strategies("default")), PlayRules(gate=1.0)
    async with behind_the_server(lambda request: httpx.Response(200, stream=now["wire"]), planner, rules=alone) as client:
        for number in range(count):
            parts, breaks, content, thinking, whole = _stream(draw)
            now["wire"] = Wire(parts, breaks)
            body = {"model": f"m{SUFFIX}", "messages": [{"role": "user", "content": "?"}], "stream": draw.random() < 0.5}
            told = await asyncio.wait_for(_ask(client, body), 20)
            outcome = _judged(told, content, thinking, whole)
            found[outcome] += 1
            if outcome not in ("whole answer", "error", "upstream's own reason"):
                print(f"  stream {number}: {outcome}: {told}, said {content!r}: {b''.join(parts)[:2000]!r}")
    return found


Told = tuple[str, str, str]  # how it ended, content, thinking


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Told:
    try:
        reply = await client.post("chat/completions", json=body)
        if reply.status_code >= 500 and reply.json()["error"]["type"] == "server_error":
            return "crash", "", ""
        if reply.status_code != 200:
            return "error", str(reply.json()["error"]["message"]), ""
        lines = reply.text.split("\n\n") if body["stream"] else [f"data: {reply.text}"]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    except Exception as error:  # counted: that is what is measured
        return "crash", f"{type(error).__name__}: {error}", ""
    if "error" in chunks[-1]:
        crashed = chunks[-1]["error"]["type"] == "server_error" and "this server" in chunks[-1]["error"]["message"]
        return "crash" if crashed else "error", str(chunks[-1]["error"]["message"]), ""
    choices = [chunk["choices"][0] for chunk in chunks]
    said = [(choice["delta"] if body["stream"] else choice["message"], choice["finish_reason"]) for choice in choices]
    content = "".join(delta.get("content") or "" for delta, _ in said)
    thinking = "".join((delta.get("reasoning_content") or "") + (delta.get("reasoning") or "") for delta, _ in said)
    return str(said[-1][1]), content, thinking


def _judged(told: Told, content: str, thinking: str, whole: bool) -> str:
    reason = told[0]
    if reason == "crash":
        return "crash"
    if reason == "error":
        return "harmless change told as an error" if whole else "error"
    if reason != "stop":
        return "wrong answer told as whole" if reason == "None" else "upstream's own reason"
    return "whole answer" if told[1:] == (content, thinking) else "wrong answer told as whole"
