"""OpenAI's ``/v1/responses``, read into a chat request of `openai_api` and written from its answer. Nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rsim.serving.openai_api import BadRequest
from rsim.serving.wire import Body, Wire, dicts, event, object_in

_OWN = {
    "input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "reasoning", "include", "store", "metadata",
    "truncation", "prompt", "top_logprobs", "prompt_cache_key", "safety_identifier", "service_tier", "parallel_tool_calls",
    "max_tool_calls", "context_management",
}  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text", "reasoning_text")
_NAMES = {"text": "output_text", "reasoning": "reasoning_text", "tool": "function_call_arguments"}  # of events


def _read(body: Body) -> Body:
    chat = {key: value for key, value in body.items() if key not in _OWN} | {"stream_options": {"include_usage": True}}
    given = body.get("input")
    if given is None and body.get("prompt"):  # a stored one, which may say it all
        given = ""
    said = [{"role": "user", "content": given}] if isinstance(given, str) else [_message(item) for item in dicts(body, "input")]
    system = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    chat |= {"messages": system + [m for m in said if m], "max_tokens": body.get("max_output_tokens")}
    if not isinstance(body.get("include") or [], list):
        raise BadRequest("include must be a list", "include")
    # What neither planning nor a model in this process can do.
    chat["beyond"] = body.get("prompt") or body.get("top_logprobs") or _LOGPROBS in (body.get("include") or [])
    form = object_in(object_in(body, "text"), "format")
    if form.get("type") == "json_schema":
        chat["response_format"] = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
    elif form:
        chat["response_format"] = form
    if body.get("tools"):
        chat["tools"] = [
            {"type": t.get("type"), "function": {k: v for k, v in t.items() if k != "type"}} for t in dicts(body, "tools")
        ]
        choice = body.get("tool_choice")
        named = {"type": "function", "function": choice}
        chat["tool_choice"] = named if isinstance(choice, dict) else choice
    if body.get("rsim") is not False:
        chat["rsim"] = {"reasoning_effort": object_in(body, "reasoning").get("effort")} | object_in(body, "rsim")
    return chat


def _message(item: Body) -> Body | None:
    """An item of the input as a chat's message; None for earlier thinking, which is not sent back."""
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        return {"role": item.get("role"), "content": [_part(p) for p in content] if isinstance(content, list) else content}
    if kind == "function_call":
        call = {"id": item.get("call_id"), "type": "function", "function": {k: item.get(k) for k in ("name", "arguments")}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "reasoning":
        return None
    raise BadRequest(f"input of type {kind!r} cannot be read here", "input")


def _part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in _TEXTS:
        return {"type": "text", "text": part.get("text")}
    if isinstance(part, dict) and part.get("type") == "input_image":
        return {"type": "image_url", "image_url": {"url": part.get("image_url")}}
    return part


class _Response:
    """A response as it grows: its events, and what they add up to."""

    def __init__(self, asked: Body) -> None:
        self.number, self.open = 0, ""  # kind of the last item
        self.whole: Body = {
            "id": "", "object": "response", "created_at": 0, "status": "in_progress", "error": None, "incomplete_details": None,
            "instructions": asked.get("instructions"), "metadata": asked.get("metadata") or {}, "model": asked.get("model"),
            "output": [], "parallel_tool_calls": True, "temperature": asked.get("temperature"), "top_p": asked.get("top_p"),
            "tool_choice": asked.get("tool_choice") or "auto", "tools": asked.get("tools") or [], "usage": None,
            "max_output_tokens": asked.get("max_output_tokens"), "text": asked.get("text") or {"format": {"type": "text"}},
        }  # fmt: skip

    def event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return event(f"response.{kind}", sequence_number=self.number - 1, **fields)

    def start(self, chunk: Body) -> Iterator[bytes]:
        self.whole |= {"id": f"resp_{chunk['id'].rpartition('-')[2]}", "created_at": chunk["created"]}
        yield self.event("created", response=self.whole)
        yield self.event("in_progress", response=self.whole)

    def add(self, kind: str, text: str, call: Body) -> Iterator[bytes]:
        output = self.whole["output"]
        if kind != self.open or call.get("id"):
            yield from self.stop()
            self.open = kind
            output.append(self._item(kind, call))
            yield self.event("output_item.added", output_index=len(output) - 1, item=output[-1])
            if kind != "tool":
                part = {"type": _NAMES[kind], "text": "", "annotations": [], "logprobs": []}
                output[-1]["content"] = [part]
                yield self.event("content_part.added", **self._at(), part=part)
        item = output[-1]
        if kind == "tool":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text
        yield self.event(f"{_NAMES[kind]}.delta", **self._at(), delta=text, logprobs=[])

    def _item(self, kind: str, call: Body) -> Body:
        unique = f"{self.whole['id'].removeprefix('resp_')}{len(self.whole['output'])}"
        if kind == "tool":
            named = call.get("function", {}).get("name")
            return {"type": "function_call", "id": f"fc_{unique}", "call_id": call.get("id"), "name": named, "arguments": "",
                    "status": "in_progress"}  # fmt: skip
        if kind == "reasoning":
            return {"type": "reasoning", "id": f"rs_{unique}", "summary": [], "content": [], "status": "in_progress"}
        return {"type": "message", "id": f"msg_{unique}", "role": "assistant", "status": "in_progress", "content": []}

    def _at(self) -> Body:
        output = self.whole["output"]
        return {"output_index": len(output) - 1, "item_id": output[-1]["id"]} | (
            {} if self.open == "tool" else {"content_index": 0}
        )

    def stop(self) -> Iterator[bytes]:
        if self.open:
            item = self.whole["output"][-1]
            item["status"] = "incomplete" if self.whole["incomplete_details"] else "completed"
            if self.open == "tool":
                yield self.event("function_call_arguments.done", **self._at(), name=item["name"], arguments=item["arguments"])
            else:
                part = item["content"][0]
                yield self.event(f"{_NAMES[self.open]}.done", **self._at(), text=part["text"], logprobs=[])
                yield self.event("content_part.done", **self._at(), part=part)
            yield self.event("output_item.done", output_index=len(self.whole["output"]) - 1, item=item)
            self.open = ""

    def end(self, choice: Body, usage: Body | None) -> Iterator[bytes]:
        if choice.get("finish_reason"):
            why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(choice["finish_reason"])
            self.whole["status"] = "incomplete" if why else "completed"
            self.whole["incomplete_details"] = {"reason": why} if why else None
        if usage:
            yield from self.stop()
            self.whole["usage"] = {
                "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"], "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            }  # fmt: skip
            yield self.event(self.whole["status"], response=self.whole)

    def failed(self, status: int, error: Body) -> Iterator[bytes]:
        told = {key: error.get(key) for key in ("message", "code", "param")}
        yield event("error", sequence_number=self.number, **told)


RESPONSES = Wire("chat", _read, _Response)
