# mypy: ignore-errors
"""What other programs' clients do with a server of OpenAI's API: ``python client_calls.py BASE MODEL [NAME ...]``.

In an environment that has them (`studies.clients` makes it). A line of JSON for each: its name, and what went wrong ("" for
nothing). ``NAME``: the beginning of some calls' names; all without it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE, MODEL = (*sys.argv[1:3], "", "")[:2]
ASKED = "7+8=?"
SAID = [{"role": "user", "content": ASKED}]
LIMIT = 120
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
       "additionalProperties": False}  # fmt: skip
KEYS = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": BASE, "OPENAI_API_BASE": BASE, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
CALLS: list[Callable[[], Any]] = []  # each returns what must not be empty


def call(function: Callable[[], Any]) -> Callable[[], Any]:
    CALLS.append(function)
    return function


def _openai() -> Any:
    import openai

    return openai.OpenAI(max_retries=0, timeout=300)


def _form() -> Any:
    from pydantic import BaseModel

    class Answer(BaseModel):
        answer: int

    return Answer


@call
def openai_sync() -> Any:
    return _openai().chat.completions.create(model=MODEL, messages=SAID, max_tokens=LIMIT).choices[0].message.content


@call
def openai_async() -> Any:
    import openai

    async def ask() -> Any:
        async with openai.AsyncOpenAI(max_retries=0, timeout=300) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=LIMIT, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    return asyncio.run(ask())


@call
def openai_stream() -> Any:
    with _openai().chat.completions.stream(model=MODEL, messages=SAID, max_tokens=LIMIT) as stream:
        return stream.get_final_completion().choices[0].message.content


@call
def openai_parse() -> Any:
    done = _openai().chat.completions.parse(model=MODEL, messages=SAID, max_tokens=LIMIT, response_format=_form())
    return str(done.choices[0].message.parsed)


@call
def openai_tools() -> Any:
    tools = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]
    asked = {"model": MODEL, "messages": SAID, "max_tokens": LIMIT, "tools": tools, "tool_choice": "required"}
    return _openai().chat.completions.create(**asked).choices[0].message.tool_calls[0].function.arguments


@call
def openai_responses() -> Any:
    client = _openai()
    assert client.models.retrieve(MODEL).id == MODEL
    with client.responses.stream(model=MODEL, input=ASKED, max_output_tokens=200) as stream:
        return stream.get_final_response().output_text


@call
def openai_legacy_completions() -> Any:
    return _openai().completions.create(model=MODEL, prompt=f"<q>{ASKED}<a>", max_tokens=LIMIT, logprobs=1).choices[0].text


@call
def anthropic_messages() -> Any:
    import anthropic

    client = anthropic.Anthropic(base_url=BASE.removesuffix("/v1"), api_key="x", max_retries=0)
    return client.messages.create(model=MODEL, max_tokens=LIMIT, messages=SAID).content[0].text


@call
def anthropic_stream() -> Any:
    import anthropic

    client = anthropic.Anthropic(base_url=BASE.removesuffix("/v1"), api_key="x", max_retries=0)
    with client.messages.stream(model=MODEL, max_tokens=LIMIT, messages=SAID) as stream:
        return stream.get_final_text()


@call
def anthropic_tools() -> Any:
    import anthropic

    client = anthropic.Anthropic(base_url=BASE.removesuffix("/v1"), api_key="x", max_retries=0)
    tools = [{"name": "add", "description": "adds", "input_schema": ADD}]
    asked = {"model": MODEL, "max_tokens": LIMIT, "messages": SAID, "tools": tools, "tool_choice": {"type": "any"}}
    return [block for block in client.messages.create(**asked).content if block.type == "tool_use"]


def _langchain(**more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, max_tokens=LIMIT, max_retries=0, timeout=300, **more)


@call
def langchain_invoke() -> Any:
    return _langchain().invoke(ASKED).content


@call
def langchain_stream() -> Any:
    return "".join(str(c.content) for c in _langchain(stream_usage=True).stream(ASKED))


@call
def langchain_structured() -> Any:
    return str(_langchain().with_structured_output(_form(), method="json_schema").invoke(ASKED))


@call
def langchain_tools() -> Any:
    from langchain_core.tools import tool

    @tool
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    return _langchain().bind_tools([add], tool_choice="add").invoke(ASKED).tool_calls


@call
def langchain_responses() -> Any:
    return _langchain(use_responses_api=True).invoke(ASKED).content


def _llama_index() -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(model=MODEL, api_base=BASE, api_key="x", is_chat_model=True, max_tokens=LIMIT, max_retries=0, timeout=300)


@call
def llama_index_chat() -> Any:
    from llama_index.core.llms import ChatMessage

    return str(_llama_index().chat([ChatMessage(role="user", content=ASKED)]).message.content)


@call
def llama_index_stream() -> Any:
    return "".join(str(part.delta) for part in _llama_index().stream_complete(ASKED))


@call
def litellm_completion() -> Any:
    import litellm

    return (
        litellm.completion(model=f"openai/{MODEL}", messages=SAID, max_tokens=LIMIT, num_retries=0).choices[0].message.content
    )


@call
def litellm_stream() -> Any:
    import litellm

    parts = litellm.completion(model=f"openai/{MODEL}", messages=SAID, max_tokens=LIMIT, num_retries=0, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts)


@call
def litellm_anthropic() -> Any:
    import litellm

    base = BASE.removesuffix("/v1")
    asked = {"model": f"anthropic/{MODEL}", "messages": SAID, "max_tokens": LIMIT, "api_base": base, "api_key": "x"}
    return litellm.completion(**asked).choices[0].message.content


@call
def instructor_tools() -> Any:
    import instructor

    asked = {"model": MODEL, "messages": SAID, "max_tokens": LIMIT, "max_retries": 0}
    return str(instructor.from_openai(_openai()).chat.completions.create(response_model=_form(), **asked))


@call
def instructor_schema() -> Any:
    import instructor

    client = instructor.from_openai(_openai(), mode=instructor.Mode.JSON_SCHEMA)
    return str(
        client.chat.completions.create(response_model=_form(), model=MODEL, messages=SAID, max_tokens=LIMIT, max_retries=0)
    )


@call
def dspy_lm() -> Any:
    import dspy

    return dspy.LM(f"openai/{MODEL}", api_base=BASE, api_key="x", max_tokens=LIMIT, cache=False, num_retries=0)(messages=SAID)[
        0
    ]


@call
def llm_prompt() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        entry = f"- model_id: here\n  model_name: {MODEL}\n  api_base: {BASE}\n  api_key_name: openai\n"
        Path(folder, "extra-openai-models.yaml").write_text(entry)
        asked = [str(Path(sys.executable).with_name("llm")), "-m", "here", "--key", "x", "-o", "max_tokens", str(LIMIT), ASKED]
        env = os.environ | {"LLM_USER_PATH": folder}
        return subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.strip()


@call
def guidance_gen() -> Any:
    from guidance import assistant, gen, models, user

    model = models.OpenAI(MODEL, api_key="x", base_url=BASE, echo=False)
    with user():
        model += ASKED
    with assistant():
        model += gen("said", max_tokens=LIMIT)
    return model["said"]


if __name__ == "__main__":
    os.environ |= KEYS
    for function in [c for c in CALLS if c.__name__.startswith(tuple(sys.argv[3:] or [""]))]:
        wrong = ""
        try:
            wrong = "" if function() else "nothing came"
        except Exception as error:  # whatever a client makes of it
            wrong = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({"name": function.__name__, "wrong": wrong}), flush=True)
