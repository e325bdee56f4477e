"""Any OpenAI-compatible server as the upstream of a planned answer.

*prefill*: what was injected continues the open assistant turn, by the completions endpoint (the prompt is text already) or by
the chat endpoint with ``continue_final_message``. *turn*: the strategy is a message of its own, for hosted chat APIs that close
every turn. Which of the two a chat endpoint can do is probed once, by counting prompt tokens.

A step ends here, where its delimiter is read, and the call is hung up: most upstreams do not say whether they stopped at a
string or at the end of their turn. One that does (``stop_reason``) and can go on is asked to stop. As long as nothing is
injected, one call goes on from step to step.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rsim.errors import UserError
from rsim.rules import End, in_block, step_end
from rsim.serving import tracing
from rsim.serving.planner_batcher import estimated_tokens
from rsim.serving.play import (
    Asked,
    Conversation,
    Headers,
    Mode,
    StepEnd,
    TextDelta,
    Thought,
    Until,
    Usage,
    next_seed,
    text_of,
    tokens_in,
)
from rsim.serving.said import UNSAID, Said, UpstreamError, broken, read, refusal
from rsim.serving.upstream_client import refused, unanswered

_RETRIED = {408, 429, 500, 502, 503, 504}
_END_TOKENS = 4  # at most, which end a turn and are no text
_JSON = [(b"content-type", b"application/json")]  # in ASCII: a client's half of a character is passed on as it came
_PROBE = "one two three four five six seven eight"


class HttpUpstream:
    """``client`` is shared by all requests and owned by the caller: `upstream_client`."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        mode: Mode,
        *,
        count: Callable[[str], int] = estimated_tokens,
        tells: bool = False,
        retries: int = 2,
        backoff: float = 0.2,
        patience: float = 10.0,
    ) -> None:
        """
        Args:
            count: how many of the upstream's tokens an injected text takes, or an estimate.
            tells: it says at which string it stopped, in ``stop_reason``.
            patience: seconds; where ``Retry-After`` asks for more, the refusal is told instead.
        """
        self.client, self.mode, self.count, self.tells = client, mode, count, tells
        self.retries, self.backoff, self.patience = retries, backoff, patience
        self.thinkers: set[str] = set()  # models that were seen to think
        self.newer: set[str] = set()  # models that know max_completion_tokens alone

    async def open(self, asked: Asked) -> Conversation:
        return _HttpConversation(self, asked)

    async def text(self, asked: Asked) -> str:
        """Of a prompt that was sent as token ids, by the server's ``/detokenize`` (vLLM's, llama.cpp's).

        Raises:
            UserError: it has none.
            UpstreamError: it cannot be asked.
        """
        told: str = await self._of_tokens("detokenize", asked, ("prompt", "content"), str, tokens=asked.prompt_ids)
        return told

    async def ids_of(self, text: str, asked: Asked) -> list[int]:
        """By its ``/tokenize``: what goes on behind a prompt of token ids."""
        plain = {"add_special_tokens": False, "add_special": False}  # vLLM's name and llama.cpp's
        ids: list[int] = await self._of_tokens("tokenize", asked, ("tokens",), list, prompt=text, content=text, **plain)
        return ids

    async def _of_tokens(self, path: str, asked: Asked, fields: tuple[str, ...], kind: type, **body: Any) -> Any:
        """The first of the ``fields`` that the answer has. These two are beside the API, not below it."""
        try:
            url = self.client.base_url.join(f"../{path}")
            response = await self.client.post(url, json=body | {"model": asked.model}, headers=[*asked.headers])
        except httpx.RequestError as error:
            raise unanswered(error) from error
        if response.status_code in _RETRIED:
            raise await refused(response)
        if response.status_code != 200:
            problem = f"the upstream cannot read token ids: its /{path} answers {response.status_code}"
            raise UserError(problem, "send the prompt as text")
        try:
            told = response.json()
        except ValueError:
            told = None
        found = next((told[field] for field in fields if field in told), None) if isinstance(told, dict) else None
        if not isinstance(found, kind):
            raise broken(f"the upstream's /{path} answers in an unknown form", response.text)
        return found

    async def call(self, path: str, body: dict[str, Any], headers: Headers = ()) -> _Call:
        """An answer that has begun. Tried again, with jitter or when ``Retry-After`` says, as long as nothing was answered.

        Raises:
            UpstreamError: a refusal in the end, or no connection (502), or no answer in time (504).
        """
        for attempt in range(self.retries + 1):
            try:
                pieces = read(await self._send(path, body, headers))
                return _Call(pieces, await anext(pieces))
            except UpstreamError as failure:
                wait = max(self.backoff * 2**attempt * (0.5 + random.random()), _seconds(failure.retry_after))
                if failure.status not in _RETRIED or attempt == self.retries or wait > self.patience:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _send(self, path: str, body: dict[str, Any], headers: Headers) -> httpx.Response:
        try:
            request = self.client.build_request("POST", path, content=json.dumps(body), headers=[*headers, *_JSON])
            response = await self.client.send(request, stream=True)
        except httpx.RequestError as error:
            raise unanswered(error) from error
        if response.status_code != 200:
            raise await refused(response)
        return response


def _seconds(retry_after: str | None) -> float:
    """A ``Retry-After`` header: seconds, or a date."""
    try:
        return float(retry_after or 0)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after or "").timestamp() - time.time()
    except ValueError:
        return 0.0


async def probe(client: httpx.AsyncClient, model: str, headers: Headers = ()) -> tuple[Mode, bool]:
    """Whether the chat endpoint can continue an open assistant turn, and whether it tells at which string it stopped.

    A continued turn costs the prompt as many tokens as its text; a closed one costs the tokens that close it and open the next
    one as well. The text's own tokens are the difference between a long and a doubled text.

    Raises:
        UpstreamError: the upstream refuses an ordinary chat request.
    """
    user = {"role": "user", "content": "count"}
    alone, tells = await prompt_tokens(client, {"model": model, "messages": [user]}, headers)
    counts = []
    for text in (_PROBE, f"{_PROBE} {_PROBE}"):
        messages = [user, {"role": "assistant", "content": text}]
        body = {"model": model, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        try:
            counts.append((await prompt_tokens(client, body, headers))[0])
        except UpstreamError as error:
            if error.status in _RETRIED or error.status == 501:
                raise
            return "turn", tells  # it refuses these fields, or a last message by the assistant
    once, twice = counts
    around = once - alone - (twice - once)
    return "prefill" if around < 2 else "turn", tells


async def prompt_tokens(client: httpx.AsyncClient, body: dict[str, Any], headers: Headers = ()) -> tuple[int, bool]:
    """How many tokens the upstream counts in a chat request's prompt, and whether its answers have a ``stop_reason``."""
    for limit in ("max_tokens", "max_completion_tokens"):  # some models know the second alone
        try:
            response = await client.post("chat/completions", json=body | {limit: 1}, headers=[*headers])
        except httpx.RequestError as error:
            raise unanswered(error) from error
        if response.status_code != 400 or "max_completion_tokens" not in response.text:
            break
    if response.status_code != 200:
        raise await refused(response)
    try:
        answered = response.json()
        choices = answered.get("choices") or []
        tokens = (answered.get("usage") or {}).get("prompt_tokens")
        tells = any("stop_reason" in choice for choice in choices)
    except (ValueError, AttributeError, TypeError) as error:
        raise broken("the upstream's answer cannot be read", response.text) from error
    if not isinstance(tokens, int):
        if answered.get("error"):
            raise refusal(200, answered, response.text)
        problem = {"message": "the upstream does not count prompt tokens: state --mode", "type": "upstream_error"}
        raise UpstreamError(501, problem)
    return tokens, tells


@dataclass
class _Call:
    """A request whose answer is being read. ``ahead``: what was read and not yet used."""

    pieces: AsyncGenerator[str | Thought | Said]
    ahead: str | Thought | Said | None
    stops: tuple[str, ...] = ()  # that it was asked to stop at
    limit: int = 0  # tokens that it may write
    thinks: bool = False  # there is room for thinking among them
    prompt: str = ""
    accounted: Usage = field(default_factory=Usage)  # to earlier steps

    async def next(self) -> str | Thought | Said:
        ahead, self.ahead = self.ahead, None
        return await anext(self.pieces) if ahead is None else ahead

    def estimate(self, tokens: int) -> Usage:
        """Of a step that was cut, or that the upstream did not count."""
        prompt = 0 if self.accounted.estimated else estimated_tokens(self.prompt)
        usage = Usage(prompt, tokens, 0, estimated=True)
        self.accounted.add(usage)
        return usage

    def counted(self, usage: Usage) -> Usage:
        """What the upstream counted, less what is accounted for."""
        prompt, sampled = self.accounted.prompt_tokens, self.accounted.completion_tokens
        return Usage(max(0, usage.prompt_tokens - prompt), max(0, usage.completion_tokens - sampled), usage.cached_tokens)


class _HttpConversation:
    def __init__(self, upstream: HttpUpstream, asked: Asked) -> None:
        self.upstream, self.asked = upstream, asked
        self.steps: list[tuple[str, str]] = []  # (injected, written), delimiters included
        self.pending = ""  # injected with the next step
        self.calls = 0
        self.call: _Call | None = None
        self.spent = Usage()  # in the step, by calls that are over
        self.continues = asked.messages is None or upstream.mode == "prefill"  # an answer, in the middle of it

    def inject(self, text: str) -> None:
        self.pending += text

    def count(self, text: str) -> int:
        return self.upstream.count(text)

    async def step(self, max_new_tokens: int, until: Until) -> AsyncGenerator[TextDelta | Thought | StepEnd]:
        """Of the call that goes on, where nothing is injected and it may write so much; else of a new one."""
        call, injected = self.call, self.pending if self.continues else self.pending.strip()
        if call is None or injected or until.strict or call.limit - call.accounted.completion_tokens < max_new_tokens:
            await self.close()
            self.steps.append((self.pending, ""))
            call = await self._ask(max_new_tokens, until)
        self.pending = ""
        self.spent = spent = Usage()
        text, wrote, thoughts, wasted, told = "", 0, 0, 0, ""
        end: End | None = None
        while end is None:
            said = await call.next()
            if not self.steps[-1][1] and self._thinks(said, call):  # and was not expected to
                await self.close()
                spent.add(call.counted(said.usage) if isinstance(said, Said) and said.usage else call.estimate(1))
                wasted = spent.completion_tokens
                call = await self._ask(max_new_tokens, until)
            elif isinstance(said, Thought):
                thoughts += tokens_in(said.text)
                if said.place == "content" and self.continues:
                    self._wrote(said.text)
                yield said
            elif isinstance(said, str):
                at = _cut(text, said, until)
                if at >= 0:
                    said, call.ahead = said[:at], said[at:] or None
                wrote += tokens_in(said)
                text += said
                self._wrote(said)
                yield TextDelta(said)
                end = "delimiter" if at >= 0 else "cap" if max_new_tokens <= wrote < call.limit else None
                if end:
                    spent.add(call.estimate(wrote + thoughts))
            else:
                await self.close()
                usage = call.counted(said.usage) if said.usage else call.estimate(wrote + thoughts)
                spent.add(usage)
                thoughts = max(thoughts, said.thought)
                end = self._why(said, call, text)
                told = said.reason if end == "end_of_turn" and said.reason != "stop" else ""
                told = "length" if end == "cap" and thoughts and not text else told
                if end == "delimiter":  # an upstream leaves out the string that it stopped at
                    text += call.stops[0]
                    self._wrote(call.stops[0])
                    yield TextDelta(call.stops[0])
                    left = max_new_tokens - spent.completion_tokens
                    if until.delimiter and in_block(until.answer_prefix + text) and usage.completion_tokens and left > 0:
                        wrote, end = 0, None
                        call = await self._ask(left, until)
                if end == "end_of_turn" and not told and not any(written for _, written in self.steps):
                    self._check_silence(thoughts, usage)
        yield StepEnd("end_of_turn" if told else end, spent, text, thoughts + wasted, told)

    def cut(self, tokens: int) -> Usage:
        usage = replace(self.spent)
        if self.call:
            usage.add(self.call.estimate(tokens))
        return usage

    def _check_silence(self, thoughts: int, usage: Usage) -> None:
        """Raises `UpstreamError` for an answer without a word, unless the model did end its turn at once."""
        if thoughts and self.continues:  # vLLM's reasoning parsers wait for the end of a thinking that was not begun
            raise broken("the upstream takes an answer that it continues for thinking: use --mode turn")
        if not thoughts and (not usage.completion_tokens or usage.completion_tokens > _END_TOKENS):
            raise broken(f"the upstream ended its answer without a word, of {usage.completion_tokens} tokens")

    def _wrote(self, text: str) -> None:
        injected, written = self.steps[-1]
        self.steps[-1] = (injected, written + text)

    def _thinks(self, said: str | Thought | Said, call: _Call) -> bool:
        """Whether a model turns out to think in a call that has no room for it, or would be stopped inside of it."""
        hidden = isinstance(said, Said) and bool(said.thought) and said.reason == "length"
        if not (hidden or isinstance(said, Thought)):
            return False
        self.upstream.thinkers.add(self.asked.model)
        return not call.thinks and bool(self.asked.thinking or call.stops)

    def _why(self, said: Said, call: _Call, text: str) -> End:
        if said.reason == "length":
            return "cap"
        if call.stops and said.stopped_at is UNSAID:  # it did tell when it was probed
            self.upstream.tells = False
            return "delimiter" if text.strip() else "end_of_turn"
        self.upstream.tells |= said.stopped_at is not UNSAID
        return "delimiter" if said.stopped_at in call.stops else "end_of_turn"

    async def _ask(self, max_new_tokens: int, until: Until) -> _Call:
        asked, thinks = self.asked, self.asked.model in self.upstream.thinkers
        stops = until.stops if self.upstream.tells and self.continues and not thinks and not until.beyond else ()
        limit = max(max_new_tokens, until.beyond) + (asked.thinking if thinks else 0)
        body = await self._body() | asked.sampling
        if "seed" in body:  # another one for each request: with the same, every step would draw the same numbers
            body["seed"] = next_seed(body["seed"], self.calls)
        self.calls += 1
        body |= {"model": asked.model, "stream": True, "stream_options": {"include_usage": True}}
        if until.strict:
            body["response_format"] = asked.form
        if stops:
            body["stop"] = list(stops)
        path = "completions" if asked.messages is None else "chat/completions"
        call = await self._begun(path, body, limit)
        call.stops, call.limit, call.thinks = stops, limit, thinks
        call.prompt = (asked.prompt or "") + self._said() + "".join(text_of(m.get("content")) for m in asked.messages or [])
        self.call = call
        return call

    async def _begun(self, path: str, body: dict[str, Any], limit: int) -> _Call:
        """A call with a limit of tokens, in the field that the model knows: the client may have named none."""
        asked, newer = self.asked, self.upstream.newer
        field = "max_completion_tokens" if asked.model in newer else asked.limit_field
        try:
            return await self.upstream.call(path, body | {field: limit}, tracing.passed_on(asked.headers))
        except UpstreamError as refusal:
            if refusal.status != 400 or field != "max_tokens" or "max_completion_tokens" not in str(refusal):
                raise
        newer.add(asked.model)
        return await self._begun(path, body, limit)

    def _said(self) -> str:
        """Of the answer so far, what was injected included."""
        return "".join(injected + written for injected, written in self.steps)

    async def _body(self) -> dict[str, Any]:
        said, ids = self._said(), self.asked.prompt_ids
        if ids is not None:
            return {"prompt": ids + (await self.upstream.ids_of(said, self.asked) if said else [])}
        if self.asked.messages is None:
            return {"prompt": (self.asked.prompt or "") + said}
        if self.upstream.mode == "prefill":
            earlier = self.asked.messages
            if self.asked.continues:
                said, earlier = text_of(earlier[-1].get("content")) + said, earlier[:-1]
            if not said:  # nothing to continue: the turn is not open yet
                return {"messages": earlier}
            messages = [*earlier, {"role": "assistant", "content": said}]
            return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        return {"messages": self._turns()}

    def _turns(self) -> list[dict[str, Any]]:
        """Each strategy as a user message, joined to the one before where nothing was written between them: two user
        messages in a row break templates, and many servers refuse an empty answer."""
        messages = [dict(m) for m in self.asked.messages or []]
        for injected, written in self.steps:
            if messages and messages[-1].get("role") == "user":
                content = messages[-1].get("content")
                more = [{"type": "text", "text": injected}] if injected else []
                messages[-1]["content"] = (
                    content + more if isinstance(content, list) else "\n\n".join(t for t in (text_of(content), injected) if t)
                )
            else:
                messages.append({"role": "user", "content": injected.strip() or "Go on."})
            if written.strip():
                messages.append({"role": "assistant", "content": written.rstrip()})
        return messages

    def room(self) -> int:
        """The upstream's context is its own to watch."""
        return sys.maxsize

    async def close(self) -> None:
        """Hangs up. Nothing is kept upstream between calls."""
        call, self.call = self.call, None
        if call is not None:
            await call.pieces.aclose()


def _cut(text: str, piece: str, until: Until) -> int:
    """Where in ``piece``, which follows ``text``, a step is over; -1: it goes on."""
    if not any(set(piece) & set(stop) for stop in until.stops):
        return -1
    before = until.answer_prefix + text
    whole = before + piece
    if until.delimiter:
        ends = [(step_end(whole, until.delimiter), len(until.delimiter))]
    else:
        ends = [(whole.find(stop), len(stop)) for stop in until.strings]
    return min((at + length - len(before) for at, length in ends if at >= 0), default=-1)
