"""Formats, tools, log-probs and top-p of a model in this process; a format behind an upstream. Planned in the steps, strict in the
final one."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel

from rsim.errors import UserError
from rsim.policies.loading import load_reasoner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving.grammar import Shape
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.play import Asked
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving
from test_wrap import PROMPTS, SCRIPTED, StandIn

RULES = PlayRules(delimiter="\n", max_steps=2, step_tokens=8, max_tokens=110, answer_tokens=8)
PLANNER = sequence_planner(load_strategies("lab"), ["continuation", "termination"])
SAID = [{"role": "user", "content": "7+8=?"}]
MODELS = ["nano-s", f"nano-s{SUFFIX}"]
ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
    "additionalProperties": False}}}  # fmt: skip


class Answer(BaseModel):
    answer: int
    why: str


@pytest.fixture(scope="module")
def local():
    nano = load_reasoner("nano-s", device="cpu")
    with serving(create_app(ServeConfig(rules=RULES, slots=4), PLANNER, nano, name="nano-s")) as url:
        yield url


@pytest.fixture(scope="module")
def client(local):
    with openai.OpenAI(base_url=local, api_key="x", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_keeps_to_its_schema(client, model):
    """Though this model never saw JSON."""
    pytest.importorskip("llguidance")
    asked = {"model": model, "messages": SAID, "temperature": 0, "max_tokens": 110}
    done = client.chat.completions.parse(**asked, response_format=Answer).choices[0]
    assert isinstance(done.message.parsed, Answer)
    with client.chat.completions.stream(**asked, response_format=Answer) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == done.message.parsed
    thought = getattr(done.message, "reasoning_content", "")
    assert bool(thought) == model.endswith(SUFFIX), "the steps before it are thinking"
    anything = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    assert isinstance(json.loads(anything.message.content), dict)
    responded = client.responses.parse(model=model, input="7+8=?", temperature=0, max_output_tokens=110, text_format=Answer)
    assert responded.output_parsed == done.message.parsed


@pytest.mark.parametrize("model", MODELS)
def test_tools_are_called(client, local, model):
    pytest.importorskip("llguidance")
    asked = {"model": model, "messages": SAID, "temperature": 0, "max_tokens": 110, "tools": [ADD]}
    done = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    (call,) = done.message.tool_calls
    assert (done.finish_reason, call.function.name, done.message.content) == ("tool_calls", "add", None)
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    named = {"type": "function", "function": {"name": "add"}}
    pieces = list(client.chat.completions.create(**asked, tool_choice=named, stream=True))
    assert re.fullmatch("[a-zA-Z0-9]{9}", call.id), "Mistral's templates refuse any other"
    (streamed,) = [c.choices[0].delta.tool_calls for c in pieces if c.choices[0].delta.tool_calls]
    assert streamed[0].function.arguments == call.function.arguments
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    free = client.chat.completions.create(**asked).choices[0]
    assert bool(free.message.content) != bool(free.message.tool_calls)
    said = [*SAID, done.message, {"role": "tool", "tool_call_id": call.id, "content": "15"}]
    assert client.chat.completions.create(
        model=model, messages=said[-1:], tools=[ADD], tool_choice="none", max_tokens=9
    ).choices
    item = client.responses.create(model=model, input="7+8=?", temperature=0, max_output_tokens=110, tool_choice="required",
                                   tools=[ADD["function"] | {"type": "function"}]).output[-1]  # fmt: skip
    assert (item.type, item.name, item.arguments) == ("function_call", "add", call.function.arguments)
    block = httpx.post(f"{local}/messages", json=asked | {"tool_choice": {"type": "any"}, "tools": [
        {"name": "add", "input_schema": ADD["function"]["parameters"]}]}, timeout=600).json()  # fmt: skip
    assert (block["stop_reason"], block["content"][-1]["type"]) == ("tool_use", "tool_use")
    assert block["content"][-1]["input"] == json.loads(call.function.arguments)


def test_a_tool_beside_a_format_leaves_the_answer_its_form(client):
    """The format was ignored, as soon as there was a tool."""
    pytest.importorskip("llguidance")
    form = {"type": "json_object"}
    for model in MODELS:
        done = client.chat.completions.create(
            model=model, messages=SAID, temperature=0, max_tokens=110, tools=[ADD], response_format=form
        ).choices[0]
        assert done.message.tool_calls or isinstance(json.loads(done.message.content), dict)


CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
CHAT = [
    {"role": "user", "content": "7+8=?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "x", "content": 'it is\n"15"'},
    {"role": "tool", "tool_call_id": "x", "content": "15"},
    {"role": "user", "content": "Sure?"},
]


def prompt_of(template, messages):
    nano = load_reasoner("nano-s", device="cpu")
    tokenizer = copy.deepcopy(nano.tokenizer)
    tokenizer.chat_template = template
    texts = []
    reasoner = Reasoner(nano.model, tokenizer)
    reasoner.injected_ids = lambda text: texts.append(text) or [1]
    local = LocalUpstream(reasoner, 1)
    local._prompt(Asked("", messages, None))
    local.close()
    return texts[-1]


def test_a_template_that_knows_tools_gets_arguments_as_objects():
    """Qwen's wrote a JSON in a JSON; Llama's writes results as JSON, and was taken for one that leaves them out (400)."""
    template = (
        "{# tools #}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert prompt_of(template, CHAT) == '7+8=?{"a": 7}{"a": 7}Let me see."it is\\n\\"15\\"""15"Sure?'
    empty = CALL | {"function": {"name": "add", "arguments": ""}}  # as some servers write a call without any
    assert prompt_of(template, [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [empty]}]) == "7+8=?{}"
    cut = CALL | {"function": {"name": "add", "arguments": '{"a": '}}
    with pytest.raises(UserError, match="must be JSON"):
        prompt_of(template, [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [cut]}])


def test_a_template_without_tools_gets_all_of_a_turn_and_turns_that_alternate():
    """What stood beside a call was lost; two results, or one with a question, were two user messages in a row (400)."""
    said = prompt_of("{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}", CHAT)
    called = '<tool_call>{"name": "add", "arguments": {"a": 7}}</tool_call>'
    assert said == f'[user: 7+8=?][assistant: Let me see.{called}{called}][user: it is\n"15"\n\n15\n\nSure?]'


def test_stop_strings_leave_the_thinking_before_an_answer_in_a_form_alone(client):
    """What might begin one was moved from the thinking into the answer."""
    pytest.importorskip("llguidance")
    asked = {
        "model": MODELS[1],
        "messages": SAID,
        "temperature": 0,
        "max_tokens": 110,
        "response_format": {"type": "json_object"},
    }
    expected = client.chat.completions.create(**asked).choices[0].message
    assert "\n" in expected.reasoning_content
    for stop in ("\n", "\nx"):
        assert client.chat.completions.create(**asked, stop=stop).choices[0].message == expected


def test_steps_leave_room_for_an_answer_in_a_form():
    """A call is 66 of this model's tokens; five steps would take them all."""
    pytest.importorskip("llguidance")
    rules = PlayRules(delimiter="\n", max_steps=8, step_tokens=24, max_tokens=200, answer_tokens=8)
    planner = sequence_planner(load_strategies("lab"), ["continuation"] * 7 + ["termination"])
    nano = load_reasoner("nano-s", device="cpu")
    body = {"model": f"nano-s{SUFFIX}", "messages": SAID, "max_tokens": 120, "temperature": 0, "tools": [ADD],
            "tool_choice": "required"}  # fmt: skip
    with serving(create_app(ServeConfig(rules=rules, slots=2), planner, nano, name="nano-s")) as url:
        choice = httpx.post(f"{url}/chat/completions", json=body, timeout=600).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls", choice
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]).keys() == {"a", "b"}


@pytest.mark.parametrize("model", MODELS)
def test_log_probs_are_the_models_own(client, model):
    asked = {"model": model, "messages": SAID, "temperature": 0, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    reply = client.chat.completions.create(**asked)
    shown = reply.choices[0].logprobs.content
    assert len(shown) == reply.usage.completion_tokens
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2 for entry in shown), "greedy"
    assert all(-20 < entry.logprob <= 0 for entry in shown)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    told = [(choice.delta.content, [e.token for e in choice.logprobs.content]) for choice in chunks if choice.logprobs]
    assert [token for _, tokens in told for token in tokens] == [e.token for e in shown]
    assert all(text in ("".join(tokens), "") for text, tokens in told), "those of a chunk's own text"
    old = (
        client.completions.create(model=model, prompt="<q>7+8=?<a>", temperature=0, max_tokens=30, logprobs=1)
        .choices[0]
        .logprobs
    )
    assert old.token_logprobs == [best[token] for token, best in zip(old.tokens, old.top_logprobs, strict=True)]


@pytest.mark.parametrize("model", MODELS)
def test_log_probs_are_told_up_to_a_stop_string(client, model):
    """There were none at all in a planned answer that met one."""
    asked = {"model": model, "messages": SAID, "temperature": 0, "max_tokens": 30, "logprobs": True}
    tokens = [e.token for e in client.chat.completions.create(**asked).choices[0].logprobs.content]
    stop = "".join(tokens[2:5]).strip()
    reply = client.chat.completions.create(**asked, stop=stop).choices[0]
    told = [e.token for e in reply.logprobs.content]
    assert reply.finish_reason == "stop"
    assert 3 <= len(told) <= 5
    assert told == tokens[: len(told)]
    (old,) = client.completions.create(
        model=model, prompt="<q>7+8=?<a>", max_tokens=30, temperature=0, logprobs=1, stop=stop
    ).choices
    chunks = client.completions.create(
        model=model, prompt="<q>7+8=?<a>", max_tokens=30, temperature=0, logprobs=1, stop=stop, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == old.logprobs.text_offset


def test_log_probs_are_of_the_answers_own_text(client):
    """Those of the steps that are told as thinking stood among them, and offsets left out what was injected."""
    asked = {"model": MODELS[1], "temperature": 0, "max_tokens": 60, "prompt": "<q>7+8=?<a>", "logprobs": 0}
    choice = client.completions.create(**asked).choices[0]
    shown = choice.logprobs
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] in (token, ""), "the end of the turn is none"
    assert shown.text_offset[0] > 0, "behind the prompt"
    pytest.importorskip("llguidance")
    form = {"type": "json_object"}
    (done,) = client.chat.completions.create(
        model=MODELS[1], messages=SAID, temperature=0, max_tokens=110, response_format=form, logprobs=True
    ).choices
    assert done.message.reasoning_content
    assert "".join(entry.token for entry in done.logprobs.content).startswith(done.message.content)


def test_a_part_of_a_character_has_no_bytes_of_its_own():
    tokenizer = SimpleNamespace(decode=lambda ids: "\ufffd" if ids == [1] else "é")
    shape = SimpleNamespace(keep=lambda tokens: None, kept=[(1, -0.5, []), (2, -0.5, [])])
    step = SimpleNamespace(told=0)
    local = SimpleNamespace(reasoner=SimpleNamespace(tokenizer=tokenizer))
    assert [entry["bytes"] for entry in LocalUpstream._logprobs(local, step, shape, [1, 2])] == [None, [0xC3, 0xA9]]


def test_small_fields(client):
    asked = {"messages": SAID, "seed": 1}
    neutral = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "user": "u", "store": False,
               "metadata": {}, "service_tier": "auto"}  # fmt: skip
    for model in MODELS:
        plain = client.chat.completions.create(model=model, **asked)
        assert client.chat.completions.create(model=model, **asked, **neutral).choices == plain.choices
        assert client.chat.completions.create(model=model, **asked, max_tokens=-1).choices == plain.choices
        assert client.chat.completions.create(model=model, **asked, max_completion_tokens=1).usage.completion_tokens == 1
        greedy = client.chat.completions.create(model=model, messages=SAID, temperature=0).choices[0].message
        sharp = client.chat.completions.create(model=model, messages=SAID, temperature=0.9, top_p=1e-9, seed=3)
        assert model.endswith(SUFFIX) or sharp.choices[0].message == greedy
        assert client.models.retrieve(model).id == model
    for wrong in ({"top_p": 0}, {"top_p": "x"}, {"top_logprobs": 99, "logprobs": True}, {"tools": [7]}, {"max_tokens": -2},
                  {"response_format": {"type": "json_schema"}}, {"response_format": 7}, {"extra_body": {"guided_json": {}}},
                  {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "no"}}}):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=MODELS[1], **asked, **wrong)
    for wrong in ({"tool_choice": 7, "tools": [ADD]}, {"tool_choice": {"function": "add"}, "tools": [ADD]},
                  {"tools": [{"type": "function", "function": {"name": "x", "parameters": 7}}]},
                  {"messages": [{"role": "assistant", "content": None, "tool_calls": 7}]},
                  {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "x", "arguments": {}}}]}]},
                  {"messages": [{"role": "tool", "content": None}]}):  # fmt: skip
        for model in MODELS:
            body = {"model": model, "max_tokens": 20} | asked | wrong
            assert httpx.post(f"{client.base_url}chat/completions", json=body, timeout=600).status_code == 400, wrong
    for odd in ({"reasoning_effort": ["low"]}, {"rsim": {"max_steps": 1, "gate": 0}}):
        assert client.chat.completions.create(model=MODELS[1], **asked, extra_body=odd)
    for unknown in (
        lambda: client.chat.completions.create(model="nonsense-rsim", **asked),
        lambda: client.models.retrieve("no"),
    ):
        with pytest.raises(openai.NotFoundError):
            unknown()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((5e-324, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.96, 4)):
        shaped = Shape(1.0, top_p, 9, None, None, None)(logits.clone(), [])
        assert int(shaped.isfinite().sum()) == kept


def test_a_format_behind_an_upstream_is_for_the_final_step_alone():
    upstream = StandIn(["one two", "three", '{"answer": 4}'])
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    config = ServeConfig(upstream="", rules=PlayRules(paraphrase="first"))
    body = {"model": f"m{SUFFIX}", "messages": SAID, "response_format": form}
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there, rules=config.rules), SCRIPTED)) as url:
        reply = httpx.post(f"{url}/chat/completions", json=body | {"rsim": {"structured": True}}).json()
        assert [b.get("response_format") for b in upstream.bodies] == [None, None, form]
        message = reply["choices"][0]["message"]
        assert json.loads(message["content"]) == {"answer": 4}
        assert message["reasoning_content"].startswith(f"{PROMPTS[0]}one two")
        passed = httpx.post(f"{url}/chat/completions", json=body | {"stream": True})
        assert "rsim" not in passed.text, "without the word it passes through"
        assert upstream.bodies[-1]["response_format"] == form


def test_a_turn_that_ends_early_is_still_answered_in_form():
    upstream = StandIn(['{"answer": 4}'])
    form = {"type": "json_object"}
    body = {"model": f"m{SUFFIX}", "messages": SAID, "response_format": form, "rsim": {"structured": True}}
    with serving(upstream.app) as there, serving(create_app(ServeConfig(upstream=there), SCRIPTED)) as url:
        reply = httpx.post(f"{url}/chat/completions", json=body).json()
    assert [b.get("response_format") for b in upstream.bodies] == [None, form]
    assert reply["choices"][0]["message"]["content"].strip() == '{"answer": 4}'


@pytest.mark.parametrize(("show", "place"), [("reasoning", "reasoning_content"), ("none", None)])
def test_prompts_can_be_shown_as_thinking_or_not_at_all(show, place):
    upstream = StandIn(["one two", "three", "so 5"])
    config = ServeConfig(upstream="", rules=PlayRules(paraphrase="first"))
    with (
        serving(upstream.app) as there,
        serving(create_app(ServeConfig(upstream=there, rules=config.rules, show=show), SCRIPTED)) as url,
    ):
        message = httpx.post(f"{url}/chat/completions", json={"model": f"m{SUFFIX}", "messages": SAID}).json()["choices"][0][
            "message"
        ]
    assert PROMPTS[0] not in message["content"]
    assert "one two" in message["content"]
    assert place is None or PROMPTS[0] in message[place]
