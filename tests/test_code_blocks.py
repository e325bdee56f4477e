"""A blank line inside a code block ends no step: with any engine, and with any upstream of the plug-in that can go on from there."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsim.engine.sampling import DelimiterStop, Vocabulary
from rsim.engine.vllm import VllmEngine
from rsim.rules import in_block, step_end
from rsim.serving.http_upstream import HttpUpstream
from rsim.serving.play import Asked, StepEnd, Until

PROGRAM = "Here:\n```python\nx = 1\n\ny = 2\n\nprint(x)\n```\n\nDone."


class Characters:
    """A tokenizer whose tokens are characters."""

    def __len__(self):
        return 128

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def batch_decode(self, rows):
        return [self.decode(row) for row in rows]


@given(st.lists(st.sampled_from(["a", "\n\n", "```", "\n"])).map("".join))
def test_a_step_ends_at_the_first_delimiter_outside_all_blocks(text):
    at = step_end(text, "\n\n")
    outside = [i for i in range(len(text)) if text.startswith("\n\n", i) and not in_block(text[:i])]
    assert at == (outside[0] if outside else -1)
    if "```" not in text:
        assert at == text.find("\n\n")


def first_end(ends, text):
    """How much of ``text`` is sampled before its step ends."""
    return next((text[:i] for i in range(1, len(text) + 1) if ends.ended([ord(c) for c in text[:i]])), None)


def test_the_native_engine_reads_on_to_the_blocks_end():
    ends = DelimiterStop(Vocabulary(Characters(), 128), "\n\n")
    assert first_end(ends, "so\n\nthen") == "so\n\n"
    assert first_end(ends, PROGRAM) == PROGRAM.removesuffix("Done.")
    assert first_end(ends, "```\nx = 1\n\ny = 2") is None


def test_a_block_that_the_prompt_opened_counts():
    vocabulary = Vocabulary(Characters(), 128)
    ends, opened = DelimiterStop(vocabulary, "\n\n"), DelimiterStop(vocabulary, "\n\n", "```python\n")
    program = "import math\n\nx = 1\n```\n\nDone."
    assert ends.ended([ord(c) for c in "import math\n\n"])
    closed = program.removesuffix("Done.")
    met = [i for i in range(1, len(program) + 1) if opened.ended([ord(c) for c in program[:i]])]
    assert program[: met[0]] == closed


class Server:
    """What a vLLM server would say: goes on with the program, up to the stop string or the limit."""

    url = "http://vllm"

    def __init__(self):
        self.asked = []

    def complete(self, ids, max_tokens, stop=(), **_):
        rest = PROGRAM[len(ids) - 1 :]
        self.asked.append(max_tokens)
        end = min((rest.index(s) + len(s) for s in stop if s in rest), default=len(rest))
        said = rest[: min(end, max_tokens)]
        choice = {"finish_reason": "length", "stop_reason": None}
        if len(said) < max_tokens or said.endswith("\n\n"):
            choice = {"finish_reason": "stop", "stop_reason": "\n\n" if said.endswith("\n\n") else 0}
        return [ord(c) for c in said], [-0.5] * len(said), choice


@pytest.mark.parametrize(("cap", "said", "end"), [(200, PROGRAM.removesuffix("Done."), "delimiter"), (30, PROGRAM[:30], "cap")])
def test_a_vllm_server_is_asked_to_go_on(cap, said, end):
    server = Server()
    engine = VllmEngine([server], 1, seed=0, temperature=1.0, end_ids={0})
    engine.start([0], [[65]], ["a"])
    engine.submit(0, [], cap, DelimiterStop(Vocabulary(Characters(), 128), "\n\n"))
    (step,) = engine.advance()
    assert Characters().decode(step.tokens) == said
    assert step.end == end
    assert step.logprobs == [-0.5] * len(said)
    assert server.asked[0] == cap
    assert server.asked == sorted(server.asked, reverse=True)
    engine.close()


def said_by(mode, asked, tells, program=PROGRAM, counted=True):
    """Text and end of one step through HTTP, and what was asked for. ``tells``: the upstream says where it stopped."""
    bodies = []

    def answer(request):
        body = json.loads(request.content)
        bodies.append(body)
        earlier = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        rest = program[len(earlier.removeprefix("Q")) :]
        said, found, _ = rest.partition(body["stop"][0]) if "stop" in body else (rest, "", "")
        choice = {"text": said, "delta": {"content": said}, "finish_reason": "stop"}
        if tells:
            choice["stop_reason"] = body["stop"][0] if found else None
        lines = [{"choices": [choice]}]
        if counted:
            lines.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(said + found)}})
        return httpx.Response(200, text="".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n")

    async def run():
        async with httpx.AsyncClient(base_url="http://x/v1", transport=httpx.MockTransport(answer)) as client:
            conversation = await HttpUpstream(client, mode, tells=tells).open(asked)
            pieces = [piece async for piece in conversation.step(500, Until("\n\n"))]
        return "".join(p.text for p in pieces[:-1]), pieces[-1]

    text, end = asyncio.run(run())
    assert isinstance(end, StepEnd)
    return text, end, bodies


@pytest.mark.parametrize("chat", [True, False])
def test_an_upstream_that_continues_is_asked_to_go_on(chat):
    question = [{"role": "user", "content": "Q"}] if chat else None
    asked = Asked("m", question, None if chat else "Q", {"seed": 3})
    text, end, bodies = said_by("prefill", asked, True)
    assert text == PROGRAM.removesuffix("Done.")
    assert end.reason == "delimiter"
    assert end.usage.completion_tokens == len(PROGRAM.removesuffix("Done."))
    assert [b["seed"] for b in bodies] == [3, 4, 5]
    assert [b["max_tokens"] for b in bodies] == sorted({b["max_tokens"] for b in bodies}, reverse=True)


def test_several_blank_lines_in_a_block_are_no_end_of_the_turn():
    program = "```\nx = 1\n\n\n\ny = 2\n```\n\nDone."
    text, end, _ = said_by("prefill", Asked("m", None, "Q", {}), True, program)
    assert (text, end.reason) == (program.removesuffix("Done."), "delimiter")


def test_an_upstream_that_says_nothing_and_counts_nothing_is_not_asked_for_ever():
    program = "```\nx = 1" + "\n" * 400
    _, end, bodies = said_by("prefill", Asked("m", None, "Q", {}), True, program, counted=False)
    assert end.reason == "delimiter"
    assert len(bodies) == 2


@pytest.mark.parametrize("mode", ["turn", "prefill"])
def test_an_upstream_that_does_not_say_where_it_stopped_is_not_asked_to_stop(mode):
    """Nor one whose answers cannot be continued in the middle; the step is the same."""
    asked = Asked("m", [{"role": "user", "content": "Q"}], None, {})
    text, end, bodies = said_by(mode, asked, mode == "turn")
    assert (text, end.reason, end.usage.estimated) == (PROGRAM.removesuffix("Done."), "delimiter", True)
    assert len(bodies) == 1
    assert "stop" not in bodies[0]
