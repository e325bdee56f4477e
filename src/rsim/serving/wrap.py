"""``Planner.wrap``: a transformers model or an OpenAI client whose answers are planned, in this process.

    planned = Planner.from_pretrained("runs/nano/checkpoints/best/planner").wrap(model, tokenizer)
    planned.generate("85-(12+5)+26=?").text

    client = planner.wrap(openai.OpenAI())          # or AsyncOpenAI: the same client, whose answers are planned
    client.chat.completions.create(model="gpt-4o-mini", messages=[...], stream=True)

A thread of its own runs the event loop in which planner and upstream work; close what was wrapped, or use it in a ``with``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

import uvicorn
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
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, Event, Mode, Usage, play
from rsim.serving.server import WIRES, create_app
from rsim.serving.state import ServeConfig
from rsim.serving.streams import cancel
from rsim.serving.upstream_client import check_address

T = TypeVar("T")
_FOREVER = 1e6  # seconds; the client's own time limit ends a request
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
        self.loop, self.closed = asyncio.new_event_loop(), False
        self.lock = threading.RLock()  # of ``closed``: what starts before it is set is cancelled, nothing starts after it
        self.thread = threading.Thread(target=self.loop.run_forever, name="rsim-plugin", daemon=True)
        self.thread.start()
        self.planning = self.wait(self._planning(planner, slots))

    async def _planning(self, planner: AnyPlanner, slots: int) -> PlannerBatcher:
        planning = PlannerBatcher(planner, slots)
        self.worker = asyncio.create_task(planning.run())
        return planning

    async def _stop(self) -> None:
        await cancel(*(asyncio.all_tasks() - {asyncio.current_task()}))

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self.lock:
            if not self.closed:
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        work.close()
        raise RuntimeError("the wrapped model is closed")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self.start(work)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for it any more
            future.cancel()
            raise

    async def elsewhere(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits in the caller's loop what runs in this one."""
        return await asyncio.wrap_future(self.start(work))

    def iterate(self, events: AsyncGenerator[T]) -> Iterator[T]:
        tasks: list[asyncio.Task[None]] = []
        try:
            said = self.wait(_fed(events, tasks))
            while (event := self.wait(said.get())) is not None:
                yield event
            self.wait(asyncio.wait_for(tasks[0], None))
        finally:
            self.wait(_ended(tasks))

    async def aiterate(self, events: AsyncGenerator[T]) -> AsyncIterator[T]:
        tasks: list[asyncio.Task[None]] = []
        try:
            said = await self.elsewhere(_fed(events, tasks))
            while (event := await self.elsewhere(said.get())) is not None:
                yield event
            await self.elsewhere(asyncio.wait_for(tasks[0], None))
        finally:
            await self.elsewhere(_ended(tasks))

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.run_until_complete(self._stop())  # who waits for an answer gets a CancelledError
        self.loop.close()


async def _fed(events: AsyncGenerator[T], tasks: list[asyncio.Task[None]]) -> asyncio.Queue[T | None]:
    """A queue of the events, and None in the end. One task plays them all: a generator's spans are of one context. It is put
    into ``tasks``, where whoever is interrupted before there is a queue finds it."""
    said: asyncio.Queue[T | None] = asyncio.Queue()

    async def feed() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    said.put_nowait(event)
        finally:
            said.put_nowait(None)

    tasks.append(asyncio.create_task(feed()))
    return said


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    await cancel(*tasks)


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

    def generate(self, questions: Question | Sequence[Question], *, temperature: float = 0.0, max_tokens: int = 0,
                 seed: int | None = None) -> Any:  # fmt: skip
        """An `Answer` for a question or a chat's messages, or a list of them for a list of either (played together)."""
        return self.inner.wait(self._answers(questions, temperature, max_tokens, seed))

    async def agenerate(self, questions: Question | Sequence[Question], *, temperature: float = 0.0, max_tokens: int = 0,
                        seed: int | None = None) -> Any:  # fmt: skip
        """`generate`, to be awaited."""
        return await self.inner.elsewhere(self._answers(questions, temperature, max_tokens, seed))

    def stream(self, question: Question, *, temperature: float = 0.0, max_tokens: int = 0, seed: int | None = None
               ) -> Iterator[Event]:  # fmt: skip
        """The events of one answer as they come: `Injected`, `TextDelta`, and `Finished` in the end."""
        return self.inner.iterate(self._play(question, temperature, max_tokens, seed))

    def astream(self, question: Question, *, temperature: float = 0.0, max_tokens: int = 0, seed: int | None = None
                ) -> AsyncIterator[Event]:  # fmt: skip
        """`stream`, for ``async for``."""
        return self.inner.aiterate(self._play(question, temperature, max_tokens, seed))

    def _play(self, question: Question, temperature: float, limit: int, seed: int | None) -> AsyncGenerator[Event]:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        asked = Asked("", self.inner.planning.behind(messages), None, {"temperature": temperature, "seed": seed})
        most = limit or self.rules.max_tokens
        return play(asked, self.inner.planning, self.upstream, self.rules, most, None, self.runner)

    async def _answers(self, questions: Any, temperature: float, limit: int, seed: int | None) -> Answer | list[Answer]:
        async def one(question: Question, own_seed: int | None) -> Answer:
            choice = api.Choice()
            async with aclosing(self._play(question, temperature, limit, own_seed)) as events:
                async for event in events:
                    choice.add(event)
            assert choice.finished is not None
            return Answer(choice.message["content"], choice.steps, choice.finished.reason, choice.finished.usage)

        if isinstance(questions, str) or (questions and isinstance(questions[0], dict)):  # one question, or one chat
            return await one(questions, seed)
        seeds = [None if seed is None else seed + i for i in range(len(questions))]
        tasks = [asyncio.create_task(one(q, s)) for q, s in zip(questions, seeds, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:  # where one failed, nobody waits for the others
            await cancel(*tasks)

    def close(self) -> None:
        self.upstream.close()
        self.inner.close()

    def __enter__(self) -> PlannedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server:
    """The plug-in's server behind a socket of this process's own, in a thread."""

    def __init__(self, config: ServeConfig, planner: AnyPlanner) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="rsim-")  # no other user can look into it
        self.socket = f"{self.folder.name}/socket"
        app = create_app(config, planner)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, uds=self.socket, log_config=None, access_log=False))
        self.thread = threading.Thread(target=self.uvicorn.run, name="rsim-plugin", daemon=True)
        self.thread.start()
        while not self.uvicorn.started and self.thread.is_alive():
            time.sleep(0.002)

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.folder.cleanup()


def _wrapped_client(planner: AnyPlanner, client: Any, config: ServeConfig) -> Any:
    """A copy of an OpenAI client that sends what is planned to a `_Server`, and all else the way that the client does.

    Its connections are of the client's own library (``httpx``, or ``httpx2`` for OpenAI's since version 3).
    """
    own = client._client
    plain = next(c for c in type(own).__mro__ if c.__name__ in ("Client", "AsyncClient"))
    library = import_module(plain.__module__.split(".")[0])
    server = _Server(config, planner)

    def redirected(request: Any) -> Any:
        url = f"http://localhost/v1/{_planned_endpoint(request)}"
        headers = [(k, v) for k, v in request.headers.raw if k.lower() != b"host"]
        return library.Request(request.method, url, headers=headers, content=request.content, extensions=request.extensions)

    def settled(response: Any) -> Any:
        response.headers["x-should-retry"] = "false"  # it was tried again where it failed, as often as the client says
        return response

    class Sync(library.BaseTransport):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.there = library.HTTPTransport(uds=server.socket)

        def handle_request(self, request: Any) -> Any:
            request.read()
            if not _planned_endpoint(request):
                return own.send(request, stream=True)
            return settled(self.there.handle_request(redirected(request)))

        def close(self) -> None:
            self.there.close()
            server.close()

    class Async(library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.there = library.AsyncHTTPTransport(uds=server.socket)

        async def handle_async_request(self, request: Any) -> Any:
            await request.aread()
            if not _planned_endpoint(request):
                return await own.send(request, stream=True)
            return settled(await self.there.handle_async_request(redirected(request)))

        async def aclose(self) -> None:
            await self.there.aclose()
            await asyncio.to_thread(server.close)

    options = {"timeout": own.timeout, "follow_redirects": own.follow_redirects}
    if plain.__name__ == "AsyncClient":
        return client.with_options(http_client=library.AsyncClient(transport=Async(), **options))
    return client.with_options(http_client=library.Client(transport=Sync(), **options))


def _planned_endpoint(request: Any) -> str:
    """The endpoint of a request that the server is to answer, else ""."""
    endpoint = next((e for e in ("chat/completions", "completions", "responses") if request.url.path.endswith(f"/{e}")), "")
    if not endpoint or request.method != "POST":
        return ""
    body = json.loads(request.content)
    try:
        return endpoint if "rsim" in body or not api.passes_through(WIRES[endpoint].read(body)) else ""
    except api.BadRequest:
        return endpoint


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
    """A `PlannedModel` for a transformers model (with its tokenizer), a planned copy of an OpenAI-compatible client.

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
    if not (hasattr(target, "with_options") and hasattr(target, "chat")):
        raise UserError(f"cannot wrap a {type(target).__name__}", "give a transformers model or an OpenAI client")
    if getattr(target, "_azure_deployment", "") is None:
        raise UserError("an AzureOpenAI asks each model at an address of its own", "give it an azure_deployment")
    check_address("", mode or "")
    config = ServeConfig(
        upstream=str(target.base_url.copy_merge_params(target.default_query)),
        wrapped=True,
        mode=mode,
        rules=rules,
        tools=tuple(tools),
        slots=slots,
        waiting=sys.maxsize,
        retries=target.max_retries,
        request_seconds=_FOREVER,
        body_bytes=sys.maxsize,
        upstream_seconds=_FOREVER,
    )
    return _wrapped_client(planner, target, config)
