"""Anthropic's ``/v1/messages``, read into a chat request of `openai_api` and written from what answers that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rsim.serving.wire import Body, Wire, dicts, event, object_in

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
           413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}  # fmt: skip
_STARTS: dict[str, Body] = {
    "text": {"type": "text", "text": ""},
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "tool": ("input_json_delta", "partial_json"),
}
_OWN = {"system", "messages", "stop_sequences", "tools", "tool_choice", "thinking", "output_config", "metadata", "service_tier",
        "cache_control", "context_management"}  # fmt: skip


def _read(body: Body) -> Body:
    chat = {key: value for key, value in body.items() if key not in _OWN} | {"stream_options": {"include_usage": True}}
    system = [{"role": "system", "content": _parts(body["system"])}] if body.get("system") else []
    said = [m for message in dicts(body, "messages") for m in _messages(message)]
    chat |= {"messages": system + said, "stop": body.get("stop_sequences")}
    last = said[-1] if said else {}
    if last.get("role") == "assistant" and last.get("content") and not last.get("tool_calls"):
        chat["continue_final_message"] = True  # it is the beginning of the answer
    if body.get("tools"):
        chat["tools"] = [{"type": "function", "function": _function(tool)} for tool in dicts(body, "tools")]
        choice = object_in(body, "tool_choice")
        named = {"type": "function", "function": {"name": choice.get("name")}}
        chat["tool_choice"] = _CHOICES.get(str(choice.get("type", "auto")), named)
    output = object_in(body, "output_config")
    if output.get("format"):
        schema = {"name": "answer", "schema": object_in(output, "format").get("schema")}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.get("rsim") is not False:
        effort = {"thinking": body.get("thinking"), "reasoning_effort": output.get("effort")}
        chat["rsim"] = effort | object_in(body, "rsim")
    return chat


def _function(tool: Body) -> Body:
    described = {"description": tool["description"]} if tool.get("description") else {}
    return {"name": tool.get("name"), **described, "parameters": tool.get("input_schema") or {"type": "object"}}


def _messages(message: Body) -> Iterator[Body]:
    """A message as those of a chat: the results of tools are messages of their own."""
    content = message.get("content")
    if not isinstance(content, list):
        yield message
        return
    blocks = dicts(message, "content")
    for block in blocks:
        if block.get("type") == "tool_result":
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _parts(block.get("content") or "")}
    used = [block for block in blocks if block.get("type") == "tool_use"]
    functions = [{"name": block.get("name"), "arguments": json.dumps(block.get("input"))} for block in used]
    calls = [{"id": b.get("id"), "type": "function", "function": f} for b, f in zip(used, functions, strict=True)]
    said = [b for b in blocks if b.get("type") not in ("tool_result", "tool_use", "thinking", "redacted_thinking")]
    if said or calls or not blocks:
        yield {"role": message.get("role"), "content": _parts(said) if said else None} | (
            {"tool_calls": calls} if calls else {}
        )


def _parts(content: Any) -> Any:
    """Text and images as a chat's parts, which have no ``cache_control``; what else there is, as it came."""
    return [_part(b) if isinstance(b, dict) else b for b in content] if isinstance(content, list) else content


def _part(block: Body) -> Body:
    if block.get("type") == "text":
        return {"type": "text", "text": block.get("text")}
    if block.get("type") != "image":
        return block
    source = object_in(block, "source")
    url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
    return {"type": "image_url", "image_url": {"url": url}}


class _Message:
    """A message as it grows: its events, and what they add up to."""

    def __init__(self, asked: Body) -> None:
        self.open = ""  # kind of the last block
        usage = {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
        self.whole: Body = {"id": "", "type": "message", "role": "assistant", "model": asked.get("model"), "content": [],
                            "stop_reason": None, "stop_sequence": None, "usage": usage}  # fmt: skip

    def start(self, chunk: Body) -> Iterator[bytes]:
        self.whole["id"] = f"msg_{chunk['id'].rpartition('-')[2]}"
        yield event("message_start", message=self.whole)

    def add(self, kind: str, text: str, call: Body) -> Iterator[bytes]:
        content = self.whole["content"]
        if kind != self.open or call.get("id"):
            yield from self.stop()
            self.open = kind
            tool = {"type": "tool_use", "id": call.get("id"), "name": call.get("function", {}).get("name"), "input": {}}
            content.append(dict(_STARTS.get(kind, tool)))
            yield event("content_block_start", index=len(content) - 1, content_block=content[-1])
        block, (delta, key) = content[-1], _DELTAS[kind]
        block[key] = block.get(key, "") + text
        yield event("content_block_delta", index=len(content) - 1, delta={"type": delta, key: text})

    def stop(self) -> Iterator[bytes]:
        if self.open:
            block = self.whole["content"][-1]
            if self.open == "tool":
                block["input"] = json.loads(block.pop("partial_json") or "{}")
            yield event("content_block_stop", index=len(self.whole["content"]) - 1)
            self.open = ""

    def end(self, choice: Body, usage: Body | None) -> Iterator[bytes]:
        if choice.get("finish_reason"):
            stop = choice.get("stop_reason")
            reason = "stop_sequence" if stop else _REASONS.get(choice["finish_reason"], "end_turn")
            self.whole |= {"stop_reason": reason, "stop_sequence": stop}
        if usage:
            yield from self.stop()
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            self.whole["usage"] |= {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached,
                                    "output_tokens": usage["completion_tokens"]}  # fmt: skip
            ended = {key: self.whole[key] for key in ("stop_reason", "stop_sequence")}
            yield event("message_delta", delta=ended, usage=self.whole["usage"])
            yield event("message_stop")

    def failed(self, status: int, error: Body) -> Iterator[bytes]:
        yield event("error", error=_error(status, {"error": error})["error"])


def _error(status: int, body: Body) -> Body:
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


MESSAGES = Wire("chat", _read, _Message, _error)
