"""A client that leaves frees its slot, and does not end the step of whoever has the slot next."""

from __future__ import annotations

import asyncio

from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.play import TO_END, Asked, StepEnd


def test_the_next_answer_in_the_slot_goes_on(reasoner):
    """Also if the thread is told late that the first one has left."""

    async def run() -> StepEnd:
        asked = Asked("m", None, "2*3=?", {"temperature": 1.0, "seed": 1})
        first = await upstream.open(asked)
        await first.close()
        second = await upstream.open(asked)
        assert second.answer.slot == first.answer.slot
        pieces = second.step(200, TO_END)
        begun = await anext(pieces)
        upstream.commands.put(lambda: upstream.stop(first.answer))
        async with asyncio.timeout(20):
            while not isinstance(begun, StepEnd):
                begun = await anext(pieces)
        await second.close()
        await upstream.free.get()  # the thread has heard of it
        return begun

    upstream = LocalUpstream(reasoner, slots=1)
    try:
        assert asyncio.run(run()).usage.completion_tokens > 1
    finally:
        upstream.close()
