"""Any OpenAI-compatible server as the upstream of a planned answer.

*prefill*: what was injected continues the open assistant turn, by the completions endpoint (the prompt is text already) or by
the chat endpoint with ``continue_final_message``. *turn*: the strategy is a message of its own, for hosted chat APIs that close
every turn. Which of the two a chat endpoint can do is probed once, by counting prompt tokens.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import httpx

from rsim.errors import UserError, check_url
from rsim.rules import in_block
from rsim.serving.planner_batcher import estimated_tokens
from rsim.serving.play import Asked, Conversation, Mode, StepEnd, Until, Usage, text_of

_RETRIED = {408, 429, 500, 502, 503, 504}
_UNSAID = object()
_PROBE = "one two three four five six seven eight"


class UpstreamError(Exception):
    """The upstream's answer to a request that it did not fulfil: an HTTP status and an OpenAI error object."""

    def __init__(self, status: int, error: dict[str, Any], retry_after: str | None = None) -> None:
        super().__init__(f"{status}: {error.get('message', '')}")
        self.status, self.error, self.retry_after = status, error, retry_after


class HttpUpstream:
    """``client`` is shared by all requests and owned by the caller; its base URL ends in ``/v1/``."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        mode: Mode,
        *,
        count: Callable[[str], int] = estimated_tokens,
        retries: int = 2,
        backoff: float = 0.2,
    ) -> None:
        """``count``: how many of the upstream's tokens an injected text takes, or an estimate."""
        self.client, self.mode, self.retries, self.backoff = client, mode, retries, backoff
        self.count = count

    async def open(self, asked: Asked) -> Conversation:
        return _HttpConversation(self, asked)

    async def send(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """A streaming response with status 200. Tried again, with jitter, as long as nothing was answered.

        Raises:
            UpstreamError: any other status in the end, or no connection (502), or no answer in time (504).
        """
        for attempt in range(self.retries + 1):
            try:
                response = await self.client.send(self.client.build_request("POST", path, json=body), stream=True)
            except httpx.TimeoutException as error:
                failure = UpstreamError(504, _error("the upstream did not answer in time", "timeout", error))
            except httpx.TransportError as error:
                failure = UpstreamError(502, _error("the upstream cannot be reached", "connection_error", error))
            else:
                if response.status_code == 200:
                    return response
                failure = await _refusal(response)
                if response.status_code not in _RETRIED:
                    raise failure
            if attempt == self.retries:
                raise failure
            await asyncio.sleep(self.backoff * 2**attempt * (0.5 + random.random()))
        raise AssertionError("unreachable")


def check_address(url: str, mode: str) -> None:
    """Raises `UserError` if ``url`` (or nothing) is no base URL, or ``mode`` none that an upstream can have."""
    if mode not in ("", "prefill", "turn"):
        raise UserError(f"--mode {mode}", "use prefill or turn, or leave it out")
    if url:
        check_url("--upstream", url)


async def probe(client: httpx.AsyncClient, model: str) -> Mode:
    """Whether the chat endpoint can continue an open assistant turn.

    A continued turn costs the prompt as many tokens as its text; a closed one costs the tokens that close it and open the next
    one as well. The text's own tokens are the difference between a long and a doubled text.

    Raises:
        UpstreamError: the upstream refuses an ordinary chat request.
    """
    user = {"role": "user", "content": "count"}
    alone = await prompt_tokens(client, {"model": model, "messages": [user]})
    counts = []
    for text in (_PROBE, f"{_PROBE} {_PROBE}"):
        messages = [user, {"role": "assistant", "content": text}]
        body = {"model": model, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        try:
            counts.append(await prompt_tokens(client, body))
        except UpstreamError as error:
            if error.status in _RETRIED or error.status == 501:
                raise
            return "turn"  # it refuses these fields, or a last message by the assistant
    once, twice = counts
    around = once - alone - (twice - once)
    return "prefill" if around < 2 else "turn"


async def prompt_tokens(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """How many tokens the upstream counts in a chat request's prompt."""
    try:
        response = await client.post("chat/completions", json=body | {"max_tokens": 1, "temperature": 0})
    except httpx.TransportError as error:
        raise UpstreamError(502, _error("the upstream cannot be reached", "connection_error", error)) from error
    if response.status_code != 200:
        raise await _refusal(response)
    try:
        answered = response.json()
    except ValueError as error:
        raise UpstreamError(502, _error("the upstream sent no JSON", "upstream_error", error)) from error
    usage = (answered.get("usage") if isinstance(answered, dict) else None) or {}
    if "prompt_tokens" not in usage:
        problem = {"message": "the upstream does not count prompt tokens: state --mode", "type": "upstream_error"}
        raise UpstreamError(501, problem)
    return int(usage["prompt_tokens"])


class _HttpConversation:
    def __init__(self, upstream: HttpUpstream, asked: Asked) -> None:
        self.upstream, self.asked = upstream, asked
        self.steps: list[tuple[str, str]] = []  # (injected, written), delimiters included
        self.pending = ""  # injected with the next step
        self.calls = 0

    def inject(self, text: str) -> None:
        self.pending += text

    def count(self, text: str) -> int:
        return self.upstream.count(text)

    async def step(self, max_new_tokens: int, until: Until) -> AsyncGenerator[str | StepEnd]:
        """One request or, where the upstream stopped at a blank line inside a code block and can go on from there, several."""
        injected, self.pending = self.pending, ""
        self.steps.append((injected, ""))
        usage, end, goes_on = Usage(), StepEnd("cap", Usage()), True
        while goes_on:
            written = ""
            async with aclosing(self._request(max_new_tokens - usage.completion_tokens, until.stops)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, StepEnd):
                        end = piece
                    else:
                        written += piece
                        yield piece
            usage.add(end.usage)
            earlier = self.steps[-1][1]
            reason = "end_of_turn" if end.reason == "unknown" and earlier and not written else end.reason
            stopped = bool(until.stops) and (reason == "delimiter" or (reason == "unknown" and bool(written)))
            goes_on = (
                stopped
                and bool(until.delimiter)
                and in_block(until.answer_prefix + earlier + written)
                and self._goes_on_anywhere()
                and end.usage.completion_tokens > 0
                and usage.completion_tokens < max_new_tokens
            )
            met = until.stops[0] if stopped else ""  # an upstream leaves out the string that it stopped at
            self.steps[-1] = (injected, earlier + written + met)
            if met:
                yield met
        yield StepEnd(reason, usage, self.steps[-1][1])

    def _goes_on_anywhere(self) -> bool:
        """Whether an answer can be continued in the middle; where each strategy is a message of its own, it cannot."""
        return self.asked.messages is None or self.upstream.mode == "prefill"

    async def _request(self, limit: int, stops: tuple[str, ...]) -> AsyncGenerator[str | StepEnd]:
        body = self._body() | self.asked.sampling
        if "seed" in body:  # another one for each request: with the same, every step would draw the same numbers
            body["seed"] += self.calls
        self.calls += 1
        body |= {"model": self.asked.model, "max_tokens": limit, "stream": True, "stream_options": {"include_usage": True}}
        if stops:
            body["stop"] = list(stops)
        path = "completions" if self.asked.messages is None else "chat/completions"
        response = await self.upstream.send(path, body)
        usage, reason, stopped_at, count = None, "unknown", _UNSAID, 0
        try:
            async for chunk in _chunks(response):
                for choice in chunk.get("choices", []):
                    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    reason = choice.get("finish_reason") or reason
                    stopped_at = choice.get("stop_reason", stopped_at)
                    if text:
                        count += 1
                        yield text
                if chunk.get("usage"):
                    usage = _usage(chunk["usage"])
        finally:
            await response.aclose()
        yield StepEnd(_why(reason, stopped_at, stops), usage or Usage(0, count, 0, estimated=True))

    def _body(self) -> dict[str, Any]:
        if self.asked.messages is None:
            return {"prompt": (self.asked.prompt or "") + "".join(i + w for i, w in self.steps)}
        if self.upstream.mode == "prefill":
            said, earlier = "".join(i + w for i, w in self.steps), self.asked.messages
            if self.asked.continues:
                said, earlier = text_of(earlier[-1].get("content")) + said, earlier[:-1]
            messages = [*earlier, {"role": "assistant", "content": said}]
            return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        return {"messages": self._turns()}

    def _turns(self) -> list[dict[str, Any]]:
        """Each strategy as a user message, the first one joined to the question: two user messages in a row break templates."""
        messages = [dict(m) for m in self.asked.messages or []]
        for number, (injected, written) in enumerate(self.steps):
            if number == 0 and messages and messages[-1].get("role") == "user":
                content = messages[-1].get("content")
                more = {"type": "text", "text": injected}
                messages[-1]["content"] = (
                    [*content, more] if isinstance(content, list) else "\n\n".join(t for t in (text_of(content), injected) if t)
                )
            else:
                messages.append({"role": "user", "content": injected.strip() or "Go on."})
            if written:
                messages.append({"role": "assistant", "content": written.rstrip()})
        return messages

    def room(self) -> int:
        """The upstream's context is its own to watch."""
        return sys.maxsize

    async def close(self) -> None:
        """Nothing is kept upstream between steps."""


def _why(reason: str, stopped_at: Any, stops: tuple[str, ...]) -> Any:
    """The end of a step by ``finish_reason`` and, where the upstream has it, ``stop_reason`` (the string that was met)."""
    if reason == "length":
        return "cap"
    if not stops:
        return "end_of_turn"
    if stopped_at is _UNSAID:
        return "unknown"
    return "delimiter" if stopped_at in stops else "end_of_turn"


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream.

    Raises:
        UpstreamError: the connection broke, or the upstream reports an error within the stream.
    """
    try:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                continue  # what follows ends the response; a connection that is not read to its end cannot be used again
            try:
                chunk = json.loads(data)
            except ValueError as error:
                raise UpstreamError(502, _error("the upstream sent no JSON", "upstream_error", error)) from error
            if not isinstance(chunk, dict) or chunk.get("error"):
                raise UpstreamError(502, _problem(chunk, data, 502))
            yield chunk
    except httpx.TimeoutException as error:
        raise UpstreamError(504, _error("the upstream stopped answering", "timeout", error)) from error
    except httpx.TransportError as error:
        raise UpstreamError(502, _error("the connection to the upstream broke", "connection_error", error)) from error


def _usage(given: dict[str, Any]) -> Usage:
    cached = (given.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(int(given.get("prompt_tokens", 0)), int(given.get("completion_tokens") or 0), int(cached))


async def _refusal(response: httpx.Response) -> UpstreamError:
    raw = await response.aread()
    await response.aclose()
    try:
        answered = json.loads(raw)
    except ValueError:
        answered = None
    problem = _problem(answered, raw.decode(errors="replace"), response.status_code)
    return UpstreamError(response.status_code, problem, response.headers.get("retry-after"))


def _problem(answered: Any, raw: str, status: int) -> dict[str, Any]:
    """The error object of what an upstream answered, in whatever form it said what is wrong."""
    error = answered.get("error") if isinstance(answered, dict) else None
    if isinstance(error, dict):
        return error
    message = error if isinstance(error, str) else raw[:500]
    return {"message": message or f"the upstream answered {status}", "type": "upstream_error"}


def _error(message: str, kind: str, cause: Exception) -> dict[str, Any]:
    return {"message": f"{message} ({type(cause).__name__})", "type": kind, "param": None, "code": None}
