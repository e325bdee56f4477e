"""A stand-in upstream for `studies.serve`: answers at once, and says in every piece which question it answers.

    python -m studies.serve_upstream PORT

``DELAY=SECONDS`` in a question puts so long between two pieces; a blank line ends an answer, and so a step. It counts prompt
tokens so that the probe finds *turn* mode.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

_PIECES = 8


async def chat(request: Request) -> Response:
    body = await request.json()
    question = str(body["messages"][0]["content"])
    name = question.split()[0]
    words = sum(7 + len(str(m["content"]).split()) for m in body["messages"])
    usage = {"prompt_tokens": words, "completion_tokens": _PIECES, "total_tokens": words + _PIECES}
    if body.get("stream"):
        delay = re.search(r"DELAY=([\d.]+)", question)
        return StreamingResponse(_stream(name, float(delay[1]) if delay else 0.0, usage), media_type="text/event-stream")
    message = {"role": "assistant", "content": f"{name} " * _PIECES}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return JSONResponse(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    )


async def _stream(name: str, delay: float, usage: dict[str, int]) -> AsyncIterator[str]:
    envelope = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    for _ in range(_PIECES):
        yield _data(envelope | {"choices": [{"index": 0, "delta": {"content": f"{name} "}, "finish_reason": None}]})
        await asyncio.sleep(delay)
    yield _data(envelope | {"choices": [{"index": 0, "delta": {"content": "\n\n"}, "finish_reason": None}]})
    yield _data(envelope | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    yield _data(envelope | {"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


app = FastAPI()
app.router.add_route("/v1/chat/completions", chat, methods=["POST"])
app.add_api_route("/v1/models", lambda: {"object": "list", "data": [{"id": "m", "object": "model"}]})

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
