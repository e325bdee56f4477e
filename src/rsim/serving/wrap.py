"""``Planner.wrap``: a transformers model or an OpenAI client whose answers are planned, in this process.

    planned = Planner.from_pretrained("runs/nano/checkpoints/final/planner").wrap(model, tokenizer)
    planned.generate("7*(12+5)-38=?").text

    client = planner.wrap(openai.OpenAI())          # or AsyncOpenAI
    client.chat.completions.create(model="gpt-4o-mini", messages=[...], stream=True)

A thread of its own runs the event loop in which planner and upstream work; close what was wrapped, or use it in a ``with``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsim.errors import UserError
from rsim.game.tools import Runner
from rsim.policies.planner import Planner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner
from rsim.rewards.programs import allowed
from rsim.rules import PlayRules
from rsim.rules_file import overridden
from rsim.serving import openai_api as api
from rsim.serving.http_upstream import HttpUpstream, probe
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, Event, Finished, Mode, Upstream, Usage, play
from rsim.serving.upstream_client import upstream_client

T = TypeVar("T")
_OPTIONS = {"extra_headers", "extra_query", "timeout"}  # of one call of an OpenAI client: no fields of its body
Question = str | list[dict[str, Any]]  # a question, or the messages of a chat


@dataclass
class Answer:
    """``text`` holds the injected prompts too; ``steps`` each step's strategy, prompt, text and probabilities."""

    text: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)


class _Loop:
    """An event loop in a thread: what sync callers wait for runs there."""

    def __init__(self, planner: AnyPlanner, slots: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="rsim-plugin", daemon=True)
        self.thread.start()
        self.planning = self.wait(self._planning(planner, slots))

    async def _planning(self, planner: AnyPlanner, slots: int) -> PlannerBatcher:
        planning = PlannerBatcher(planner, slots)
        self.worker = asyncio.create_task(planning.run())
        return planning

    async def _stop(self) -> None:
        self.worker.cancel()
        await asyncio.gather(self.worker, return_exceptions=True)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def elsewhere(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits in the caller's loop what runs in this one."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def iterate(self, events: AsyncGenerator[T]) -> Iterator[T]:
        try:
            while True:
                try:
                    yield self.wait(_next(events))
                except StopAsyncIteration:
                    return
        finally:
            self.wait(_close(events))

    async def aiterate(self, events: AsyncGenerator[T]) -> AsyncIterator[T]:
        try:
            while True:
                try:
                    yield await self.elsewhere(_next(events))
                except StopAsyncIteration:
                    return
        finally:
            await self.elsewhere(_close(events))

    def close(self) -> None:
        self.wait(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def _next(events: AsyncGenerator[T]) -> T:
    return await anext(events)


async def _close(events: AsyncGenerator[T]) -> None:
    await events.aclose()


class PlannedModel:
    """A transformers model with a planner: exact token ids, and as many answers at once as there are ``slots``."""

    def __init__(
        self,
        planner: AnyPlanner,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rules: PlayRules,
        slots: int,
        runner: Runner | None,
    ) -> None:
        self.rules, self.runner = rules, runner
        self.inner = _Loop(planner, slots)
        self.upstream = LocalUpstream(Reasoner(model.eval(), tokenizer), slots, rules.day)

    def generate(self, questions: Question | Sequence[str], *, temperature: float = 0.0, max_tokens: int = 0,
                 seed: int | None = None) -> Any:  # fmt: skip
        """An `Answer` for a question or a chat's messages, or a list of them for a list of questions (played together)."""
        batch = _batch(questions)
        work = self._all([questions] if batch is None else batch, temperature, max_tokens, seed)  # type: ignore[list-item]
        answers = self.inner.wait(work)
        return answers if batch is not None else answers[0]

    async def agenerate(self, questions: Question | Sequence[str], *, temperature: float = 0.0, max_tokens: int = 0,
                        seed: int | None = None) -> Any:  # fmt: skip
        """`generate`, to be awaited."""
        batch = _batch(questions)
        work = self._all([questions] if batch is None else batch, temperature, max_tokens, seed)  # type: ignore[list-item]
        answers = await self.inner.elsewhere(work)
        return answers if batch is not None else answers[0]

    def stream(self, question: Question, *, temperature: float = 0.0, max_tokens: int = 0, seed: int | None = None
               ) -> Iterator[Event]:  # fmt: skip
        """The events of one answer as they come: `Injected`, `TextDelta`, and `Finished` in the end."""
        return self.inner.iterate(self._play(question, temperature, max_tokens, seed))

    def astream(self, question: Question, *, temperature: float = 0.0, max_tokens: int = 0, seed: int | None = None
                ) -> AsyncIterator[Event]:  # fmt: skip
        """`stream`, for ``async for``."""
        return self.inner.aiterate(self._play(question, temperature, max_tokens, seed))

    def _play(self, question: Question, temperature: float, limit: int, seed: int | None) -> AsyncGenerator[Event]:
        messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
        asked = Asked("", messages, None, {"temperature": temperature, "seed": seed})
        most = limit or self.rules.max_tokens
        return play(asked, self.inner.planning, self.upstream, self.rules, most, None, self.runner)

    async def _all(self, questions: Sequence[Question], temperature: float, limit: int, seed: int | None) -> list[Answer]:
        async def one(question: Question, own_seed: int | None) -> Answer:
            choice = api.Choice()
            async with aclosing(self._play(question, temperature, limit, own_seed)) as events:
                async for event in events:
                    choice.add(event)
            assert choice.finished is not None
            return Answer(choice.text, choice.steps, choice.finished.reason, choice.finished.usage)

        seeds = [None if seed is None else seed + i for i in range(len(questions))]
        return list(await asyncio.gather(*(one(q, s) for q, s in zip(questions, seeds, strict=True))))

    def close(self) -> None:
        self.upstream.close()
        self.inner.close()

    def __enter__(self) -> PlannedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _batch(questions: Question | Sequence[str]) -> list[str] | None:
    """The questions of a batch; None for a single question or a chat's messages."""
    if isinstance(questions, str) or (questions and isinstance(questions[0], dict)):
        return None
    return [str(q) for q in questions]


class PlannedClient:
    """Stands for an OpenAI client: ``chat.completions.create`` and ``completions.create``, sync or async as the client is, with
    and without ``stream``. Everything else is the client's own, ``chat.completions.parse`` and the like among it.

    Planned requests go over a connection of their own, with the client's headers, timeout and number of retries; a transport or
    proxy that the client was given is not used.
    """

    def __init__(
        self, planner: AnyPlanner, client: Any, rules: PlayRules, slots: int, mode: Mode | None, runner: Runner | None
    ) -> None:
        self.client, self.rules, self.mode, self.runner = client, rules, mode, runner
        self.asynchronous = type(client).__name__.startswith("Async")
        self.inner = _Loop(planner, slots)
        # Clients that are only like OpenAI's may lack all but the key and the address.
        given = getattr(client, "default_headers", {}).items()
        headers = {k: v for k, v in given if isinstance(v, str)} | {"Authorization": f"Bearer {client.api_key}"}
        timeout = _timeout(getattr(client, "timeout", None))
        self.retries = int(getattr(client, "max_retries", 2))
        self.http = self.inner.wait(_http_client(str(client.base_url), headers, timeout))
        self.upstream: Upstream | None = None
        self.chat = _Chat(client, _Endpoint(self, "chat"))
        self.completions = _Endpoint(self, "completion")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    async def events(self, request: api.Request, asked: Asked) -> AsyncGenerator[Event]:
        """One answer, cut at the caller's stop strings."""
        if self.upstream is None:
            mode, tells = (self.mode, False) if self.mode else await probe(self.http, asked.model)
            count = self.inner.planning.count
            self.upstream = HttpUpstream(self.http, mode, count=count, tells=tells, retries=self.retries)
        spent = Usage()
        source = play(asked, self.inner.planning, self.upstream, self.rules, request.limit, spent, self.runner)
        async with aclosing(api.Stops(request.stops).cut(source, spent)) as events:
            async for event in events:
                yield event

    def close(self) -> None:
        self.inner.wait(self.http.aclose())
        self.inner.close()

    def __enter__(self) -> PlannedClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _timeout(given: Any) -> httpx.Timeout:
    """A client's own limits in seconds, one for all or an object with four; what it does not say is OpenAI's default."""
    if isinstance(given, int | float):
        return httpx.Timeout(given)
    usual = {"connect": 5.0, "read": 600.0, "write": 600.0, "pool": 600.0}
    return httpx.Timeout(**{name: getattr(given, name, seconds) for name, seconds in usual.items()})


async def _http_client(base: str, headers: dict[str, str], timeout: httpx.Timeout) -> httpx.AsyncClient:
    return upstream_client(base, "", timeout, headers=headers)


class _Chat:
    """``client.chat`` with planned completions."""

    def __init__(self, client: Any, completions: _Endpoint) -> None:
        self.client, self.completions = client, completions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client.chat, name)


@dataclass
class _Endpoint:
    owner: PlannedClient
    kind: api.Kind

    def __getattr__(self, name: str) -> Any:
        client = self.owner.client
        return getattr(client.chat.completions if self.kind == "chat" else client.completions, name)

    def create(self, **body: Any) -> Any:
        """What OpenAI's client returns: a completion, or an iterator of chunks with ``stream=True``.

        Raises:
            UserError: something that is not planned (tools, log-probs): ask the client itself for it.
        """
        owner = self.owner
        body = {k: v for k, v in body.items() if type(v).__name__ not in ("NotGiven", "Omit") and k not in _OPTIONS}
        body |= body.pop("extra_body", None) or {}
        if api.passes_through(body):
            raise UserError("tools, log-probs and formats are not planned", "call the wrapped client itself for them")
        request = api.read_request(self.kind, body, str(body.get("model", "")), owner.rules.max_tokens)
        if request.stream:
            chunks = self._chunks(request)
            return owner.inner.aiterate(chunks) if owner.asynchronous else owner.inner.iterate(chunks)
        work = self._whole(request)
        return owner.inner.elsewhere(work) if owner.asynchronous else owner.inner.wait(work)

    async def _whole(self, request: api.Request) -> Any:
        async def one(asked: Asked) -> api.Choice:
            choice = api.Choice()
            async with aclosing(self.owner.events(request, asked)) as events:
                async for event in events:
                    choice.add(event)
            return choice

        choices = list(await asyncio.gather(*(one(a) for a in request.asked)))
        mode = self.owner.upstream.mode if self.owner.upstream else None
        return _typed(self.kind, api.whole(request, choices, mode), streamed=False)

    async def _chunks(self, request: api.Request) -> AsyncGenerator[Any]:
        """The choices one after the other."""
        usages: list[Usage] = []
        for index, asked in enumerate(request.asked):
            first = True
            async with aclosing(self.owner.events(request, asked)) as events:
                async for event in events:
                    yield _typed(self.kind, api.chunk(request, index, event, first=first), streamed=True)
                    first = False
                    if isinstance(event, Finished):
                        usages.append(event.usage)
        if request.include_usage:
            yield _typed(self.kind, api.usage_chunk(request, usages), streamed=True)


def _typed(kind: api.Kind, response: dict[str, Any], *, streamed: bool) -> Any:
    """The response as the official client's own type, built as that client builds it: without validation."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    if kind == "completion":
        return Completion.construct(**response)
    return (ChatCompletionChunk if streamed else ChatCompletion).construct(**response)


def wrap(
    planner: AnyPlanner,
    target: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    rules: PlayRules | None = None,
    slots: int = 64,
    mode: Mode | None = None,
    tools: Sequence[str] = (),
    **changes: Any,
) -> Any:
    """A `PlannedModel` for a transformers model (with its tokenizer), a `PlannedClient` for an OpenAI-compatible client.

    Args:
        rules: None: those that the planner was trained under.
        mode: ``prefill`` or ``turn``, for a client; None: probed at the first request.
        tools: ``("python",)`` lets strategies run the programs that the model writes, in the sandbox.
        changes: single rules by name, e.g. ``max_steps=4``.

    Raises:
        UserError: ``target`` is neither; there is no such rule; the strategies run programs and ``tools`` do not allow it.
    """
    rules = overridden(rules or planner.rules or PlayRules(), **changes)
    runner = allowed(planner, tools)
    if isinstance(target, PreTrainedModel):
        if tokenizer is None:
            raise UserError("a transformers model needs its tokenizer", "planner.wrap(model, tokenizer)")
        if isinstance(planner, Planner):
            planner.check_model(target.name_or_path)
        return PlannedModel(planner, target, tokenizer, rules, slots, runner)
    if not (hasattr(target, "base_url") and hasattr(target, "chat")):
        raise UserError(f"cannot wrap a {type(target).__name__}", "give a transformers model or an OpenAI-compatible client")
    return PlannedClient(planner, target, rules, slots, mode, runner)
