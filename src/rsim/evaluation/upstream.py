"""A model behind an OpenAI-compatible server plays: alone, or planned as the plug-in plans it. For evaluation and training.

What it writes is text, so its episodes hold no ids of the reasoner's, tokens are the server's own counts, and its size (hence
``tflops``) is not known. The planner's ids and decisions are recorded as in any rollout.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from rsim.answers.prefix import as_message, open_prefix
from rsim.config import Config
from rsim.errors import UserError, key_from
from rsim.evaluation.obeyed import rules_for
from rsim.game.episode import Episode, Step
from rsim.game.problem import Problem
from rsim.game.progress import ended
from rsim.game.rollout import OnStep
from rsim.game.rulebook import check_budget, rulebook_of
from rsim.policies.protocol import AnyPlanner
from rsim.policies.strategies import StrategySet
from rsim.rewards.programs import runner_for
from rsim.serving.http_upstream import HttpUpstream, probe, prompt_tokens
from rsim.serving.planner_batcher import PlannerBatcher, estimated_tokens
from rsim.serving.play import TO_END, Asked, Finished, Injected, Mode, StepEnd, TextDelta, Usage, play
from rsim.serving.said import UpstreamError
from rsim.serving.upstream_client import KEY, check_address, first_model, upstream_client

log = logging.getLogger("rsim")

_PATIENCE = 3.0  # seconds, a third at first, before an answer that broke off in its middle is asked for again


@dataclass(frozen=True)
class ServedModel:
    """``url`` ends in ``/v1``; an empty ``name`` is the first model that is listed there, an empty ``mode`` is probed;
    ``at_once`` answers are asked for together; ``max_requests`` 0: no limit. The key is ``$RSIM_UPSTREAM_API_KEY``."""

    url: str
    name: str = ""
    mode: str = ""
    at_once: int = 8
    max_requests: int = 0

    def __post_init__(self) -> None:
        check_address(self.url, self.mode)


class UpstreamStopped(UserError):
    """The upstream failed, also when it was asked again, or has been sent all the requests that it may be sent."""


@dataclass
class ServedEpisode(Episode):
    """An episode of a reasoner behind a server: text without ids. Tokens are in ``usage``, as the server counts them (prompts:
    of all its calls together), and ``injected``, as the budget does. ``reason``: why it ended, as `Finished` has it."""

    usage: Usage = field(default_factory=Usage)
    injected: int = 0
    reason: str = "stop"

    @property
    def sampled_tokens(self) -> int:
        return self.usage.completion_tokens

    @property
    def injected_tokens(self) -> int:
        return self.injected


class ServedGame:
    """Plays problems on a server; what a `Game` does with a reasoner whose tokens it has."""

    servers = None  # that sample token ids

    def __init__(self, served: ServedModel, planner: AnyPlanner | None, config: Config, overrides: Sequence[str] = ()) -> None:
        """``overrides``: the settings among ``config``'s that were stated for this evaluation."""
        self.served, self.planner, self.config = served, planner, config
        self.rules = rules_for(config.rollout, planner, overrides)
        self.runner = runner_for(planner, config.rewards)
        self.names = planner.strategies.names if planner else ()
        self.parameters = {"reasoner": 0, "planner": 0}
        self.mode: Mode | None = None
        self.tells = False  # see `HttpUpstream`, as for these two
        self.thinkers: set[str] = set()
        self.newer: set[str] = set()
        self.model = served.name or first_listed(served.url)
        self.injected: dict[str, int] = {}  # tokens of what may be injected, as the upstream counts them
        self.seconds = {"planner": 0.0, "all": 0.0}
        # What it was sent, retries and probes among it, and the tokens of the answers, those that were given up among them.
        self.account = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

    @property
    def planner_share(self) -> float:
        return self.seconds["planner"] / self.seconds["all"] if self.seconds["all"] else 0.0

    def play(
        self,
        problems: list[Problem],
        *,
        seed: int,
        group_size: int = 1,
        keys: list[str] | None = None,
        greedy: bool = False,
        on_step: OnStep | None = None,
    ) -> list[Episode]:
        """`Game.play` over text: ``seed`` and ``keys`` are all that the planner's draws depend on, and name the seed that the
        upstream is sent, which may or may not keep to it.

        Raises:
            UpstreamStopped: it cannot be reached or refuses, or ``max_requests`` are sent.
        """
        began = time.perf_counter()
        keys = keys or [str(i) for i in range(len(problems))]
        asked = [(group, f"{seed}:{key}:{m}") for group, key in enumerate(keys) for m in range(group_size)]
        try:
            return asyncio.run(self._play_all(problems, asked, greedy, on_step))
        except UpstreamError as error:
            raise UpstreamStopped(
                f"the upstream at {self.served.url} failed: {error}", "what was answered is kept: ask again to go on"
            ) from error
        finally:
            self.seconds["all"] += time.perf_counter() - began

    async def _play_all(
        self, problems: list[Problem], asked: list[tuple[int, str]], greedy: bool, on_step: OnStep | None
    ) -> list[Episode]:
        """The episodes of ``asked``: each the number of a problem and what its draws depend on."""
        rollout = self.config.rollout
        timeout = httpx.Timeout(rollout.vllm_timeout, connect=10.0)
        async with upstream_client(self.served.url, key_from(KEY), timeout) as client:
            client.event_hooks = {"request": [self._send]}
            await self._prepare(client)
            assert self.mode is not None
            upstream = HttpUpstream(client, self.mode, count=self._count, tells=self.tells, retries=5, patience=120.0)
            upstream.thinkers, upstream.newer = self.thinkers, self.newer
            gate = asyncio.Semaphore(self.served.at_once)
            warmth = 0.0 if greedy else rollout.planner_temperature
            batcher = PlannerBatcher(self.planner, self.served.at_once, warmth) if self.planner else None
            worker = asyncio.create_task(batcher.run()) if batcher else None
            over = itertools.count(1)

            async def one(number: int, group: int, key: str, tries: int = 3) -> ServedEpisode:
                episode = ServedEpisode(problems[group], group, [], 0)
                seed = random.Random(key).getrandbits(30)
                sampling = {"temperature": 0.0 if greedy else rollout.temperature, "seed": seed}
                try:
                    async with gate:
                        await self._play(episode, sampling, upstream, batcher)
                except UpstreamError as error:
                    if tries == 1 or error.status < 500:
                        raise
                    await asyncio.sleep(_PATIENCE / tries)
                    return await one(number, group, key, tries - 1)
                if on_step is not None:
                    on_step(number, episode)
                ended(next(over), len(asked))
                return episode

            try:
                async with asyncio.TaskGroup() as tasks:
                    played = [tasks.create_task(one(i, *who)) for i, who in enumerate(asked)]
            except* (UpstreamError, UserError) as group:
                raise group.exceptions[0] from None
            finally:
                if worker and batcher:
                    worker.cancel()
                    self.seconds["planner"] += batcher.seconds
        episodes = [task.result() for task in played]
        reasons = Counter(e.reason for e in episodes if e.reason not in ("stop", "length"))
        for reason, count in reasons.items():
            log.warning(
                "%d of %d answers were ended by the upstream with %r: they count as they are", count, len(episodes), reason
            )
        return list(episodes)

    async def _send(self, request: httpx.Request) -> None:
        """Counts what is sent, before it is."""
        most = self.served.max_requests
        if most and self.account["requests"] >= most:
            raise UpstreamStopped(f"upstream.max_requests = {most} are sent", "go on with more of them")
        self.account["requests"] += 1

    async def _prepare(self, client: httpx.AsyncClient) -> None:
        """The mode of injection and the prompts' tokens, found out once."""
        if self.mode is not None:
            return
        if self.planner is None:
            self.mode = "turn"
            return
        user = {"role": "user", "content": "x"}
        try:
            alone, self.tells = await prompt_tokens(client, {"model": self.model, "messages": [user]})
        except UpstreamError as error:
            if error.status != 501:
                raise
            if not self.served.mode:
                remedy = "say how prompts are injected, turn or prefill (--mode): they are then counted by estimate"
                raise UserError(f"the upstream at {self.served.url} counts no prompt tokens", remedy) from error
            self._begin(self.served.mode)
            return
        mode = self.served.mode or (await probe(client, self.model))[0]
        prompts = [p for s in self.planner.strategies.strategies for p in s.prompts]
        for prompt in [*(as_message(p) if mode == "turn" else p for p in prompts), self.rules.delimiter]:
            longer = {"role": "user", "content": f"x{prompt}"}
            counted, _ = await prompt_tokens(client, {"model": self.model, "messages": [longer]})
            self.injected[prompt] = counted - alone
        self._begin(mode)

    def _begin(self, mode: str) -> None:
        """Raises `UserError` where the budget has no room for an answer."""
        assert self.planner is not None
        check_budget(rulebook_of(self.planner, self.rules, self._count))
        self.mode = mode  # type: ignore[assignment]

    def _count(self, text: str) -> int:
        """As the upstream counts prompts; what tools write is only estimated."""
        return self.injected[text] if text in self.injected else estimated_tokens(text)

    async def _play(
        self, episode: ServedEpisode, sampling: dict[str, Any], upstream: HttpUpstream, batcher: PlannerBatcher | None
    ) -> None:
        rules, usage = self.rules, episode.usage
        messages = opening(self.config.models.system_prompt, episode.problem.question)
        asked = Asked(self.model, messages, None, sampling)
        try:
            if batcher is None:
                await _alone(episode, upstream, asked, rules.max_tokens)
                return
            async with aclosing(play(asked, batcher, upstream, rules, rules.max_tokens, usage, self.runner)) as events:
                async for event in events:
                    if isinstance(event, Injected):
                        _open_step(episode, batcher.strategies, event)
                    elif isinstance(event, Finished):
                        _finish(episode, event)
                    elif isinstance(event, TextDelta) and event.sampled:
                        episode.steps[-1].text += event.text
                    elif isinstance(event, TextDelta) and event.output:
                        episode.steps[-1].output, episode.steps[-1].before = event.text, len(episode.steps[-1].text)
        finally:
            usage.estimated |= batcher is not None and not self.injected
            episode.prompt_length = usage.prompt_tokens
            self.account["prompt_tokens"] += usage.prompt_tokens
            self.account["completion_tokens"] += usage.completion_tokens


def opening(system_prompt: str, question: str) -> list[dict[str, Any]]:
    """The messages that an answer begins with."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def _open_step(episode: Episode, strategies: StrategySet, event: Injected) -> None:
    action = strategies.index(event.strategy)
    prefix = open_prefix(event.text) if action == strategies.termination else ""
    episode.steps.append(Step(action, 0, 0, 0, forced=event.forced, answer_prefix=prefix, prompt=event.text))
    episode.forced |= event.forced
    if event.decision:
        episode.decisions.append(event.decision)


def _finish(episode: ServedEpisode, event: Finished) -> None:
    episode.planner_ids, episode.injected = event.planner_ids, event.injected_tokens
    episode.truncated, episode.terminated = event.ending.truncated, event.ending.terminated
    episode.reasoner_ended, episode.reason = event.ending.reasoner_ended, event.reason


async def _alone(episode: ServedEpisode, upstream: HttpUpstream, asked: Asked, limit: int) -> None:
    """The model's own answer to the question as one step."""
    episode.steps.append(Step(-1, 0, 0, 0))
    conversation = await upstream.open(asked)
    async with aclosing(conversation.step(limit, TO_END)) as pieces:
        async for piece in pieces:
            if isinstance(piece, StepEnd):
                episode.usage.add(piece.usage)
                episode.truncated = piece.reason == "cap" or piece.told == "length"
                episode.reason = piece.told or "stop"
            elif isinstance(piece, TextDelta):
                episode.steps[-1].text += piece.text
    await conversation.close()


def first_listed(url: str) -> str:
    """The name of the first model that a server lists.

    Raises:
        UserError: it cannot be reached, or lists none.
    """

    async def first() -> str:
        async with upstream_client(url, key_from(KEY), httpx.Timeout(10.0)) as client:
            return await first_model(client)

    try:
        return asyncio.run(first())
    except UpstreamError as error:
        raise UserError(f"--upstream {url}: {error}", "is it running? name one with --model, --upstream-model") from error


def ask_once(served: ServedModel, system_prompt: str, question: str) -> tuple[str, int | None]:
    """Asks for one token of an answer: the model's name and the prompt's tokens, None where they are not counted.

    Raises:
        UserError: it does not answer.
    """
    model = served.name or first_listed(served.url)

    async def ask() -> int:
        async with upstream_client(served.url, key_from(KEY), httpx.Timeout(60.0)) as client:
            asked = {"model": model, "messages": opening(system_prompt, question)}
            return (await prompt_tokens(client, asked))[0]

    try:
        return model, asyncio.run(ask())
    except UpstreamError as error:
        if error.status == 501:
            return model, None
        raise UserError(f"the upstream at {served.url} failed: {error}") from error
