"""The wire formats beside OpenAI's chats: ``/v1/responses``, ``/v1/messages``; what usage counts, and how much planning is asked for."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving

RULES = PlayRules(delimiter="\n", max_steps=4, step_tokens=8, max_tokens=100, answer_tokens=8)
PLANNER = sequence_planner(load_strategies("lab"), ["continuation"] * 9)
Q = "7+8=?"
MODELS = ["nano-s", f"nano-s{SUFFIX}"]


@pytest.fixture(scope="module")
def local():
    nano = load_reasoner("nano-s", device="cpu")
    with serving(create_app(ServeConfig(rules=RULES, slots=4), PLANNER, nano, name="nano-s")) as url:
        yield url


@pytest.fixture(scope="module")
def proxied(local):
    with serving(create_app(ServeConfig(upstream=local, mode="prefill", rules=RULES, slots=4), PLANNER)) as url:
        yield url


@pytest.fixture(params=["local", "proxied"])
def url(request):
    return request.getfixturevalue(request.param)


def post(url, path, status=200, **body):
    reply = httpx.post(f"{url}/{path}", json={"temperature": 0} | body, timeout=600)
    assert reply.status_code == status, reply.text
    return reply.json()


def events(url, path, **body):
    reply = httpx.post(f"{url}/{path}", json={"temperature": 0, "stream": True} | body, timeout=600)
    parts = [part.split("\n", 1) for part in reply.text.strip().split("\n\n")]
    shown = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name.removeprefix("event: ") for name, _ in parts] == [data["type"] for data in shown]
    return shown


@pytest.fixture(scope="module", autouse=True)
def warm(proxied):
    """By then it is known that this upstream tells why it stopped: its own counts are shown, and no estimates."""
    chat(proxied, MODELS[1])


def chat(url, model, **more):
    return post(url, "chat/completions", model=model, messages=[{"role": "user", "content": Q}], **more)


@pytest.mark.parametrize("model", MODELS)
def test_responses_say_what_chats_say(url, model):
    expected = chat(url, model, max_tokens=100)
    status = "completed" if expected["choices"][0]["finish_reason"] == "stop" else "incomplete"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        reply = client.responses.create(model=model, input=Q, temperature=0, max_output_tokens=100)
        assert reply.output_text == expected["choices"][0]["message"]["content"]
        assert reply.usage.output_tokens == expected["usage"]["completion_tokens"]
        assert reply.usage.input_tokens == expected["usage"]["prompt_tokens"]
        assert (reply.status, bool(getattr(reply, "rsim", None))) == (status, model.endswith(SUFFIX))
        parts = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": Q}]}]
        with client.responses.stream(model=model, input=parts, temperature=0, max_output_tokens=100) as stream:
            kinds = [e.type for e in stream]
            final = stream.get_final_response()
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output_text == reply.output_text
    assert final.usage == reply.usage
    cut = post(url, "responses", model=model, input=Q, max_output_tokens=3)
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


@pytest.mark.parametrize("model", MODELS)
def test_messages_say_what_chats_say(url, model):
    expected = chat(url, model, max_tokens=100)
    reason = "end_turn" if expected["choices"][0]["finish_reason"] == "stop" else "max_tokens"
    said = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}]}
    reply = post(url, "messages", **said)
    assert [b["type"] for b in reply["content"]] == ["text"]
    assert reply["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert (reply["type"], reply["role"], reply["stop_reason"], reply["model"]) == ("message", "assistant", reason, model)
    assert reply["usage"]["output_tokens"] == expected["usage"]["completion_tokens"]
    shown = events(url, "messages", **said)
    assert [e["type"] for e in shown if e["type"] != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]  # fmt: skip
    assert "".join(e["delta"]["text"] for e in shown if e["type"] == "content_block_delta") == reply["content"][0]["text"]
    assert shown[-2]["delta"] == {"stop_reason": reason, "stop_sequence": None}
    assert shown[-2]["usage"] == reply["usage"]
    stop = reply["content"][0]["text"][5:8]
    cut = post(url, "messages", **said, stop_sequences=[stop])
    assert (cut["stop_reason"], cut["stop_sequence"]) in [("stop_sequence", stop), (reason, None)]


def test_a_last_message_by_the_assistant_is_the_beginning_of_the_answer(url):
    begun = [{"role": "user", "content": Q}, {"role": "assistant", "content": "Next: 7+8"}]
    expected = post(url, "chat/completions", model=MODELS[1], messages=begun, continue_final_message=True, max_tokens=60)
    reply = post(url, "messages", model=MODELS[1], messages=begun, max_tokens=60)
    assert reply["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert reply["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]


def test_anthropics_clients_have_their_own_key_and_errors(local):
    with serving(create_app(ServeConfig(upstream=local, mode="prefill", rules=RULES, api_key="k"), PLANNER)) as url:
        said = {"model": MODELS[1], "max_tokens": 9, "messages": [{"role": "user", "content": Q}]}
        assert httpx.post(f"{url}/messages", json=said, headers={"x-api-key": "k"}).status_code == 200
        refused = httpx.post(f"{url}/messages", json=said, headers={"x-api-key": "no"})
    assert (refused.status_code, refused.json()["type"], refused.json()["error"]["type"]) == (
        401,
        "error",
        "authentication_error",
    )


def test_what_is_malformed_is_refused_in_the_formats_own_form(url):
    for wrong in ({"messages": 7}, {"messages": [7]}, {"messages": [{"role": "user", "content": [7]}]}, {"system": 7}, {"tools": 7},
                  {"output_config": 7}, {"max_tokens": 0}):  # fmt: skip
        body = {"model": MODELS[1], "messages": [{"role": "user", "content": Q}]} | wrong
        assert post(url, "messages", 400, **body)["error"]["type"] == "invalid_request_error", wrong
    for wrong in (
        {"input": 7},
        {"input": [7]},
        {"input": [{"type": "item_reference"}]},
        {"text": 7},
        {"reasoning": 7},
        {"tools": 7},
        {"include": 7},
        {"background": True},
        {"prompt": {"id": "pmpt_1"}},
        {"top_logprobs": 2},
        {"include": ["message.output_text.logprobs"]},
    ):
        assert (
            post(url, "responses", 400, **{"model": MODELS[1], "input": Q} | wrong)["error"]["type"] == "invalid_request_error"
        )


def test_effort_and_thinking_are_steps_and_a_gate(url):
    def steps(path="chat/completions", **more):
        asked = {"input": Q} if path == "responses" else {"messages": [{"role": "user", "content": Q}]}
        (choice,) = post(url, path, model=MODELS[1], **asked, **more)["rsim"]["choices"]
        return len(choice["steps"]), any(s["prompt"] for s in choice["steps"])

    everything = steps()
    assert everything[0] > 2
    assert steps(reasoning_effort="high") == everything
    assert steps(reasoning_effort="low") == steps(rsim={"max_steps": 1}) == steps("responses", reasoning={"effort": "low"})
    assert steps(reasoning_effort="low")[0] < steps(reasoning_effort="medium")[0] <= everything[0]
    assert steps("messages", max_tokens=60, thinking={"type": "enabled", "budget_tokens": 8}) == steps(rsim={"max_steps": 1})
    for off in (steps(reasoning_effort="none"), steps(rsim={"gate": 1}), steps("responses", reasoning={"effort": "none"}),
                steps("messages", max_tokens=60, thinking={"type": "disabled"})):  # fmt: skip
        assert off[1] is False, "the model is left alone"
    assert steps(rsim={"max_steps": 99}) == everything, "no more than the rules allow"
    for wrong in ({"gate": 2}, {"gate": "1"}, {"max_steps": 0}):
        chat(url, MODELS[1], rsim=wrong, status=400)


def test_each_step_says_how_long_it_took(url):
    reply = chat(url, MODELS[1])
    steps = reply["rsim"]["choices"][0]["steps"]
    assert all(0 < step["seconds"] < 60 for step in steps)
    streamed = httpx.post(f"{url}/chat/completions", json={"model": MODELS[1], "stream": True, "temperature": 0,
                                                           "messages": [{"role": "user", "content": Q}]}, timeout=600).text  # fmt: skip
    last = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")][-1]
    assert len(last["rsim"]["seconds"]) == len(steps)


@pytest.mark.parametrize("path", ["responses", "messages"])
def test_several_answers_have_no_place_in_these_formats(url, path):
    """A stream mixed them into one text; whole, all were billed and one was shown."""
    asked = {"input": Q} if path == "responses" else {"messages": [{"role": "user", "content": Q}]}
    for model in MODELS:
        assert "n: there is one answer" in post(url, path, 400, model=model, n=2, **asked)["error"]["message"]


def test_an_item_of_a_response_that_was_cut_is_incomplete(url):
    (item,) = post(url, "responses", model=MODELS[1], input=Q, max_output_tokens=3)["output"]
    assert item["status"] == "incomplete"
    shown = events(url, "responses", model=MODELS[1], input=Q, max_output_tokens=3)
    assert [e["item"]["status"] for e in shown if e["type"] == "response.output_item.done"] == ["incomplete"]
    (item,) = post(url, "responses", model=MODELS[1], input=Q, max_output_tokens=100)["output"]
    assert item["status"] == "completed"
