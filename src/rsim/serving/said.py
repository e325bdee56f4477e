"""What an OpenAI-compatible server says, in any of its forms: pieces of text and of thinking, then one end. Or an error.

A stream or a whole answer, as OpenAI, vLLM, llama.cpp, Ollama, TGI, LiteLLM and OpenRouter send them. What cannot be read is
an error that shows it: an answer that breaks off, or is not one, must not pass for a whole one.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from rsim.serving.play import Thought, Usage

UNSAID = object()
_FIELDS = (":", "event:", "id:", "retry:")  # lines of an event stream that are no data
# Ways of saying what ended an answer, in small letters and without "finish_reason_"; any other is told as it is.
_STOPPED = {"stop", "eos", "eos_token", "stop_sequence", "stop_token", "end_turn", "complete", "completed", "finished"}
_CUT = {"length", "max_tokens", "max_output_tokens", "max_new_tokens", "max_length", "model_length", "token_limit"}
_BROKEN = {"error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource"}
_THINKING = ("reasoning_content", "reasoning")
_TEXTS = ("text", "output_text", None)  # types of a content's parts
_THOUGHTS = ("thinking", "reasoning")
_OPEN, _CLOSE = "<think>", "</think>"
_BREAK = re.compile(rb"\r\n|\r|\n")
_HALF = re.compile("[\ud800-\udfff]")
_SHOWN = 300  # characters of what cannot be read
_LAST_SECONDS = 1.0  # that a response may take to end behind its [DONE]


class UpstreamError(Exception):
    """The upstream's answer to a request that it did not fulfil: an HTTP status and an OpenAI error object."""

    def __init__(self, status: int, error: dict[str, Any], retry_after: str | None = None) -> None:
        super().__init__()
        self.status, self.error, self.retry_after = status, error, retry_after

    def __str__(self) -> str:
        return f"{self.status}: {self.error.get('message', '')}"


@dataclass(frozen=True)
class Said:
    """The end of an answer. ``reason``: stop, length or what else the upstream calls it; ``stopped_at``: the stop string that
    it met, `UNSAID` by most; ``usage``: None where it counted nothing; ``thought``: how many of its tokens were thinking."""

    reason: str
    stopped_at: Any
    usage: Usage | None
    thought: int = 0


async def read(response: httpx.Response) -> AsyncGenerator[str | Thought | Said]:
    """What a response with status 200 says.

    Raises:
        UpstreamError: the connection broke, an error was reported or there is no end; or it cannot be read.
    """
    reason, stopped_at, usage, thought = "", UNSAID, None, 0
    content = _Content()
    last: dict[str, Any] = {}
    try:
        async with aclosing(_chunks(response)) as chunks:
            async for chunk in chunks:
                last = chunk
                for choice in _choices(chunk):
                    for piece in content.add(choice):
                        yield piece
                    stopped_at = choice.get("stop_reason", stopped_at)
                    reason = _finish(choice) or reason
                counted = chunk.get("usage")
                usage = _usage(counted) or usage
                details = counted.get("completion_tokens_details") if isinstance(counted, dict) else None
                thought = _count(details, "reasoning_tokens") or thought
    except httpx.RequestError as error:
        if not reason:  # else all was said
            raise lost(error) from error
    finally:
        await response.aclose()
    for piece in content.rest():
        yield piece
    if not reason:
        raise broken("the upstream's answer broke off: it sent no finish_reason", json.dumps(last) if last else "")
    yield Said(reason, stopped_at, usage, thought)


async def _chunks(response: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream or, if it is none, the whole answer as the only one."""
    data, other, chunks = "", "", 0
    lines = _lines(response)
    async for line in lines:
        if line.startswith("data:"):
            data += line[5:].strip()
            if data == "[DONE]":
                await _read_on(lines)
                return
            chunk = _parsed(data)
            if chunk is not None:
                chunks, data = chunks + 1, ""
                yield chunk
        elif not line.strip() and data:
            raise broken("the upstream sent no JSON", data)
        elif line.strip() and not line.startswith(_FIELDS):
            other += line + "\n"
    if data or other:
        whole = None if chunks or data else _parsed(other)
        if whole is None:
            raise broken("the upstream sent no JSON", data or other)
        yield whole


async def _read_on(lines: AsyncGenerator[str]) -> None:
    """A connection that is not read to its end is lost; but some are left open, or break, when all was said."""
    with suppress(TimeoutError, httpx.RequestError, UpstreamError):
        async with asyncio.timeout(_LAST_SECONDS):
            async for _ in lines:
                pass


async def _lines(response: httpx.Response) -> AsyncGenerator[str]:
    """Only the protocol's own line breaks (CR LF, LF, CR) end a line: U+2028, U+2029 and U+0085 are text."""
    rest: list[bytes] = []  # a long line may come in very many parts
    first, after_cr = True, False
    async for part in response.aiter_bytes():
        if after_cr:  # the second half of a CR LF
            part = part.removeprefix(b"\n")
        after_cr = part.endswith(b"\r")
        *lines, last = _BREAK.split(part)
        for line in lines:
            yield _text_line(b"".join([*rest, line]), first)
            rest, first = [], False
        rest.append(last)
    yield _text_line(b"".join(rest), first)


def _text_line(line: bytes, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise broken("the upstream sent no UTF-8", line.decode(errors="replace")) from error


def _parsed(data: str) -> dict[str, Any] | None:
    """None if it is not (yet) JSON."""
    try:
        chunk = json.loads(data) if data else None
    except (ValueError, RecursionError):
        return None
    if chunk is not None and not isinstance(chunk, dict):
        raise broken("the upstream sent no JSON object", data)
    return chunk


def _choices(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of the one answer that was asked for in a chunk."""
    choices = chunk.get("choices")
    if chunk.get("error") or ("usage" not in chunk and "choices" not in chunk):
        raise refusal(200, chunk, json.dumps(chunk))
    for choice in _expect(chunk, choices or [], list):
        _expect(chunk, choice, dict)
        if choice.get("error"):
            raise refusal(200, choice, json.dumps(chunk))
        if choice.get("index") not in (None, 0):
            raise broken("the upstream sent several answers", json.dumps(chunk))
    return choices or []


def _expect(chunk: Any, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise broken("the upstream answered in an unknown form", json.dumps(chunk))
    return value


def _finish(choice: dict[str, Any]) -> str:
    reason: str = _HALF.sub("\ufffd", _expect(choice, choice.get("finish_reason") or "", str))
    plain = reason.lower().removeprefix("finish_reason_")
    if plain in _BROKEN:
        raise broken(f"the upstream ended its answer with {reason!r}")
    return "stop" if plain in _STOPPED else "length" if plain in _CUT else reason


class _Content:
    """Text and thinking out of the pieces of an answer.

    Thinking comes in a field of its own or at the beginning of the content, between tags; blank space behind it is part of it.
    Half a character waits for its other half; one that stays alone has no form in UTF-8 and becomes U+FFFD.
    """

    def __init__(self) -> None:
        self.place = "start"  # then inside thinking, behind it, or text
        self.held = ""  # content that may be a tag, or half a character
        self.half = ""  # a character of thinking in a field of its own

    def add(self, choice: dict[str, Any]) -> list[str | Thought]:
        said = _expect(choice, choice.get("delta") or choice.get("message") or choice, dict)
        pieces: list[str | Thought] = []
        field = next((f for f in _THINKING if said.get(f)), "")  # some send the same in both
        if field:
            pieces += self._think(_expect(choice, said[field], str), field)
        content = said.get("content") or said.get("refusal") or said.get("text") or ""
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in _THOUGHTS:
                pieces += self._think(_part_text(choice, part), _THINKING[0])
            else:
                pieces += self._split(_part_text(choice, part) if isinstance(content, list) else _expect(choice, content, str))
        return pieces

    def rest(self) -> list[str | Thought]:
        """What was held back, now that nothing follows."""
        if not self.held:
            return []
        text = _HALF.sub("\ufffd", self.held)
        return [Thought(text, "content") if self.place in ("inside", "behind") else text]

    def _think(self, text: str, field: str) -> list[str | Thought]:
        text, self.half = _whole_characters(self.half + text)
        self.place = "behind" if self.place == "start" else self.place
        return [Thought(text, field)] if text else []

    def _split(self, text: str) -> list[str | Thought]:
        text, self.held = _whole_characters(self.held + text)
        half = self.held
        bare = text.lstrip()
        if self.place == "start" and bare:
            if len(bare) < len(_OPEN) and _OPEN.startswith(bare):
                self.held = text + half
                return []
            self.place = "inside" if bare.startswith(_OPEN) else "text"
        end = 0
        if self.place == "inside":
            end = text.find(_CLOSE) + len(_CLOSE)
            if end < len(_CLOSE):
                end = len(text) - _overlap(text, _CLOSE)
                self.held = text[end:] + half
                return [Thought(text[:end], "content")] if end else []
            self.place = "behind"
        if self.place == "behind":
            end += len(text[end:]) - len(text[end:].lstrip())
            self.place = "text" if end < len(text) else "behind"
        pieces: list[str | Thought] = [Thought(text[:end], "content")] if end else []
        return pieces + ([text[end:]] if text[end:] else [])


def _part_text(choice: Any, part: Any) -> str:
    """Of a text or a thinking: a text, or parts again, under the name of its type or "text"."""
    kind = _expect(choice, part, dict).get("type")
    if kind not in (*_TEXTS, *_THOUGHTS, "refusal"):
        raise broken(f"the upstream's content has a part of type {kind!r}, which is no text", json.dumps(part))
    said = part.get(kind, part.get("text"))
    if isinstance(said, list):
        return "".join(_part_text(choice, one) for one in said)
    text: str = _expect(choice, said, str)
    return text


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    return max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)


def _whole_characters(text: str) -> tuple[str, str]:
    """``text`` with its UTF-16 halves joined, and a half at its end that waits for the other."""
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    text = text.removesuffix(half) if half else text
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _HALF.search(text) else text
    return joined, half


def _usage(given: Any) -> Usage | None:
    prompt, sampled = _count(given, "prompt_tokens"), _count(given, "completion_tokens")
    if prompt is None or sampled is None:
        return None
    return Usage(prompt, sampled, _count(given.get("prompt_tokens_details"), "cached_tokens") or 0)


def _count(given: Any, key: str) -> int | None:
    value = given.get(key) if isinstance(given, dict) else None
    return value if isinstance(value, int) and value >= 0 else None


# --- errors ---


def refusal(status: int, answered: Any, raw: str, retry_after: str | None = None) -> UpstreamError:
    """The error of what an upstream answered, in whatever form it said what is wrong. In an answer with status 200 its code is
    the status."""
    said = answered if isinstance(answered, dict) else {}
    error = said.get("error") or {k: said.get(k) for k in ("message", "type", "param", "code")}  # the latter: vLLM's
    problem = dict(error) if isinstance(error, dict) else {"message": error}
    message = problem.get("message") or said.get("detail") or raw[:_SHOWN] or f"the upstream answered {status}"
    code = problem.get("code")
    if status < 400:
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    problem |= {"message": str(message), "type": problem.get("type") or "upstream_error"}
    whole = _HALF.sub("\ufffd", json.dumps(problem, ensure_ascii=False))  # halves of characters have no form in UTF-8
    return UpstreamError(status, json.loads(whole, parse_constant=str), retry_after)  # nor NaN in JSON


def broken(message: str, shown: str = "") -> UpstreamError:
    """An answer that is none."""
    return UpstreamError(502, {"message": f"{message}: {shown[:_SHOWN]}" if shown else message, "type": "upstream_error"})


def lost(cause: httpx.RequestError) -> UpstreamError:
    """An answer that had begun and broke off."""
    late = isinstance(cause, httpx.TimeoutException)
    return unreached("the upstream stopped answering" if late else "the connection to the upstream broke", cause)


def unreached(message: str, cause: httpx.RequestError) -> UpstreamError:
    """A connection that failed, with its cause."""
    status, kind = (504, "timeout") if isinstance(cause, httpx.TimeoutException) else (502, "connection_error")
    shown = "" if isinstance(cause, httpx.LocalProtocolError) else str(cause)  # that one shows a header, which may be a key
    why = f"{type(cause).__name__}: {shown}" if shown else type(cause).__name__
    return UpstreamError(status, {"message": f"{message} ({why})", "type": kind, "param": None, "code": None})
