"""``/openapi.json``: what the server takes and gives. Fields that are not named here go on to the upstream as they are."""

from __future__ import annotations

from typing import Any

from rsim.runs.folder import versions

_TEXT, _WHOLE, _FLAG, _ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
_COUNT = {"type": "integer", "minimum": 1}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _object(required: str = "", **fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": fields}


def _texts(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), _TEXT)


def _named(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_PARTS = {"anyOf": [_TEXT, _list(_object("type", type=_TEXT, text=_TEXT))]}
_SHARED: dict[str, Any] = {
    "model": {"type": "string", "description": "with -rsim behind its name, answers are planned"},
    "stream": _FLAG,
    "temperature": {"type": "number", "minimum": 0, "maximum": 1000},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "rsim": {"anyOf": [_FLAG, _named("Rules")]},
}
_OPENAI: dict[str, Any] = _SHARED | {
    "max_tokens": _COUNT,
    "seed": _WHOLE,
    "n": {"type": "integer", "minimum": 1, "maximum": 1024},
    "stop": {"anyOf": [_TEXT, _list(_TEXT), {"type": "null"}]},
    "stream_options": _or_null(_object(include_usage=_FLAG)),
}
_TOOL = _object("type function", type={"const": "function"}, function=_object("name", name=_TEXT, parameters=_ANY))
_ANSWER = _texts("id object model") | {"created": _WHOLE, "usage": _named("Usage"), "rsim": _named("Planned")}
_CHOICE: dict[str, Any] = {
    "index": _WHOLE,
    "finish_reason": _or_null(_TEXT),
    "stop_reason": _or_null(_TEXT),
    "logprobs": _or_null(_ANY),
}

_SCHEMAS: dict[str, Any] = {
    "Rules": _object(gate={"type": "number", "minimum": 0, "maximum": 1}, max_steps=_COUNT),
    "Message": _object("role content", role=_TEXT, content=_or_null(_PARTS), reasoning_content=_TEXT, tool_calls=_list(_ANY)),
    "ChatRequest": _object(
        "messages",
        messages={"type": "array", "items": _named("Message"), "minItems": 1},
        max_completion_tokens=_COUNT,
        response_format=_object("type", type={"enum": ["text", "json_object", "json_schema"]}, json_schema=_ANY),
        tools=_list(_TOOL),
        tool_choice={"anyOf": [_TEXT, _ANY]},
        logprobs=_FLAG,
        top_logprobs={"type": "integer", "minimum": 0},
        reasoning_effort=_TEXT,
        **_OPENAI,
    ),
    "CompletionRequest": _object(
        "prompt",
        prompt={"anyOf": [_TEXT, _list(_TEXT), _list(_WHOLE), _list(_list(_WHOLE))]},
        logprobs=_or_null(_WHOLE),
        **_OPENAI,
    ),
    "ResponsesRequest": _object(
        "input",
        input={"anyOf": [_TEXT, _list(_ANY)]},
        instructions=_or_null(_TEXT),
        max_output_tokens=_or_null(_COUNT),
        **_SHARED,
    ),
    "MessagesRequest": _object(
        "messages max_tokens",
        messages={"type": "array", "items": _object("role content", role=_TEXT, content=_PARTS), "minItems": 1},
        max_tokens=_COUNT,
        system=_PARTS,
        stop_sequences=_list(_TEXT),
        thinking=_ANY,
        **_SHARED,
    ),
    "Usage": _object(
        "prompt_tokens completion_tokens",
        prompt_tokens=_WHOLE,
        completion_tokens=_WHOLE,
        total_tokens=_WHOLE,
        estimated=_FLAG,
        completion_tokens_details=_object(reasoning_tokens=_WHOLE),
    ),
    "Step": _object(
        "strategy prompt text",
        **_texts("strategy prompt text"),
        probabilities=_ANY,
        forced=_FLAG,
        seconds={"type": "number"},
    ),
    "Planned": _object("mode", mode=_TEXT, approximate=_FLAG, choices=_list(_object(steps=_list(_named("Step"))))),
    "ChatAnswer": _object("choices", choices=_list(_object("message", message=_named("Message"), **_CHOICE)), **_ANSWER),
    "CompletionAnswer": _object("choices", choices=_list(_object("text", text=_TEXT, **_CHOICE)), **_ANSWER),
    "ResponsesAnswer": _object("id output", id=_TEXT, status=_TEXT, output=_list(_ANY), usage=_ANY, rsim=_named("Planned")),
    "MessagesAnswer": _object("id content", id=_TEXT, role=_TEXT, content=_list(_ANY), stop_reason=_or_null(_TEXT), usage=_ANY),
    "TokenizeRequest": _object("prompt", prompt=_TEXT, add_special_tokens=_FLAG),
    "TokenizeAnswer": _object("tokens", tokens=_list(_WHOLE), count=_WHOLE, max_model_len=_WHOLE),
    "DetokenizeRequest": _object("tokens", tokens=_list(_WHOLE)),
    "DetokenizeAnswer": _object("prompt", prompt=_TEXT),
    "Model": _object("id", id=_TEXT, object=_TEXT, created=_WHOLE, owned_by=_TEXT),
    "Models": _object("data", object=_TEXT, data=_list(_named("Model"))),
    "Health": _object("status", status=_TEXT, mode=_or_null(_TEXT), strategies=_list(_TEXT), active=_WHOLE),
    "Error": _object("error", error=_object("message", message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
}


def _gives(schema: str, form: str = "application/json") -> dict[str, Any]:
    return {"description": schema, "content": {form: {"schema": _named(schema) if form == "application/json" else _TEXT}}}


def _takes(name: str, *, streams: bool = True) -> dict[str, Any]:
    answer = _gives(f"{name}Answer")
    if streams:
        answer["content"]["text/event-stream"] = {"schema": _TEXT}
    body = {"required": True, "content": {"application/json": {"schema": _named(f"{name}Request")}}}
    return {"post": {"requestBody": body, "responses": {"200": answer, "default": _gives("Error")}}}


def _shows(schema: str, form: str = "application/json") -> dict[str, Any]:
    return {"get": {"responses": {"200": _gives(schema, form), "default": _gives("Error")}}}


DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "rsim serve", "version": versions()["rsim"]},
    "paths": {
        "/v1/chat/completions": _takes("Chat"),
        "/v1/completions": _takes("Completion"),
        "/v1/responses": _takes("Responses"),
        "/v1/messages": _takes("Messages"),
        "/tokenize": _takes("Tokenize", streams=False),
        "/detokenize": _takes("Detokenize", streams=False),
        "/v1/models": _shows("Models"),
        "/v1/models/{name}": _shows("Model")
        | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]},
        "/healthz": _shows("Health"),
        "/metrics": _shows("Metrics of Prometheus", "text/plain"),
    },
    "components": {"schemas": _SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "security": [{}, {"key": []}],
}
