"""``Planner.wrap`` of an OpenAI client: what users of the openai library do with it, in its normal form."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from rsim.errors import UserError
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.serving.wrap import wrap
from serving import serving

PLANNER = sequence_planner(load_strategies("default"), ["validation", "termination"])
SAID = [{"role": "user", "content": "2+2?"}]
ASKED = {"model": "m", "messages": SAID}


class Upstream:
    """Answers each call with two words, or as the model's name says; ``seen`` is what it was sent."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict, dict]] = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", lambda: {"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append((body, dict(request.headers)))
        if body["model"].isdecimal():
            refused = {"error": {"message": "no", "type": "t", "param": "x", "code": "c"}}
            return JSONResponse(refused, int(body["model"]), {"Retry-After": "0"})
        if body["model"] == "slow":
            await asyncio.sleep(2)
        form = body.get("response_format")
        text = '{"answer": 4}' if form else "It is four."
        if not body.get("stream"):
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            return JSONResponse(
                {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
            )

        async def said():
            for delta, reason in (({"content": "It is "}, None), ({"content": "four."}, None), ({}, "stop")):
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"
            yield 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'

        return StreamingResponse(said(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def upstream():
    return Upstream()


@pytest.fixture(scope="module")
def url(upstream):
    with serving(upstream.app) as url:
        yield url


def new(url: str, kind: type = openai.OpenAI, **options):
    return wrap(PLANNER, kind(base_url=url, api_key="k", **{"max_retries": 0} | options), mode="turn", paraphrase="first")


@pytest.fixture(scope="module")
def planned(url):
    with new(url) as planned:
        yield planned


class Answer(BaseModel):
    answer: int


def test_it_is_an_openai_client_whose_answers_are_planned(planned, upstream):
    assert isinstance(planned, openai.OpenAI)
    reply = planned.chat.completions.create(**ASKED)
    assert isinstance(reply, openai.types.chat.ChatCompletion)
    assert [s["strategy"] for s in reply.rsim["choices"][0]["steps"]] == ["validation", "termination"][
        : len(reply.rsim["choices"][0]["steps"])
    ]
    assert upstream.seen[-1][1]["authorization"] == "Bearer k"
    assert upstream.seen[-1][1]["x-stainless-lang"] == "python", "the client's own headers go on"
    assert planned.models.list().data[0].id == "m"


def test_streams_are_openais(planned):
    whole = planned.chat.completions.create(**ASKED).choices[0].message.content
    with planned.chat.completions.create(stream=True, **ASKED) as stream:
        assert isinstance(stream, openai.Stream)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == whole
    stream = planned.chat.completions.create(stream=True, **ASKED)
    next(iter(stream))
    stream.close()
    with planned.chat.completions.stream(**ASKED) as helped:
        helped.until_done()
        assert helped.get_final_completion().choices[0].message.content == whole


def test_async_clients_await_their_streams(url):
    async def go() -> tuple[str, str]:
        async with new(url, openai.AsyncOpenAI) as planned:
            reply = await planned.chat.completions.create(**ASKED)
            stream = await planned.chat.completions.create(stream=True, **ASKED)
            pieces = [c.choices[0].delta.content or "" async for c in stream]
            assert (await planned.models.list()).data
            async with planned.chat.completions.stream(**ASKED) as helped:
                final = await helped.get_final_completion()
            assert final.choices[0].message.content == reply.choices[0].message.content
            with pytest.raises(openai.RateLimitError):
                await planned.chat.completions.create(model="429", messages=SAID)
            assert (await planned.chat.completions.with_raw_response.create(**ASKED)).parse().rsim
        return reply.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(go())
    assert whole == streamed


def test_messages_and_arguments_come_in_all_forms(planned, upstream):
    reply = planned.chat.completions.create(
        model="m", messages=tuple(SAID), temperature=openai.NOT_GIVEN, max_tokens=openai.omit, stop=openai.NOT_GIVEN,
        extra_body={"top_k": 7}, extra_headers={"x-mine": "1"}, timeout=5,
    )  # fmt: skip
    body, headers = upstream.seen[-1]
    assert (body["top_k"], headers["x-mine"]) == (7, "1")
    assert not {"extra_body", "temperature", "timeout", "extra_headers"} & set(body)
    again = [*SAID, reply.choices[0].message, {"role": "user", "content": "Sure?"}]
    assert planned.chat.completions.create(model="m", messages=again).rsim
    assert planned.chat.completions.with_raw_response.create(**ASKED).parse().rsim
    assert planned.with_options(timeout=5, api_key="other").chat.completions.create(**ASKED).rsim
    assert upstream.seen[-1][1]["authorization"] == "Bearer other"


def test_what_is_not_planned_is_the_clients_own(planned, upstream):
    done = planned.chat.completions.parse(**ASKED, response_format=Answer)
    assert done.choices[0].message.parsed == Answer(answer=4)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for options in ({"tools": tools}, {"extra_body": {"rsim": False}}):
        assert "rsim" not in planned.chat.completions.create(**ASKED, **options).model_extra
    assert "rsim" not in upstream.seen[-1][0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "error"),
    [(400, openai.BadRequestError), (401, openai.AuthenticationError), (404, openai.NotFoundError),
     (429, openai.RateLimitError), (500, openai.InternalServerError)],
)  # fmt: skip
def test_errors_are_openais(planned, status, error, stream):
    with pytest.raises(error) as refused:
        planned.chat.completions.create(model=str(status), messages=SAID, stream=stream)
    assert (refused.value.status_code, refused.value.code, refused.value.param) == (status, "c", "x")


def test_errors_of_ours_are_openais_too(planned):
    for wrong in ({"n": 0}, {"temperature": -1}, {"stop": [1]}):
        with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
            planned.chat.completions.create(**ASKED, **wrong)


def test_a_call_is_tried_as_often_as_the_client_says(url, upstream):
    with new(url, max_retries=2) as planned:
        before = len(upstream.seen)
        with pytest.raises(openai.RateLimitError):
            planned.chat.completions.create(model="429", messages=SAID)
        assert len(upstream.seen) - before == 3, "not three times three"


def test_its_time_limit_is_obeyed(planned):
    began = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        planned.chat.completions.create(model="slow", messages=SAID, timeout=0.5)
    assert time.monotonic() - began < 5


def test_clients_of_the_older_library_are_wrapped_and_closed_twice(url):
    planned = new(url, http_client=httpx.Client())
    assert planned.chat.completions.create(**ASKED).rsim
    planned.close()
    planned.close()
    with pytest.raises(RuntimeError, match="closed"):
        planned.chat.completions.create(**ASKED)


def test_a_bad_mode_is_said(url):
    with pytest.raises(UserError, match="mode"):
        wrap(PLANNER, openai.OpenAI(base_url=url, api_key="k"), mode="sideways")


def test_what_a_client_has_in_every_query_goes_on():
    """Azure refuses requests without an api-version."""
    asked: list[str] = []
    azure = FastAPI()

    @azure.post("/openai/deployments/m/chat/completions")
    async def complete(request: Request):
        asked.append(str(request.query_params))
        return JSONResponse({"choices": [{"index": 0, "message": {"content": "Four."}, "finish_reason": "stop"}]})

    with serving(azure) as url:
        options = {"azure_endpoint": url.removesuffix("/v1"), "api_version": "1", "api_key": "k"}
        with wrap(PLANNER, openai.AzureOpenAI(azure_deployment="m", **options), mode="turn") as planned:
            assert planned.chat.completions.create(**ASKED).rsim
        assert set(asked) == {"api-version=1"}
        with pytest.raises(UserError, match="azure_deployment"):
            wrap(PLANNER, openai.AzureOpenAI(**options), mode="turn")
