"""OpenAI's request and response shapes, as far as planned answers need them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rsim.rules import PlayRules
from rsim.serving.play import Asked, Called, Event, Finished, Injected, TextDelta, Usage, next_seed

Kind = Literal["chat", "completion"]
_CHOICES = 1024  # of one request
_HOTTEST = 1000  # temperature
_TOP = 20  # log-probs beside a token's own
_LIMITS = ("max_tokens", "max_completion_tokens")

# Requests with any of these pass through as they are.
_NOT_PLANNED = (
    "tools", "functions", "echo", "response_format", "best_of", "suffix", "previous_response_id", "conversation", "background",
    "audio", "beyond",
)  # fmt: skip
_PLAIN = {"response_format": {"type": "text"}, "best_of": 1}  # values of these that ask for nothing
# The part of the steps that the rules allow; "none" is a gate of 1.
_EFFORTS = {"minimal": 0, "low": 0.25, "medium": 0.5, "high": 1, "xhigh": 1, "max": 1}
# What planning itself decides or obeys; all other fields are passed on to the upstream as they are.
_READ = {"model", "messages", "prompt", "stream", "stream_options", "n", "stop", "rsim", *_LIMITS}
_READ |= {"continue_final_message", "add_generation_prompt", "logprobs", "top_logprobs", "tool_choice", *_NOT_PLANNED}


class BadRequest(Exception):
    """What a client can put right: answered with status 400 and an OpenAI error object."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass
class Request:
    """One request for planned answers: ``asked`` has an entry for each choice."""

    kind: Kind
    model: str  # as the client named it
    asked: list[Asked]
    limit: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    rules: PlayRules
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"


def passes_through(body: dict[str, Any], *, local: bool = False) -> bool:
    """Whether the request asks for something that planning has no part in. ``local``: of a model in this process, which has
    tools, formats and log-probs; before an upstream a format is planned where ``rsim.structured`` says so."""
    messages = body.get("messages")
    tools = isinstance(messages, list) and any(isinstance(m, dict) and m.get("role") in ("tool", "function") for m in messages)
    logprobs = body.get("logprobs") is not None and body["logprobs"] is not False  # 0 asks for the sampled tokens' own
    structured = isinstance(body.get("rsim"), dict) and body["rsim"].get("structured") is True
    done = ("tools", "response_format") if local else ("response_format",) if structured else ()
    asked = any(body.get(key) and body[key] != _PLAIN.get(key) for key in _NOT_PLANNED if key not in done)
    return asked or (not local and (tools or logprobs))


def read_request(kind: Kind, body: dict[str, Any], model: str, rules: PlayRules, default_limit: int) -> Request:
    """Checks what planning depends on; the rest is the upstream's to judge.

    Args:
        model: the upstream's name of it.
        rules: the server's; `asked_rules` narrows them.

    Raises:
        BadRequest: a field of the wrong form.
    """
    sampling = {key: value for key, value in body.items() if key not in _READ and value is not None}
    temperature = sampling.get("temperature", 0)
    if type(temperature) not in (int, float) or not 0 <= temperature <= _HOTTEST:
        raise BadRequest(f"temperature must be a number from 0 to {_HOTTEST}", "temperature")
    if type(sampling.get("seed", 0)) is not int:
        raise BadRequest("seed must be a whole number", "seed")
    if not isinstance(body.get("stream") or False, bool):
        raise BadRequest("stream must be true or false", "stream")
    body = body | {key: None for key in _LIMITS if body.get(key) == -1}  # as llama.cpp's clients say that there is none
    limits = {key: _whole(body, key, 0, 1) for key in _LIMITS if body.get(key) is not None}
    field = "max_completion_tokens" if "max_completion_tokens" in limits else "max_tokens"
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest("stop must be a text or a list of texts", "stop")
    final = {"limit_field": field, **_final_step(kind, body)}
    if kind == "chat":
        messages, continues = _messages(body), bool(body.get("continue_final_message"))  # vLLM's field
        if continues and messages[-1]["role"] != "assistant":
            raise BadRequest("continue_final_message needs a last message by the assistant", "continue_final_message")
        contexts = [Asked(model, messages, None, continues=continues, **final)]
    else:
        texts = [("", p) if isinstance(p, list) else (p, None) for p in _prompts(body)]
        contexts = [Asked(model, None, text, prompt_ids=ids, **final) for text, ids in texts]
    count = _whole(body, "n", 1, 1)
    if count * len(contexts) > _CHOICES:
        raise BadRequest(f"{count * len(contexts)} answers are asked for: {_CHOICES} at most", "n")
    asked = [replace(context, sampling=_seeded(sampling, i)) for context in contexts for i in range(count)]
    options = body.get("stream_options")
    return Request(
        kind,
        str(body.get("model", model)),
        asked,
        limits.get(field, default_limit),
        tuple(stops),
        stream=bool(body.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        rules=asked_rules(body, rules),
    )


def _final_step(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the answer itself, as `Asked` has it: a format, tools, log-probs."""
    form, tools, choice, logprobs = (body.get(key) for key in ("response_format", "tools", "tool_choice", "logprobs"))
    if form is not None and (not isinstance(form, dict) or not isinstance(form.get("type"), str)):
        raise BadRequest("response_format must be an object with a type", "response_format")
    if tools and not _are_functions(tools, "name"):
        raise BadRequest("tools must be a list of functions with a name", "tools")
    field = "top_logprobs" if kind == "chat" else "logprobs"
    asked = bool(logprobs) if kind == "chat" else logprobs is not None
    top = _whole(body, field, 0, 0) if asked else None
    if top is not None and top > _TOP:
        raise BadRequest(f"{_TOP} log-probs at most", field)
    form = form if form and form["type"] != "text" else None
    return {"form": form, "tools": tools if tools and choice != "none" else [], "tool_choice": choice, "logprobs": top}


def _are_functions(given: Any, *texts: str) -> bool:
    """Whether it is a list of tools, or of calls: each one's function has these ``texts``."""
    functions = [one.get("function") if isinstance(one, dict) else None for one in given] if isinstance(given, list) else [None]
    return all(isinstance(f, dict) and all(isinstance(f.get(text), str) for text in texts) for f in functions)


def asked_rules(body: dict[str, Any], rules: PlayRules) -> PlayRules:
    """The rules of one request: ``gate`` and ``max_steps`` in its field ``rsim`` or, without them, its ``reasoning_effort`` or
    ``thinking``. An answer has no more steps than the rules allow."""
    given = {key: body.get(key) for key in ("reasoning_effort", "thinking")}
    given |= body["rsim"] if isinstance(body.get("rsim"), dict) else {}
    effort, thinking, gate = given["reasoning_effort"], given["thinking"], given.get("gate")
    steps = rules.max_steps
    if isinstance(effort, str) and effort in _EFFORTS:
        steps = max(1, int(steps * _EFFORTS[effort]))
    if isinstance(thinking, dict) and isinstance(thinking.get("budget_tokens"), int):
        steps = min(steps, max(1, thinking["budget_tokens"] // rules.step_tokens))
    if gate is None and (effort == "none" or (isinstance(thinking, dict) and thinking.get("type") == "disabled")):
        gate = 1.0
    if gate is not None and (not isinstance(gate, int | float) or not 0 <= gate <= 1):
        raise BadRequest("rsim.gate must be a number from 0 to 1", "rsim")
    steps = min(_whole(given, "max_steps", steps, 1), rules.max_steps)
    return replace(rules, max_steps=steps, gate=rules.gate if gate is None else float(gate))


def _seeded(sampling: dict[str, Any], member: int) -> dict[str, Any]:
    """The choices of one request must not be the same sample."""
    return sampling | {"seed": next_seed(int(sampling["seed"]), member)} if "seed" in sampling else dict(sampling)


def _whole(body: dict[str, Any], key: str, default: int, low: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise BadRequest(f"{key} must be a whole number from {low}", key)
    return value


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """A chat's messages; whether a model can read their parts (images, ...) is its own to say."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("messages must be a list of messages with a role", "messages")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise BadRequest(f"messages[{number}].role must be a text", "messages")
        parts = [{"text": content}] if isinstance(content, str) else content
        if not _are_functions(message.get("tool_calls") or [], "name", "arguments"):
            raise BadRequest(f"messages[{number}].tool_calls must be calls of functions, their arguments a text", "messages")
        if content is None and role == "assistant":  # it called a tool
            continue
        if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text", ""), str) for p in parts):
            raise BadRequest(f"messages[{number}].content must be a text or a list of parts", "messages")
    return messages


def _prompts(body: dict[str, Any]) -> list[Any]:
    """The prompts of a request, each a text or a list of token ids."""
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _are_ids(p) for p in prompts):
        raise BadRequest("prompt must be a text, a list of token ids, or a list of either", "prompt")
    return prompts


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)


@dataclass
class Choice:
    """One answer as it grows."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    steps: list[dict[str, Any]] = field(default_factory=list)
    finished: Finished | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of their tokens in the content
    at: float = field(default_factory=time.perf_counter)  # when the last step ended

    def add(self, event: Event) -> None:
        if self.steps and isinstance(event, Injected | Finished):
            self.at, began = time.perf_counter(), self.at
            self.steps[-1]["seconds"] = round(self.at - began, 4)
        for entry in event.logprobs if isinstance(event, TextDelta) else []:  # its text may come later, see `Stops`
            upto = self.offsets[-1] + len(self.logprobs[-1]["token"]) if self.offsets else 0
            self.offsets.append(max(upto, len(self.message["content"])))
            self.logprobs.append(entry)
        if isinstance(event, Called):
            function = {"name": event.name, "arguments": event.arguments}
            self.calls.append({"index": len(self.calls), "id": event.id, "type": "function", "function": function})
        elif isinstance(event, Finished):
            self.finished = event
        elif event.place:
            self.message[event.place] = self.message.get(event.place, "") + event.text
        if isinstance(event, Injected):
            self.steps.append(_step(event) | {"text": ""})
        elif isinstance(event, TextDelta):
            if self.steps:
                self.steps[-1]["text"] += event.text if event.sampled else ""
            if event.output:
                self.steps[-1]["output"] = event.text

    def end(self) -> dict[str, Any]:
        """Why it ended and, as vLLM tells it, at which of the client's stop strings."""
        if self.finished is None:
            return {"finish_reason": None}
        return {"finish_reason": self.finished.reason, "stop_reason": self.finished.stop}


def _logprobs(kind: Kind, said: Choice, begin: int = 0) -> dict[str, Any] | None:
    """The log-probs of what was sampled, from the token ``begin`` on; what was injected has none."""
    shown = said.logprobs[begin:]
    if kind == "chat" or not shown:
        return {"content": shown, "refusal": None} if shown else None
    return {
        "tokens": [entry["token"] for entry in shown],
        "token_logprobs": [entry["logprob"] for entry in shown],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in shown],
        "text_offset": said.offsets[begin:],
    }


def _step(event: Injected) -> dict[str, Any]:
    return {"strategy": event.strategy, "prompt": event.text, "probabilities": event.probabilities, "forced": event.forced}


def whole(request: Request, choices: list[Choice], mode: str | None) -> dict[str, Any]:
    """The response to a request without streaming."""
    shown = []
    for index, choice in enumerate(choices):
        message = choice.message
        if choice.calls:
            message = message | {"content": message["content"] or None, "tool_calls": choice.calls}
        said = {"message": message} if request.kind == "chat" else {"text": message["content"]}
        shown.append({"index": index, **said, "logprobs": _logprobs(request.kind, choice), **choice.end()})
    kind = "chat.completion" if request.kind == "chat" else "text_completion"
    response = _envelope(request, kind) | {"choices": shown, "usage": usage_of(choices)}
    if mode is not None:
        response["rsim"] = {"mode": mode, "approximate": mode != "exact", "choices": [{"steps": c.steps} for c in choices]}
    return response


def usage_of(choices: Iterable[Choice]) -> dict[str, Any]:
    total = Usage()
    for choice in choices:
        if choice.finished:
            total.add(choice.finished.usage)
    usage: dict[str, Any] = {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": total.reasoning_tokens},
    }
    return usage | ({"estimated": True} if total.estimated else {})


def chunk(request: Request, index: int, event: Event, said: Choice, *, first: bool) -> dict[str, Any]:
    """The last event of what one choice has ``said`` as a stream's chunk. What was injected carries a field ``rsim`` that says
    so, the last chunk one that says how long each step took."""
    text, place = ("", "") if isinstance(event, Called | Finished) else (event.text, event.place)
    if request.kind == "chat":
        delta: dict[str, Any] = ({"role": "assistant"} if first else {}) | ({place: text} if place else {})
        if isinstance(event, Called):
            delta["tool_calls"] = said.calls[-1:]
        shown: dict[str, Any] = {"delta": delta}
    else:
        shown = {"text": text if place == "content" else ""}
    begin = len(said.logprobs) - (len(event.logprobs) if isinstance(event, TextDelta) else 0)
    logprobs = _logprobs(request.kind, said, begin)
    made = _chunk_envelope(request) | {"choices": [{"index": index, **shown, "logprobs": logprobs, **said.end()}]}
    if isinstance(event, Injected):
        made["rsim"] = {"injected": True} | _step(event)
    elif isinstance(event, TextDelta) and event.output:
        made["rsim"] = {"injected": True, "output": event.text}
    elif isinstance(event, Finished) and said.steps:
        made["rsim"] = {"seconds": [step["seconds"] for step in said.steps]}
    return made


def usage_chunk(request: Request, choices: Iterable[Choice]) -> dict[str, Any]:
    return _chunk_envelope(request) | {"choices": [], "usage": usage_of(choices)}


def _chunk_envelope(request: Request) -> dict[str, Any]:
    return _envelope(request, "chat.completion.chunk" if request.kind == "chat" else "text_completion")


def _envelope(request: Request, kind: str) -> dict[str, Any]:
    return {"id": request.id, "object": kind, "created": request.created, "model": request.model}


class Stops:
    """Finds the client's stop strings in sampled text, across pieces; the beginning of one is held back until it is decided.
    Steps that are told as thinking have none."""

    def __init__(self, stops: tuple[str, ...], *, ends_there: bool = False) -> None:
        """``ends_there``: the source ends by itself at a stop string, and says what was spent."""
        self.stops, self.held, self.ends_there = stops, "", ends_there

    def feed(self, text: str) -> tuple[str, str | None]:
        """What can be shown now, and the stop string that was met (it is not shown)."""
        text, self.held = self.held + text, ""
        found = [(at, s) for at, s in ((text.find(s), s) for s in self.stops) if at >= 0]
        if found:
            at, stop = min(found)
            return text[:at], stop
        longest = max((len(s) for s in self.stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self.stops):
                self.held = text[-length:]
                return text[:-length], None
        return text, None

    async def _met(self, stop: str, events: AsyncGenerator[Event], spent: Usage) -> Finished:
        if self.ends_there:
            async for event in events:
                if isinstance(event, Finished):
                    return replace(event, reason="stop", stop=stop)
        await events.aclose()  # the step that is cut short is counted
        return Finished("stop", spent, stop=stop)

    async def cut(self, events: AsyncGenerator[Event], spent: Usage) -> AsyncGenerator[Event]:
        """The events up to the first stop string in sampled text; `play` counts up what is ``spent``."""
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TextDelta) and not event.output and event.place == "content":
                    held = len(self.held)
                    text, met = self.feed(event.text)
                    if not event.sampled and text[:held]:  # a delimiter of ours, behind what was sampled
                        yield TextDelta(text[:held])
                        text = text[held:]
                    if text or event.logprobs:
                        yield replace(event, text=text)
                    if met is not None:
                        yield await self._met(met, events, spent)
                        return
                    continue
                if self.held:
                    yield TextDelta(self.held)
                    self.held = ""
                yield event
