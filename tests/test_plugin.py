"""The plug-in server against the official client: planned answers, streams, usage, errors, passing through."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace

import httpx
import openai
import pytest

from rsim.config import load_config
from rsim.data.load import load_problems
from rsim.game.rollout import Game
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.serving.openai_api import Stops
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, Finished, Injected, PlayRules, StepEnd, TextDelta, Usage, play
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from serving import serving
from tiny import named_planner

RULES = PlayRules(delimiter="\n", max_steps=5, step_tokens=48, max_tokens=240, answer_tokens=12)
PROBLEMS = load_problems("lab", "dev", limit=12, seed=5)


@pytest.fixture(scope="module")
def nano():
    return load_reasoner("nano-s")


@pytest.fixture(scope="module")
def trained(nano):
    """A planner that chooses sensibly without training: its head begins with the base's own rows."""
    from rsim.policies.strategies import load_strategies

    return named_planner(load_strategies("lab"))


@pytest.fixture(scope="module")
def local(nano, trained):
    """The model in the server's process."""
    with serving(create_app(ServeConfig(rules=RULES, slots=8), trained, nano, name="nano-s")) as url:
        yield url


@pytest.fixture(scope="module")
def proxied(local, trained):
    """A second server, whose upstream is the first."""
    with serving(create_app(ServeConfig(upstream=local, rules=RULES, slots=8), trained)) as url:
        yield url


def client(url: str, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="x", max_retries=0, **options)


def ask(url: str, question: str, model: str = f"nano-s{SUFFIX}", **options: object):
    messages = [{"role": "user", "content": question}]
    return client(url).chat.completions.create(model=model, messages=messages, temperature=0, **options)


def test_in_process_answers_are_the_games_token_for_token(local, nano, trained):
    rules = replace(load_config("nano").rollout, paraphrase="first")
    for episode in Game(nano, trained, rules).play(PROBLEMS, seed=0, greedy=True):
        reply = ask(local, episode.problem.question)
        text = nano.tokenizer.decode(episode.token_ids[episode.prompt_length :], skip_special_tokens=True)
        assert reply.choices[0].message.content == text
        assert reply.rsim["mode"] == "exact"
        assert [s["strategy"] for s in reply.rsim["choices"][0]["steps"]] == [
            trained.strategies[s.strategy].name for s in episode.steps
        ]
        assert reply.usage.completion_tokens == episode.sampled_tokens
        assert reply.choices[0].finish_reason == "stop"


def test_a_stream_is_the_answer_in_pieces_with_injected_prompts_marked(local):
    question = PROBLEMS[0].question
    whole = ask(local, question)
    chunks = list(ask(local, question, stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({c.id for c in chunks}) == 1
    injected = [c.rsim for c in chunks if getattr(c, "rsim", None) and "injected" in c.rsim]
    assert [i["strategy"] for i in injected] == [s["strategy"] for s in whole.rsim["choices"][0]["steps"]]
    assert all(abs(sum(i["probabilities"].values()) - 1) < 0.01 for i in injected if not i["forced"])
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == ["stop"]
    assert chunks[-1].usage == whole.usage
    pieces = [c for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 2 * len(injected), "tokens must come one by one, not step by step"


def test_the_same_through_an_upstream(local, proxied):
    """The lab's tokenizer gives the same ids for the text as for its chunks, so that prefill by text is exact here."""
    for problem in PROBLEMS[:4]:
        prompt = f"<q>{problem.question}<a>"
        there = client(proxied).completions.create(model=f"nano-s{SUFFIX}", prompt=prompt, temperature=0)
        here = client(local).completions.create(model=f"nano-s{SUFFIX}", prompt=prompt, temperature=0)
        assert there.choices[0].text.split() == here.choices[0].text.split()
        assert there.choices[0].finish_reason == "stop"
        assert there.usage.completion_tokens > 0


def test_an_open_turn_is_continued(local, proxied):
    """``continue_final_message`` of vLLM's API: in this process, through an upstream, and planned."""
    question = {"role": "user", "content": PROBLEMS[0].question}

    def answer(url: str, said: str, model: str) -> str:
        body = {"model": model, "temperature": 0, "continue_final_message": True, "add_generation_prompt": False,
                "messages": [question, {"role": "assistant", "content": said}]}  # fmt: skip
        reply = httpx.post(f"{url}/chat/completions", json=body).raise_for_status().json()
        return said + reply["choices"][0]["message"]["content"]

    whole = ask(local, PROBLEMS[0].question, "nano-s").choices[0].message.content
    cut = whole.index("\n") + 1
    assert answer(local, whole[:cut], "nano-s").split() == whole.split()
    assert answer(proxied, whole[:cut], "nano-s").split() == whole.split()
    planned = answer(local, whole[:cut], f"nano-s{SUFFIX}")
    assert answer(proxied, whole[:cut], f"nano-s{SUFFIX}").split() == planned.split()
    refused = httpx.post(f"{local}/chat/completions", json={"model": "nano-s", "continue_final_message": True,
                                                            "messages": [question]})  # fmt: skip
    assert refused.status_code == 400


def test_async_client_and_many_answers_at_once_are_not_mixed(local):
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=local, api_key="x", max_retries=0) as many:
            replies = await asyncio.gather(*(
                many.chat.completions.create(
                    model=f"nano-s{SUFFIX}", messages=[{"role": "user", "content": p.question}], temperature=0
                )
                for p in PROBLEMS * 2
            ))  # fmt: skip
        return [r.choices[0].message.content for r in replies]

    together = asyncio.run(all_of_them())
    alone = [ask(local, p.question).choices[0].message.content for p in PROBLEMS]
    assert together == alone * 2


def test_n_answers_usage_and_seeds(local):
    question = PROBLEMS[1].question
    messages = [{"role": "user", "content": question}]
    api = client(local)
    many = api.chat.completions.create(model=f"nano-s{SUFFIX}", messages=messages, n=3, seed=4, temperature=1.0)
    again = api.chat.completions.create(model=f"nano-s{SUFFIX}", messages=messages, n=3, seed=4, temperature=1.0)
    texts = [c.message.content for c in many.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) > 1, "three choices are not one sample thrice"
    assert [c.index for c in many.choices] == [0, 1, 2]
    assert len(many.rsim["choices"]) == 3


def test_max_tokens_and_stop(local):
    question = PROBLEMS[2].question
    short = ask(local, question, max_tokens=5)
    assert short.usage.completion_tokens <= 5
    assert short.choices[0].finish_reason == "length"
    whole = ask(local, question).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = ask(local, question, stop=[stop]).choices[0]
    assert stop not in cut.message.content or cut.message.content.index(stop) < len(whole) // 2
    assert cut.finish_reason == "stop"


def test_usage_of_an_answer_cut_at_a_stop_string_counts_the_steps_before_it(local):
    question = PROBLEMS[0].question
    whole = ask(local, question)
    last = whole.rsim["choices"][0]["steps"][-1]["text"]
    cut = ask(local, question, stop=[last.strip()])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.prompt_tokens == whole.usage.prompt_tokens
    assert whole.usage.completion_tokens - 10 < cut.usage.completion_tokens <= whole.usage.completion_tokens
    assert cut.usage.model_extra["estimated"] is True


def test_what_a_stop_string_cuts_off_behind_a_step_is_counted_once():
    """At a step's delimiter the step is counted already."""
    spent = Usage()

    async def play():
        yield Injected("continuation", "so ", {})
        yield TextDelta("step ")
        yield TextDelta("one")
        spent.add(Usage(7, 5))
        yield TextDelta("\n\n", sampled=False)
        raise AssertionError("nobody reads on")

    async def last():
        return [event async for event in Stops(("\n\n",)).cut(play(), spent)][-1]

    assert asyncio.run(last()) == Finished("stop", Usage(7, 5), stop="\n\n")


def test_a_prompt_of_token_ids_is_the_prompt_of_its_text(local, proxied, nano):
    text = "<q>7*8+5=?<a>"
    ids = nano.tokenizer.encode(text)
    ask_for = {"model": f"nano-s{SUFFIX}", "temperature": 0, "max_tokens": 60}
    whole = client(local).completions.create(prompt=text, **ask_for)
    for prompt in (ids, [ids]):
        assert client(local).completions.create(prompt=prompt, **ask_for).choices[0].text == whole.choices[0].text
    assert len(client(local).completions.create(prompt=[ids, ids], **ask_for).choices) == 2
    assert client(proxied).completions.create(prompt=ids, **ask_for).choices[0].text == whole.choices[0].text
    for url, prompt in ((local, [10**6]), (local, [True]), (local, [[]]), (proxied, [10**6])):
        with pytest.raises(openai.BadRequestError):
            client(url).completions.create(prompt=prompt, **ask_for)


@pytest.mark.parametrize("server", ["local", "proxied"])
def test_planning_is_off_without_the_suffix_and_by_a_field(server, request):
    url = request.getfixturevalue(server)
    question = PROBLEMS[3].question
    plain = ask(url, question, model="nano-s")
    off = ask(url, question, extra_body={"rsim": False})
    assert plain.choices[0].message.content == off.choices[0].message.content
    assert getattr(plain, "rsim", None) is None
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(url, question, model="nano-s", stream=True) if c.choices)
    assert streamed == plain.choices[0].message.content


def test_models_health_and_metrics(local, proxied):
    names = [m.id for m in client(proxied).models.list()]
    assert f"nano-s{SUFFIX}" in names
    ask(local, PROBLEMS[0].question)
    health = httpx.get(local.replace("/v1", "/healthz")).json()
    assert (health["status"], health["mode"], health["approximate"]) == ("ok", "exact", False)
    shown = httpx.get(local.replace("/v1", "/metrics")).text
    assert 'rsim_requests_total{kind="chat",planned="true",status="200"}' in shown
    assert "rsim_active_requests 0.0" in shown
    assert httpx.get(local.replace("/v1", "/")).status_code == 200


def test_bad_requests_are_openai_errors(local):
    for body, param in [
        ({"messages": []}, "messages"), ({"messages": "x"}, "messages"), ({"max_tokens": 0}, "max_tokens"), ({"stop": 5}, "stop"),
        ({"stop": {"a": 1}}, "stop"), ({"n": 10**8}, "n"),
    ]:  # fmt: skip
        full = {"model": f"nano-s{SUFFIX}", "messages": [{"role": "user", "content": "7=?"}]} | body
        reply = httpx.post(f"{local}/chat/completions", json=full)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    reply = httpx.post(f"{local}/chat/completions", content=b"{")
    assert reply.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="top_k is not supported"):
        ask(local, "7=?", extra_body={"top_k": 5})


def test_a_model_that_is_not_served_is_not_found(local):
    for name in ("gpt-4o", "gpt-4o-rsim", "nano-m"):
        with pytest.raises(openai.NotFoundError, match=name):
            ask(local, "7=?", name)
    assert httpx.post(f"{local}/completions", json={"prompt": "7=?", "max_tokens": 5}).status_code == 200, "none is named"


def test_a_model_in_this_process_says_what_it_cannot_do_and_failures_are_counted(local):
    for kind, body in [
        ("chat/completions", {"tools": [{}]}),
        ("completions", {"suffix": "."}),
        ("completions", {"echo": True}),
    ]:
        asked = {"messages": [{"role": "user", "content": "7=?"}]} if kind.startswith("chat") else {"prompt": "7=?"}
        for model in ("nano-s", f"nano-s{SUFFIX}"):
            refused = httpx.post(f"{local}/{kind}", json=asked | body | {"model": model})
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.post(f"{local}/completions", json={"prompt": "7=?", "model": "nano-s", "max_tokens": 0}).status_code == 400
    shown = httpx.get(local.replace("/v1", "/metrics")).text
    assert 'rsim_requests_total{kind="completion",planned="false",status="400"}' in shown


def test_a_context_that_fills_up_still_gets_its_answer(nano, trained):
    """The prompt leaves some 200 tokens of nano-s's 1,024; the request allows more."""
    prompt = nano.tokenizer.encode("<q>" + "+".join(["17"] * 270) + "=?<a>")
    assert 780 < len(prompt) < 830
    rules = replace(RULES, step_tokens=60, max_tokens=4096, answer_tokens=12, max_steps=30)
    never_ends = sequence_planner(load_strategies("lab"), ["continuation"])
    with serving(create_app(ServeConfig(rules=rules, slots=1), never_ends, nano, name="nano-s")) as url:
        body = {"model": f"nano-s{SUFFIX}", "prompt": prompt, "temperature": 0}
        answer = httpx.post(f"{url}/completions", json=body, timeout=60).json()
    steps = answer["rsim"]["choices"][0]["steps"]
    assert all(step["text"] for step in steps), "no prompt was shown that the model did not read"
    assert (steps[-1]["strategy"], steps[-1]["forced"]) == ("termination", True)
    assert len(steps) < 30
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_settings_of_the_wrong_kind_are_refused_and_take_no_slot(local):
    """More of them than there are slots; a negative seed is a seed."""
    body = {"model": f"nano-s{SUFFIX}", "messages": [{"role": "user", "content": PROBLEMS[0].question}]}
    for wrong in ({"temperature": "hot"}, {"temperature": -1}, {"seed": "abc"}, {"seed": 1.5}, {"temperature": True}) * 3:
        for model in ("nano-s", f"nano-s{SUFFIX}"):
            refused = httpx.post(f"{local}/chat/completions", json=body | wrong | {"model": model})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == next(iter(wrong))
    texts = {
        str(httpx.post(f"{local}/chat/completions", json=body | {"seed": -1, "temperature": 1}).json()["choices"]) for _ in "ab"
    }
    assert len(texts) == 1


def test_keys_body_limit_and_crowds(nano, trained):
    config = ServeConfig(rules=RULES, slots=1, waiting=1, api_key="secret", body_bytes=2000)
    with serving(create_app(config, trained, nano, name="nano-s")) as url:
        with pytest.raises(openai.AuthenticationError):
            ask(url, "7=?")
        headers = {"Authorization": "Bearer secret"}
        body = {"model": f"nano-s{SUFFIX}", "messages": [{"role": "user", "content": PROBLEMS[0].question}]}
        assert httpx.post(f"{url}/chat/completions", json=body, headers=headers).status_code == 200
        big = httpx.post(f"{url}/chat/completions", content=b"x" * 3000, headers=headers)
        assert (big.status_code, big.json()["error"]["type"]) == (413, "invalid_request_error")

        async def crowd() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60) as http:
                posts = (http.post(f"{url}/chat/completions", json=body, headers=headers) for _ in range(12))
                return list(await asyncio.gather(*posts))

        statuses = [r.status_code for r in asyncio.run(crowd())]
        assert set(statuses) == {200, 429}
        refused = next(r for r in asyncio.run(crowd()) if r.status_code == 429)
        assert refused.headers["retry-after"] == "1"


def test_prompts_of_one_token_and_none(local):
    assert client(local).completions.create(model="nano-s", prompt="<q>", max_tokens=4).usage.prompt_tokens == 1
    with pytest.raises(openai.BadRequestError, match="empty"):
        client(local).completions.create(model="nano-s", prompt="")


def test_a_fault_of_the_server_is_an_error_object(nano, trained, monkeypatch):
    def broken(*args):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("rsim.engine.native.choose", broken)
    with serving(create_app(ServeConfig(rules=RULES, slots=2), trained, nano, name="nano-s")) as url:
        for _ in range(2):  # the thread goes on
            reply = httpx.post(f"{url}/completions", json={"model": "nano-s", "prompt": "<q>7"})
            assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
            assert "fire" not in reply.text
        with pytest.raises(openai.APIError, match="failed in this server"):
            list(ask(url, "7=?", stream=True))
        monkeypatch.undo()
        assert ask(url, "7=?").choices[0].message.content


def test_a_stop_string_is_found_across_pieces():
    stops = Stops(("END",))
    assert stops.feed("so far E") == ("so far ", None)
    assert stops.feed("NOT") == ("ENOT", None)
    assert stops.feed("x EN") == ("x ", None)
    assert stops.feed("D more") == ("", "END")


def test_what_was_held_back_stays_sampled_where_a_delimiter_of_ours_follows():
    """A step lost its last characters in the list of steps."""

    async def events():
        yield TextDelta("so")
        yield TextDelta("\n", sampled=False)
        yield Finished("stop", Usage())

    async def shown():
        return [(e.text, e.sampled) async for e in Stops(("o 7",)).cut(events(), Usage()) if isinstance(e, TextDelta)]

    assert asyncio.run(shown()) == [("s", True), ("o", True), ("\n", False)]


def test_slow_headers_are_cut_off_and_slow_answers_are_not(monkeypatch, nano, trained):
    monkeypatch.setattr("rsim.serving.connections._HEADER_SECONDS", 0.4)
    with serving(create_app(ServeConfig(rules=RULES, slots=2), trained, nano, name="nano-s")) as url:
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        with socket.create_connection(address) as slow:
            slow.settimeout(10)
            slow.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
            assert slow.recv(100) == b"", "closed by the server"
        with socket.create_connection(address) as silent:
            silent.settimeout(10)
            assert silent.recv(100) == b""
        with httpx.Client() as kept:
            for _ in range(3):  # one connection, with pauses longer than the limit between its requests
                assert kept.get(url.replace("/v1", "/healthz")).status_code == 200
                time.sleep(0.6)
            body = {"model": "nano-s", "prompt": "<q>", "max_tokens": 600, "temperature": 1.0, "stream": True}
            began = time.monotonic()
            with kept.stream("POST", f"{url}/completions", json=body) as response:
                parts = []
                for line in response.iter_lines():
                    parts.append(line)
                    time.sleep(0.01)
            assert "data: [DONE]" in parts, parts
            assert time.monotonic() - began > 0.1


@pytest.mark.parametrize(("mode", "chat", "said"), [
    ("prefill", True, "final answer is \\boxed{"), ("turn", True, "final answer is:"), ("turn", False, "final answer is \\boxed{"),
])  # fmt: skip
def test_only_text_that_goes_on_can_leave_a_box_open(mode, chat, said):
    """A prompt that is a message of its own cannot; the box would stay open in the answer."""
    sent: list[str] = []

    class Upstream:
        async def open(self, asked):
            return self

        def inject(self, text):
            sent.append(text)

        def count(self, text):
            return len(text)

        async def step(self, max_new_tokens, until):
            yield TextDelta("5}")
            yield StepEnd("end_of_turn", Usage(), "5}")

        def room(self):
            return 10**6

        async def close(self): ...

    upstream = Upstream()
    upstream.mode = mode

    async def answer() -> str:
        planning = PlannerBatcher(sequence_planner(load_strategies(), ["termination"]), slots=1)
        running = asyncio.create_task(planning.run())
        try:
            asked = Asked("m", [{"role": "user", "content": "2+3=?"}] if chat else None, None if chat else "2+3=?")
            events = play(asked, planning, upstream, PlayRules(paraphrase="first"), 100)
            return "".join([e.text async for e in events if not isinstance(e, Finished)])
        finally:
            running.cancel()

    text = asyncio.run(answer())
    assert sent[0].endswith(said)
    assert text == f"{sent[0]}5}}"
