"""Planned answers of ``rsim serve --model`` against those of an earlier commit, and their first token against an unplanned one.

Both servers run side by side, each asked in turn: ``requests`` planned answers at once, of four steps, each to a question of
its own. Tokens are those that the model sampled, counted in what is streamed; rates are compared round by round. The time to
the first sampled token is that of one request at a time, planned and plain in turn, on today's server.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from rsim.policies.loading import load_reasoner
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import free_port, rsim_server, served
from studies.workload import ONE_THREAD, questions

ISSUE = 16
_SEQUENCE = "sequence:sub-planning,decomposition,validation,termination"
_SINGLE = 8  # requests of which the first token is waited for


def run(
    model: str = "smollm2-135m", commit: str = "97af8d4", requests: int = 16, step_tokens: int = 32, rounds: int = 3
) -> Iterator[Row]:
    tokenizer = load_reasoner(model, weights=False).tokenizer
    options = ("--model", model, "--step-tokens", str(step_tokens), "--max-steps", "4")
    then, now = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        older = Path(folder) / commit
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(older), commit], check=True)
        stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", str(older)], check=True)
        places = {"PYTHONPATH": str(older / "src")} | ONE_THREAD
        told = [sys.executable, "-c", "import rsim; print(rsim.__file__)"]
        assert str(older) in subprocess.run(told, env=places, capture_output=True, text=True, check=True).stdout
        stack.enter_context(served(rsim_server(then, _SEQUENCE, *options), then, places))
        stack.enter_context(served(rsim_server(now, _SEQUENCE, *options), now, ONE_THREAD))
        rates: dict[int, list[float]] = {then: [], now: []}
        for number in range(rounds + 1):
            for port, kept in rates.items():
                asked = questions(requests if number else 2, seed=number)  # the first round warms up
                kept.append(asyncio.run(_rate(port, asked, tokenizer)))
        ratio = statistics.median(b / a for a, b in list(zip(rates[then], rates[now], strict=True))[1:])
        yield Row(
            f"planned answers, {requests} at once: tokens/s against {commit}", round(ratio, 2), "x", "at least 3", ratio >= 3
        )
        for name, port in ((commit, then), ("this commit", now)):
            yield Row(f"planned answers, {requests} at once: {name}", round(statistics.median(rates[port][1:]), 1), "tokens/s")
        planned, plain = asyncio.run(_first_tokens(now))
        later = statistics.median(a / b for a, b in zip(planned, plain, strict=True))
        yield Row("first token: a planned answer's against a plain one's", round(later, 2), "x", "at most 1.2", later <= 1.2)
        yield Row("first token of a planned answer", round(1e3 * statistics.median(planned)), "ms")


async def _rate(port: int, asked: list[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Sampled tokens a second, all questions at once."""
    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=3600, limits=httpx.Limits(max_connections=None)) as http:
        answers = await asyncio.gather(*(_ask(http, port, question, planned=True) for question in asked))
    seconds = time.perf_counter() - began
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text, _ in answers) / seconds


async def _first_tokens(port: int) -> tuple[list[float], list[float]]:
    """Seconds to the first sampled token of planned answers and of plain ones, to the same questions."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    async with httpx.AsyncClient(timeout=3600) as http:
        for number, question in enumerate(questions(2 * _SINGLE, seed=100)):
            planned = number % 2 == 0  # each question once: what was read is not in a cache
            taken[planned].append((await _ask(http, port, question, planned))[1])
    return taken[True], taken[False]


async def _ask(http: httpx.AsyncClient, port: int, question: str, planned: bool) -> tuple[str, float]:
    """What the model sampled, and the seconds until its first piece."""
    name = await _name(http, port)
    body: dict[str, Any] = {"model": name + SUFFIX if planned else name, "stream": True, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": question}], "max_tokens": 256}
    began, first, said = time.perf_counter(), 0.0, ""
    async with http.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            text = "" if "rsim" in chunk else "".join(c["delta"].get("content") or "" for c in chunk.get("choices", []))
            first = first or (time.perf_counter() - began if text else 0.0)
            said += text
    return said, first


async def _name(http: httpx.AsyncClient, port: int) -> str:
    listed = (await http.get(f"http://127.0.0.1:{port}/v1/models")).json()["data"]
    return str(listed[0]["id"]).removesuffix(SUFFIX)
