"""One planner for many answers at once: its forward passes are batched over all answers that wait for a decision."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsim.errors import UserError, first_line
from rsim.models.prompts import check_length
from rsim.policies.planner import Planner
from rsim.policies.protocol import AnyPlanner, Decision

log = logging.getLogger("rsim.serve")

Opening = tuple[str, list[int] | None]  # a question, and the ids with which a learned planner begins to read it


@dataclass
class _Ask:
    slot: int
    opening: Opening | None  # None: goes on with what was observed
    draw: float  # a uniform number
    answer: asyncio.Future[Decision]


def estimated_tokens(text: str) -> int:
    """Four characters a token, as in English."""
    return -(-len(text) // 4)


class PlannerBatcher:
    """Decisions for up to ``slots`` answers at a time. `run` must be running, as a task of the event loop.

    While one batch is in the planner, those that come meanwhile wait for the next: a request alone is decided at once, and many
    share forward passes.
    """

    def __init__(self, planner: AnyPlanner, slots: int, temperature: float = 0.0) -> None:
        self.planner, self.temperature = planner, temperature
        self.strategies = planner.strategies
        self.session = planner.begin(slots)
        self.free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(slots):
            self.free.put_nowait(slot)
        self.asks: list[_Ask] = []
        self.wake = asyncio.Event()
        self.busy: set[int] = set()  # slots whose decision is being made
        self.left: set[int] = set()  # of these, those whose answer was given up
        self.seconds = 0.0  # spent in the planner

    def count(self, text: str) -> int:
        """How many tokens a text takes by the planner's own tokenizer: an estimate for an upstream's."""
        return len(self.planner.chunk(text)) if isinstance(self.planner, Planner) else estimated_tokens(text)

    def behind(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A chat's messages behind the system prompt that the planner was fitted behind, unless they have one of their own."""
        fitted = self.planner.fitted_for if isinstance(self.planner, Planner) else None
        told = any(message.get("role") in ("system", "developer") for message in messages)
        if fitted is None or not fitted.system_prompt or told:
            return messages
        return [{"role": "system", "content": fitted.system_prompt}, *messages]

    async def run(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            batch, self.asks = self.asks, []
            self.busy = {ask.slot for ask in batch}
            for ask, decided in zip(batch, await asyncio.to_thread(self._decided, batch), strict=True):
                if ask.answer.done():
                    continue
                if isinstance(decided, Exception):
                    ask.answer.set_exception(decided)
                else:
                    ask.answer.set_result(decided)
            self.busy = set()
            for slot in self.left:
                self.free.put_nowait(slot)
            self.left = set()

    def _decided(self, batch: list[_Ask]) -> Sequence[Decision | Exception]:
        """Where all together fail, each alone: an answer that the planner fails on is the only one to fail."""
        try:
            return self._decide(batch)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            log.warning("%d decisions together failed (%s): each alone", len(batch), first_line(error))
            return [one for ask in batch for one in self._decided([ask])]

    def _decide(self, batch: list[_Ask]) -> list[Decision]:
        began = time.perf_counter()
        new = [(ask.slot, *ask.opening) for ask in batch if ask.opening is not None]
        if new:
            slots, questions, openings = (list(column) for column in zip(*new, strict=True))
            self.session.start(slots, questions, openings)
        decisions = self.session.decide([ask.slot for ask in batch], [ask.draw for ask in batch], self.temperature)
        self.seconds += time.perf_counter() - began
        return decisions

    async def open(self, question: str, seed: int | None = None) -> PlannedAnswer:
        """Takes a slot; with a ``seed``, what is drawn for this answer depends on it alone."""
        planner, ids = self.planner, None
        if isinstance(planner, Planner):  # tokenised off the event loop, once
            try:
                await asyncio.to_thread(check_length, planner.tokenizer, question, planner.context)
                ids = await asyncio.to_thread(planner.opening, question)
            except UserError:
                ids = [0] * (planner.context + 1)  # more than it reads
        return PlannedAnswer(self, await self.free.get(), (question, ids), random.Random(seed))

    async def decide(self, slot: int, opening: Opening | None, draw: float) -> Decision:
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.asks.append(_Ask(slot, opening, draw, answer))
        self.wake.set()
        return await answer

    def release(self, slot: int) -> None:
        self.asks = [ask for ask in self.asks if ask.slot != slot]
        if slot in self.busy:
            self.left.add(slot)
        else:
            self.free.put_nowait(slot)


class PlannedAnswer:
    """The planner's side of one answer: one slot, to be closed in the end."""

    def __init__(self, batcher: PlannerBatcher, slot: int, opening: Opening, draws: random.Random) -> None:
        self.batcher, self.slot, self.draws = batcher, slot, draws
        self.opening: Opening | None = opening

    def reads(self) -> bool:
        """Whether what it would read at its next decision fits into its context."""
        if self.opening is None:
            return self.batcher.session.reads(self.slot)
        return len(self.opening[1] or ()) <= self.batcher.planner.context

    async def decide(self) -> Decision:
        """The next strategy."""
        opening, self.opening = self.opening, None
        return await self.batcher.decide(self.slot, opening, self.draws.random())

    def observe(self, strategy: str, text: str) -> None:
        """Tells the planner what step followed its decision."""
        if self.opening is None:
            self.batcher.session.observe(self.slot, strategy, text)

    def ids(self) -> list[int]:
        """What its model has read."""
        return [] if self.opening is not None else self.batcher.session.ids(self.slot)

    def close(self) -> None:
        self.batcher.release(self.slot)
