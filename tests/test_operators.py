"""What those who run a server count on: one request is one request's fault, memory comes back, nobody waits for another's bulk."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest
import torch

from rsim.engine.cache import SlotCache
from rsim.engine.native import NativeEngine
from rsim.engine.sampling import StringStop, choose
from rsim.errors import UserError
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, StepEnd, Until
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving

RULES = PlayRules(delimiter="\n", max_steps=2, step_tokens=8, max_tokens=40, answer_tokens=8)
PLANNER = sequence_planner(load_strategies("lab"), ["continuation", "termination"])


@pytest.fixture(scope="module")
def nano():
    return load_reasoner("nano-s", device="cpu")


def tokens_of(engine: NativeEngine, slots: dict[int, str], reasoner, more: dict | None = None) -> dict[int, list[int]]:
    """Greedy steps of 12 tokens, all together."""
    for slot, text in slots.items():
        engine.start([slot], [reasoner.prompt_ids(text)], [text])
        engine.submit(slot, [], 12, None, (more or {}).get(slot))
    found: dict[int, list[int]] = {}
    while engine.running:
        try:
            found |= {step.slot: step.tokens for step in engine.advance()}
        except UserError:
            for slot in list(engine.steps):
                try:
                    found |= {step.slot: step.tokens for step in engine.advance([slot])}
                except UserError:
                    engine.cancel(slot)
    return found


def engine_of(reasoner, **more) -> NativeEngine:
    return NativeEngine(reasoner, 3, seed=0, temperature=0.0, max_tokens=200, longest_prompt=0, **more)


def test_a_sequence_without_numbers_fails_alone_and_leaves_nothing_behind(nano):
    """It was "index out of bounds" for everybody."""
    asked = {0: "7=?", 1: "4*17+38=?", 2: "12-5=?"}
    alone = tokens_of(engine_of(nano), asked, nano)
    engine = engine_of(nano)
    broken = lambda logits, tokens: logits * float("nan") if len(tokens) == 3 else logits  # noqa: E731
    with_it = tokens_of(engine, asked, nano, {1: broken})
    assert with_it == {slot: alone[slot] for slot in (0, 2)}
    for slot in asked:
        engine.release(slot)
    assert tokens_of(engine, asked, nano) == alone


def test_scores_that_are_no_numbers_choose_a_token_all_the_same():
    index, logprob = choose(torch.tensor([[float("nan")] * 300, [0.0] * 300]), 1.0, torch.tensor([0.5, 0.5]))
    assert 0 <= int(index[0]) < 300
    assert torch.isnan(logprob).tolist() == [True, False]


async def said(upstream: LocalUpstream, text: str, until: Until) -> str:
    conversation = await upstream.open(Asked("m", None, text, {"temperature": 0}, allowed=200))
    try:
        return "".join([piece async for piece in conversation.step(12, until) if not isinstance(piece, StepEnd)])
    finally:
        await conversation.close()


def test_an_answer_that_fails_fails_alone(nano, monkeypatch):
    ended = StringStop.ended
    monkeypatch.setattr(
        StringStop, "ended", lambda stop, tokens: ended(stop, tokens) if stop.strings != ("boom",) else 1 / 0
    )

    async def both(*untils: Until) -> list[object]:
        upstream = LocalUpstream(nano, 4)
        try:
            work = [said(upstream, text, until) for text, until in zip(("7=?", "4*17+38=?", "12-5=?"), untils, strict=False)]
            return await asyncio.gather(*work, return_exceptions=True)
        finally:
            upstream.close()

    fine = asyncio.run(both(Until(), Until(), Until()))
    mixed = asyncio.run(both(Until(), Until(strings=("boom",)), Until()))
    assert isinstance(mixed[1], ZeroDivisionError)
    assert (mixed[0], mixed[2]) == (fine[0], fine[2])


def test_a_question_that_the_planner_fails_on_fails_alone(monkeypatch):
    async def two() -> list[object]:
        batcher = PlannerBatcher(PLANNER, 2)
        start = batcher.session.start

        def started(slots, questions, openings=None):
            assert "boom" not in questions
            start(slots, questions, openings)

        monkeypatch.setattr(batcher.session, "start", started)
        worker = asyncio.create_task(batcher.run())
        answers = [await batcher.open(question) for question in ("7=?", "boom")]
        decided = await asyncio.gather(*(a.decide() for a in answers), return_exceptions=True)
        worker.cancel()
        return decided

    fine, broken = asyncio.run(two())
    assert isinstance(broken, AssertionError)
    assert fine.probabilities


def test_a_long_sequence_takes_its_own_memory_and_gives_it_back():
    """64 slots for one prompt of 3,000 tokens took 64 times as much, for ever."""
    cache, held = SlotCache(64, 256, torch.float32, torch.device("cpu")), psutil.Process().memory_info
    before, one = held().rss, 4 * 3000 * 64 * 4 * 2  # bytes of the sequence's keys and values
    cache.make_room(3000)
    rows = torch.ones(4, 3000, 64)
    keys, _ = cache.write(0, torch.full((3000,), 5), torch.arange(3000), rows, rows)
    cache.lengths[5] = 3000
    assert one / 2 < held().rss - before < 3 * one + rows.nbytes
    cache.make_room(5000)
    assert torch.equal(cache.keys[0][5, :, :3000], rows)
    del rows, keys
    full = held().rss
    cache.release(5)
    assert full - held().rss > 0.8 * one
    assert cache.capacity >= 5000
    assert not cache.keys[0][5, :, 100:2900].any()


def test_long_prompts_are_read_piece_by_piece_with_the_same_result(nano):
    asked = {0: "7=?", 1: "4*17+38=? " * 12, 2: "12-5=?"}
    assert tokens_of(engine_of(nano, chunk=16), asked, nano) == tokens_of(engine_of(nano), asked, nano)


@pytest.fixture(scope="module")
def local(nano):
    with serving(create_app(ServeConfig(rules=RULES, slots=4), PLANNER, nano, name="nano-s")) as url:
        yield url


@pytest.mark.parametrize("model", ["nano-s", f"nano-s{SUFFIX}"])
def test_a_question_beyond_any_context_is_refused_at_once(local, model):
    """9 MB took 35 s to tokenise, and everybody waited."""
    body = {"model": model, "messages": [{"role": "user", "content": "1+1=? " * 1_500_000}]}
    began = time.process_time()
    reply = httpx.post(f"{local}/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "exceeds the model's context" in reply.json()["error"]["message"]
    assert time.process_time() - began < 3


def test_nobody_waits_while_a_question_is_tokenised(nano, monkeypatch):
    monkeypatch.setattr(LocalUpstream, "_prompt", lambda upstream, asked: time.sleep(0.5) or [5, 6, 7])

    async def ticks() -> int:
        upstream, count = LocalUpstream(nano, 1), 0
        opening = asyncio.create_task(upstream.open(Asked("m", None, "7=?")))
        while not opening.done():
            await asyncio.sleep(0.01)
            count += 1
        upstream.close()
        return count

    assert asyncio.run(ticks()) > 5
