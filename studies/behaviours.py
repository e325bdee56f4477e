"""What upstreams do, one behaviour after the other, through the plug-in: planned, as a stream and whole.

Each behaviour is a response, or a function of the request; what is right was written down beside it: the text that must come
through and the reason of the end, or the status and the words of the error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.streams import Wire, behind_the_server

ISSUE = 14
_BODY = {"model": f"m{SUFFIX}", "messages": [{"role": "user", "content": "2+2?"}], "temperature": 0}
_DONE = "data: [DONE]\n\n"
_ERROR = {"message": "the engine died", "type": "server_error", "code": 500}
_LATE = {"error": {"message": "Rate limit", "type": "rate_limit"}}


def _delta(delta: Any, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} | more


def _said(text: str, **more: Any) -> dict[str, Any]:
    return _delta({"content": text}, **more)


def _end(reason: str = "stop", **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": reason} | more]}


def _counted(sampled: int = 4, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": sampled, "total_tokens": 9 + sampled} | more}


def _events(*parts: Any, end: str = "\n\n", done: str = _DONE) -> bytes:
    """``parts``: chunks, or lines as they are."""
    lines = [p if isinstance(p, str) else f"data: {json.dumps(p, ensure_ascii=False)}{end}" for p in parts]
    return ("".join(lines) + done).encode("utf-8", "surrogatepass")


def _json(status: int, body: Any, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(status, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def _once(first: Callable[[httpx.Request], httpx.Response]) -> Callable[[httpx.Request], httpx.Response]:
    """Every second call is answered."""
    calls: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return first(request) if len(calls) % 2 else httpx.Response(200, content=_events(*_PLAIN))

    return answer


def _parted(size: int, raw: bytes, breaks: bool = False) -> Callable[[httpx.Request], httpx.Response]:
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    return lambda request: httpx.Response(200, stream=Wire(parts, breaks))


def _newer(request: httpx.Request) -> httpx.Response:
    """As OpenAI's models that think: fields that others know are refused."""
    for field in ("max_tokens", "stop"):
        if field in json.loads(request.content):
            told = f"Unsupported parameter: '{field}' is not supported with this model. Use 'max_completion_tokens' instead."
            return httpx.Response(400, json={"error": {"message": told, "code": "unsupported_parameter"}})
    return httpx.Response(200, content=_events(*_PLAIN))


def _long(request: httpx.Request) -> httpx.Response:
    """It thinks for 700 tokens, and is cut if it may not."""
    body = json.loads(request.content)
    room = body.get("max_tokens") or 10**6
    thinking = [_delta({"reasoning_content": "hm "})] * min(room, 700)
    rest = [*_PLAIN[:-1]] if room > 700 else [_end("length")]
    return httpx.Response(200, content=_events(*thinking, *rest, _counted(min(room, 704))))


def _refused(cause: type[httpx.RequestError]) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise cause("[Errno 111] Connection refused", request=request)

    return answer


def _message(**message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": _counted()["usage"]}


FOUR = "It is \\boxed{4}."
_PLAIN = [_said("It is "), _said("\\boxed{4}."), _end(), _counted()]
_THINKS = [_delta({"reasoning_content": word}) for word in ("First", "\n\n", "Then")]
_TOLD = f"Größe 日本語 🙂\u2028\u0085 {FOUR}"
Right = tuple[str, str] | tuple[int, str]  # text and reason, or status and words of the error

# As in the table of an earlier test of ours (`plain` to `slow`), then more.
BEHAVIOURS: dict[str, tuple[Any, Right]] = {
    "plain": (_events(*_PLAIN), (FOUR, "stop")),
    "thinking in reasoning_content": (_events(*_THINKS, *_PLAIN), (FOUR, "stop")),
    "thinking in reasoning": (_events(_delta({"reasoning": "First\n\nthen"}), *_PLAIN), (FOUR, "stop")),
    "thinking that takes a call's room": (_long, (FOUR, "stop")),
    "thinking between tags": (_events(_said("<think>\nFirst.\n\nThen.</think>\n\n"), *_PLAIN), (FOUR, "stop")),
    "content null": (_events(_delta({"role": "assistant", "content": None}), *_PLAIN), (FOUR, "stop")),
    "choices empty": (_events({"choices": [], "prompt_filter_results": []}, *_PLAIN), (FOUR, "stop")),
    "choices null": (_events({"choices": None, "usage": None}, *_PLAIN), (FOUR, "stop")),
    "usage null in each chunk": (_events(*(c | {"usage": None} for c in _PLAIN[:-1]), _counted()), (FOUR, "stop")),
    "usage with null fields": (_events(*_PLAIN[:-1], _counted() | {"usage": {"prompt_tokens": None}}), (FOUR, "stop")),
    "no usage": (_events(*_PLAIN[:-1]), (FOUR, "stop")),
    "comments": (_events(": keep-alive\n\n", ": OPENROUTER PROCESSING\n\n", *_PLAIN), (FOUR, "stop")),
    "lines that end in CR LF": (_events(*_PLAIN, end="\r\n\r\n"), (FOUR, "stop")),
    "lines with the event's name": (_events("event: message\nid: 1\n", *_PLAIN), (FOUR, "stop")),
    "the role first": (_events(_delta({"role": "assistant"}), *_PLAIN), (FOUR, "stop")),
    "cut by its limit": (_events(_said("It is"), _end("length"), _counted()), ("It is", "length")),
    "an error in the stream": (_events(_said("It"), {"error": _ERROR}, done=""), (500, "the engine died")),
    "an error that is a text": (_events(_said("It"), {"error": "the engine died"}, done=""), (502, "the engine died")),
    "an error with status 200": (_json(200, {"error": {"message": "Provider error", "code": 502}}), (502, "Provider error")),
    "JSON instead of a stream": (_json(200, _message(content=FOUR)), (FOUR, "stop")),
    "characters in parts of a byte": (_parted(1, _events(_said(_TOLD), _end())), (_TOLD, "stop")),
    "U+2028": (_events(_said("a\u2028b"), _end()), ("a\u2028b", "stop")),
    "U+0085": (_events(_said("a\u0085b"), _end()), ("a\u0085b", "stop")),
    "halves of a character": (
        _events(*(f'data: {{"choices":[{{"delta":{{"content":"{half}"}}}}]}}\n\n' for half in ("\\ud83d", "\\ude42")), _end()),
        ("🙂", "stop")),
    "429": (_json(429, _LATE, retry_after="60"), (429, "Rate limit")),
    "429, then an answer": (_once(_json(429, _LATE, retry_after="0")), (FOUR, "stop")),
    "503": (_json(503, {"error": {"message": "Loading model", "code": 503}}), (503, "Loading model")),
    "max_completion_tokens alone": (_newer, (FOUR, "stop")),
    "the connection breaks": (_parted(40, _events(_said("It"), done=""), breaks=True), (502, "the upstream broke")),
    "502 in HTML": (lambda r: httpx.Response(502, text="<html>Bad Gateway</html>"), (502, "Bad Gateway")),
    "no [DONE]": (_events(*_PLAIN, done=""), (FOUR, "stop")),
    "stop_reason": (_events(*_PLAIN[:2], _end(stop_reason=None), _counted()), (FOUR, "stop")),
    # --- more ---
    "no finish_reason": (_events(_said("It is")), (502, "broke off")),
    "an empty body": (b"", (502, "broke off")),
    "a page of HTML with status 200": (b"<html>sign in</html>", (502, "sign in")),
    "not a word": (_events(_end(), _counted(40)), (502, "without a word")),
    "finish_reason STOP": (_events(*_PLAIN[:2], _end("STOP")), (FOUR, "stop")),
    "finish_reason end_turn": (_events(*_PLAIN[:2], _end("end_turn")), (FOUR, "stop")),
    "finish_reason eos_token": (_events(*_PLAIN[:2], _end("eos_token")), (FOUR, "stop")),
    "finish_reason MAX_TOKENS": (_events(_said("It is"), _end("MAX_TOKENS")), ("It is", "length")),
    "finish_reason content_filter": (_events(_said("It is"), _end("content_filter")), ("It is", "content_filter")),
    "finish_reason error": (_events(_said("It is"), _end("error")), (502, "ended its answer with 'error'")),
    "content in parts": (_events(_delta({"content": [{"type": "text", "text": FOUR}]}), _end()), (FOUR, "stop")),
    "a part that thinks": (
        _events(_delta({"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": FOUR}]}), _end()),
        (FOUR, "stop")),
    "a part that is an image": (_events(_delta({"content": [{"type": "image_url"}]}), _end()), (502, "which is no text")),
    "a refusal": (_events(_delta({"refusal": "I cannot."}), _end()), ("I cannot.", "stop")),
    "several answers": (_events({"choices": [{"index": 1, "delta": {"content": "x"}}]}, _end()), (502, "several answers")),
    "a byte order mark": (b"\xef\xbb\xbf" + _events(*_PLAIN), (FOUR, "stop")),
    "no UTF-8": (b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n', (502, "no UTF-8")),
    "data without JSON": (_events("data: {broken\n\n"), (502, "no JSON")),
    "an object that is none of these": (_events(_said("It"), {"detail": "worker died"}), (502, "worker died")),
    "vLLM's old errors": (_json(400, {"object": "error", "message": "too long", "code": 400}), (400, "too long")),
    "FastAPI's errors": (_json(422, {"detail": [{"msg": "field required"}]}), (422, "field required")),
    "a wrong key": (_json(401, {"error": {"message": "Incorrect API key"}}), (401, "$RSIM_UPSTREAM_API_KEY is not set")),
    "a redirect": (lambda r: httpx.Response(307, headers={"Location": "https://elsewhere/v1"}), (502, "elsewhere")),
    "no connection": (_refused(httpx.ConnectError), (502, "Connection refused")),
    "no connection in time": (_refused(httpx.ConnectTimeout), (504, "in time")),
    "parts of seven bytes, events in one line each": (_parted(7, _events(*_PLAIN)), (FOUR, "stop")),
    "data without a blank": (_events(*_PLAIN).replace(b"data: ", b"data:"), (FOUR, "stop")),
}  # fmt: skip


def run(only: str = "") -> Iterator[Row]:
    """``only``: the beginning of some behaviours' names."""
    names = [name for name in BEHAVIOURS if name.startswith(only)]
    right = 0
    for name in names:
        found = asyncio.run(wrong(*BEHAVIOURS[name]))
        right += not found
        if found:
            print(f"  {name}: {found}")
    what = "behaviours of upstreams, as a stream and whole: right"
    yield Row(what, right, goal=f"all {len(names)}", met=right == len(names))


async def wrong(behaviour: Any, right: Right) -> str:
    """What a client is told that is not right, whole or as a stream; "" for nothing."""
    answer = behaviour if callable(behaviour) else lambda request: httpx.Response(200, content=behaviour)
    planner = sequence_planner(load_strategies("default"), ["termination"])
    for stream in (False, True):
        async with behind_the_server(answer, planner, rules=PlayRules(paraphrase="first")) as client:
            reply = await client.post("chat/completions", json=_BODY | {"stream": stream})
        told = _told(reply) if stream and reply.status_code == 200 else _whole(reply)
        # A stream that has begun has status 200, and ends with the error.
        begun = stream and reply.status_code == 200 and told[0] == 200
        if isinstance(right[0], str):
            met = right[0] in str(told[0]) and told[1] == right[1]
        else:
            met = told[0] in (right[0], 200 if begun else right[0]) and right[1] in told[1]
        if not met:
            return f"{'stream' if stream else 'whole'}: {told}, not {right}"
    return ""


def _whole(reply: httpx.Response) -> tuple[Any, str]:
    body = reply.json()
    if "error" in body:
        return reply.status_code, str(body["error"]["message"])
    return body["choices"][0]["message"]["content"], str(body["choices"][0]["finish_reason"])


def _told(reply: httpx.Response) -> tuple[Any, str]:
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
    if "error" in chunks[-1]:
        return 200, str(chunks[-1]["error"]["message"])
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices), str(choices[-1]["finish_reason"])
