"""Accuracy of a model behind an OpenAI-compatible server: alone, or planned as the plug-in plans it.

Answers are text, so tokens are the upstream's own counts, and its size (hence ``tflops``) is not known.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from rsim.answers.prefix import as_message, open_prefix
from rsim.config import Config
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record, episode_record, outcome
from rsim.evaluation.obeyed import rules_for
from rsim.game.episode import Episode, Step
from rsim.game.problem import Problem
from rsim.policies.protocol import AnyPlanner, Decision
from rsim.policies.strategies import StrategySet
from rsim.rewards.programs import runner_for
from rsim.rewards.rewards import score_all
from rsim.serving.http_upstream import HttpUpstream, probe, prompt_tokens
from rsim.serving.planner_batcher import PlannerBatcher, estimated_tokens
from rsim.serving.play import TO_END, Asked, Finished, Injected, Mode, StepEnd, TextDelta, Usage, play
from rsim.serving.said import UpstreamError
from rsim.serving.upstream_client import KEY, check_address, first_model, upstream_client


@dataclass(frozen=True)
class ServedModel:
    """``url`` ends in ``/v1``; an empty ``name`` is the first model that is listed there, an empty ``mode`` is probed;
    ``at_once`` answers are asked for together. The key is ``$RSIM_UPSTREAM_API_KEY``."""

    url: str
    name: str = ""
    mode: str = ""
    at_once: int = 8

    def __post_init__(self) -> None:
        check_address(self.url, self.mode)


Spent = tuple[Usage, int]  # tokens as the server counts them, and how many of them were injected


class ServedGame:
    """Plays problems on a server; what `play_scored` is to a `Game`."""

    def __init__(self, served: ServedModel, planner: AnyPlanner | None, config: Config, overrides: Sequence[str] = ()) -> None:
        """``overrides``: the settings among ``config``'s that were stated for this evaluation."""
        self.served, self.planner, self.config = served, planner, config
        self.rules = rules_for(config.rollout, planner, overrides)
        self.runner = runner_for(planner, config.rewards)
        self.names = planner.strategies.names if planner else ()
        self.parameters = {"reasoner": 0, "planner": planner.parameters if planner else 0}
        self.mode: Mode | None = None
        self.tells = False  # see `HttpUpstream`
        self.model = served.name or _first_model(served.url)
        self.injected: dict[str, int] = {}  # tokens of what may be injected, as the upstream counts them
        self.seconds = {"planner": 0.0, "all": 0.0}

    @property
    def planner_share(self) -> float:
        return self.seconds["planner"] / self.seconds["all"] if self.seconds["all"] else 0.0

    def play_scored(
        self, problems: list[Problem], *, seed: int, greedy: bool, samples: int, first: int
    ) -> tuple[list[Record], list[Record]]:  # fmt: skip
        """The records of problems number ``first``, ``first + 1``, ...: as `evaluate.outcome` and `episode_record` have them.

        Raises:
            UserError: the upstream cannot be reached or refuses.
        """
        began = time.perf_counter()
        try:
            episodes, spent = asyncio.run(self._play_all(problems, seed, greedy, samples, first))
        except UpstreamError as error:
            raise UserError(
                f"the upstream at {self.served.url} failed: {error}", "what was answered is kept: ask again to go on"
            ) from error
        self.seconds["all"] += time.perf_counter() - began
        rewards = self.config.rewards
        scores = score_all(episodes, self.planner.strategies if self.planner else None, rewards)
        records, shown = [], []
        for number, (episode, scored, (usage, injected)) in enumerate(zip(episodes, scores, spent, strict=True)):
            tokens = {
                "prompt_tokens": usage.prompt_tokens,
                "sampled_tokens": usage.completion_tokens,
                "injected_tokens": injected,
                "estimated": usage.estimated,
            }
            records.append(outcome(episode, scored, first, number, samples, self.names, rewards) | tokens)
            shown.append(episode_record(episode, scored, self.names) | tokens)
        return records, shown

    async def _play_all(
        self, problems: list[Problem], seed: int, greedy: bool, samples: int, first: int
    ) -> tuple[list[Episode], list[Spent]]:  # fmt: skip
        timeout = httpx.Timeout(self.config.rollout.vllm_timeout, connect=10.0)
        async with upstream_client(self.served.url, os.environ.get(KEY, ""), timeout) as client:
            await self._prepare(client)
            assert self.mode is not None
            upstream = HttpUpstream(client, self.mode, count=self._count, tells=self.tells, retries=5, patience=120.0)
            gate = asyncio.Semaphore(self.served.at_once)
            warmth = 0.0 if greedy else self.config.rollout.planner_temperature
            batcher = PlannerBatcher(self.planner, self.served.at_once, warmth) if self.planner else None
            worker = asyncio.create_task(batcher.run()) if batcher else None

            async def one(number: int) -> tuple[Episode, Spent]:
                group, member = divmod(number, samples)
                temperature = 0.0 if greedy else self.config.rollout.temperature
                sampling = {"temperature": temperature, "seed": seed * 1_000_003 + (first + group) * 1009 + member}
                async with gate:
                    return await self._play(problems[group], first + group, sampling, upstream, batcher)

            try:
                async with asyncio.TaskGroup() as tasks:
                    played = [tasks.create_task(one(i)) for i in range(len(problems) * samples)]
            except* UpstreamError as group:
                raise group.exceptions[0] from None
            finally:
                if worker and batcher:
                    worker.cancel()
                    self.seconds["planner"] += batcher.seconds
        results = [task.result() for task in played]
        return [episode for episode, _ in results], [spent for _, spent in results]

    async def _prepare(self, client: httpx.AsyncClient) -> None:
        """The model's name, the mode of injection and the prompts' tokens, found out once."""
        if self.mode is not None:
            return
        if self.planner is None:
            self.mode = "turn"
            return
        user = {"role": "user", "content": "x"}
        try:
            alone, self.tells = await prompt_tokens(client, {"model": self.model, "messages": [user]})
        except UpstreamError as error:
            if error.status == 501:
                raise UserError(f"the upstream at {self.served.url} counts no prompt tokens", "rsim eval needs them") from error
            raise
        mode = self.served.mode or (await probe(client, self.model))[0]
        prompts = [p for s in self.planner.strategies.strategies for p in s.prompts]
        for prompt in [*(as_message(p) if mode == "turn" else p for p in prompts), self.rules.delimiter]:
            longer = {"role": "user", "content": f"x{prompt}"}
            counted, _ = await prompt_tokens(client, {"model": self.model, "messages": [longer]})
            self.injected[prompt] = counted - alone
        self.mode = mode  # type: ignore[assignment]

    def _count(self, text: str) -> int:
        """As the upstream counts prompts; what tools write is only estimated."""
        return self.injected[text] if text in self.injected else estimated_tokens(text)

    async def _play(
        self, problem: Problem, group: int, sampling: dict[str, Any], upstream: HttpUpstream, batcher: PlannerBatcher | None
    ) -> tuple[Episode, Spent]:  # fmt: skip
        rules, system = self.rules, self.config.models.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        asked = Asked(self.model, [*messages, {"role": "user", "content": problem.question}], None, sampling)
        episode = Episode(problem, group, [], 0)
        if batcher is None:
            return episode, (await _alone(episode, upstream, asked, rules.max_tokens), 0)
        finished = Finished("stop", Usage())
        async with aclosing(play(asked, batcher, upstream, rules, rules.max_tokens, None, self.runner)) as events:
            async for event in events:
                if isinstance(event, Injected):
                    _open_step(episode, batcher.strategies, event)
                elif isinstance(event, Finished):
                    finished = event
                elif isinstance(event, TextDelta) and event.sampled:
                    episode.steps[-1].text += event.text
                elif isinstance(event, TextDelta) and event.output:
                    episode.steps[-1].output, episode.steps[-1].before = event.text, len(episode.steps[-1].text)
        episode.truncated, episode.terminated = finished.ending.truncated, finished.ending.terminated
        episode.reasoner_ended = finished.ending.reasoner_ended
        return episode, (finished.usage, finished.injected_tokens)


def _open_step(episode: Episode, strategies: StrategySet, event: Injected) -> None:
    action = strategies.index(event.strategy)
    prefix = open_prefix(event.text) if action == strategies.termination else ""
    episode.steps.append(Step(action, 0, 0, 0, forced=event.forced, answer_prefix=prefix))
    episode.forced |= event.forced
    if event.probabilities:
        episode.decisions.append(Decision(-1, action, 0.0, list(event.probabilities.values())))


async def _alone(episode: Episode, upstream: HttpUpstream, asked: Asked, limit: int) -> Usage:
    """The model's own answer to the question as one step."""
    episode.steps.append(Step(-1, 0, 0, 0))
    usage = Usage()
    conversation = await upstream.open(asked)
    async with aclosing(conversation.step(limit, TO_END)) as pieces:
        async for piece in pieces:
            if isinstance(piece, StepEnd):
                usage, episode.truncated = piece.usage, piece.reason == "cap" or piece.told == "length"
            elif isinstance(piece, str):
                episode.steps[-1].text += piece
    await conversation.close()
    return usage


def _first_model(url: str) -> str:
    """The name of the first model that a server lists.

    Raises:
        UserError: it cannot be reached, or lists none.
    """

    async def first() -> str:
        async with upstream_client(url, os.environ.get(KEY, ""), httpx.Timeout(10.0)) as client:
            return await first_model(client)

    try:
        return asyncio.run(first())
    except UpstreamError as error:
        raise UserError(f"--upstream {url}: {error}", "is it running? name one with --model") from error
