"""Hours of training on the nano lab, and a server under load: memory and open files must not grow.

`rsim train nano`, 16 questions of 8 episodes a step, evaluations and checkpoints as often as in the demo, until the time is up;
then SIGTERM, which must end it with 0. Once a second the resident memory and the open files of the run's processes are read.
Memory moves with the lengths of the episodes, so medians are compared: the second fifth of the time with the last.

``--part serving``: ``rsim serve --model nano-s`` with 64 streams at a time for a minute, beside requests that broke servers.
Memory is compared with that after a first round of both.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import free_port, rsim_server, served
from studies.workload import training

ISSUE = 7
_MIB = 2**20
_STALLED = 300  # seconds without a step; one takes some four


def run(
    part: Literal["training", "serving"] = "training",
    minutes: float = 120,
    seed: int = 0,
    seconds: float = 60,
    streams: int = 64,
) -> list[Row]:
    if part == "serving":
        return asyncio.run(load(streams, seconds))
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder) / "run", minutes, seed)


def measure(folder: Path, minutes: float, seed: int) -> list[Row]:
    endless = ("stages.stage1.steps=10000", "stages.stage2.steps=10000", "train.questions=16")
    told = folder.with_name("stderr")  # a pipe that no one reads would stop the run once it is full
    with told.open("w") as errors:
        command = training("nano", (f"out={folder}", *endless, f"seed={seed}"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    seen: list[tuple[int, int, int]] = []  # bytes of the process that trains and of its workers, open files of all
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself: {told.read_text()[-1000:]}")
        seen.append(_looked_at(process.pid))
        if len(seen) > _STALLED and time.time() - (folder / "metrics.jsonl").stat().st_mtime > _STALLED:
            raise SystemExit(f"no step within {_STALLED} s: the run stands still")
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=600)
    ended = process.returncode == 0 and "Traceback" not in told.read_text()
    steps = sum("reward/accuracy" in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    fifth = len(seen) // 5
    parts = [seen[i * fifth : (i + 1) * fifth] for i in range(5)]
    medians = [statistics.median(own + workers for own, workers, _ in part) for part in parts]
    of_workers = [statistics.median(workers for _, workers, _ in part) for part in parts]
    files, files_after = (max(count for *_, count in part) for part in (parts[1], parts[-1]))
    growth, more = 100 * (medians[-1] / medians[1] - 1), files_after - files
    label, seeds = f"{minutes:g} minutes", [seed]
    grown = f"{label}: growth of memory to the last fifth"
    return [
        Row(f"{label}: steps", steps, seeds=seeds),
        Row(f"{label}: memory, medians of the fifths", _in_mib(medians), "MiB", seeds=seeds),
        Row(f"{label}: of it the processes that check answers", _in_mib(of_workers), "MiB", seeds=seeds),
        Row(grown, round(growth, 2), "%", "within 2%", abs(growth) <= 2, seeds=seeds),
        Row(f"{label}: more open files than in the second fifth", more, goal="0", met=more <= 0, seeds=seeds),
        Row(f"{label}: exit code after SIGTERM", process.returncode, goal="0", met=ended, seeds=seeds),
    ]


def _in_mib(sizes: list[float]) -> str:
    return ", ".join(f"{size / _MIB:.1f}" for size in sizes)


def _looked_at(pid: int) -> tuple[int, int, int]:
    own = psutil.Process(pid)
    memory, workers, files = own.memory_info().rss, 0, own.num_fds()
    for process in own.children(recursive=True):
        try:
            workers, files = workers + process.memory_info().rss, files + process.num_fds()
        except psutil.NoSuchProcess:  # a checker that has just ended
            continue
    return memory, workers, files


# --- a server ---


def _user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def _form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


_DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(300):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}, "required": ["a"]}
_POISON: dict[str, dict[str, Any] | bytes] = {  # fields of a request, or a body as it is
    "temperature 1e-40": {"temperature": 1e-40},
    "temperature NaN": b'{"temperature": NaN}',
    "temperature 1e300": {"temperature": 1e300},
    "top_p 1e-30": {"top_p": 1e-30},
    "top_p Infinity": b'{"top_p": Infinity}',
    "a question of 9 MB": _user("1+1=? " * 1_500_000),
    "a body of 11 MB": b'"' + b"x" * (11 * 2**20) + b'"',
    "a question that fills the context": _user("1+1=? " * 160),
    "a question of one token": _user(" "),
    "half of a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "100,000 brackets": b"[" * 100_000,
    "no JSON": b"\xff\xfe",
    "content null": _user(None),
    "an image": _user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]),
    "a part that is null": _user([None]),
    "a role that no template knows": {"messages": [{"role": "x" * 10_000, "content": "7"}]},
    "an unknown model": {"model": "y" * 10_000 + SUFFIX},
    "10,000 stop strings": {"stop": [f"{i}?" for i in range(10_000)]},
    "a billion answers": {"n": 10**9},
    "a limit beyond any": {"max_tokens": 10**30},
    "a limit below any": {"max_tokens": -5},
    "a seed beyond any": {"seed": 10**40},
    "log-probs of a thousand tokens": {"logprobs": True, "top_logprobs": 1000},
    "a gate that is no number": {"rsim": {"gate": "open"}},
    "tools without a name": {"tools": [{"type": "function"}]},
    "a call without arguments": {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
    "a schema that is none": _form({"type": "so"}),
    "a schema 300 deep": _form(_DEEP),
    "a pattern that explodes": _form({"type": "string", "pattern": "^(a+)+(b+)+$"}),
    "an answer of one token in a form": {"response_format": {"type": "json_object"}, "max_tokens": 1},
}


async def load(streams: int, seconds: float) -> list[Row]:
    port, counts = free_port(), Counter[str]()
    planner = "sequence:decomposition,continuation,termination"
    command = rsim_server(port, planner, "--strategies", "lab", "--model", "nano-s", "--waiting", "1000")
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with served(command, port) as server:
        process = psutil.Process(server.pid)
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
            for warm in (True, False):
                counts.clear()
                end = time.monotonic() + (0 if warm else seconds)
                work = [_streams(client, url, end, counts) for _ in range(streams)]
                await asyncio.gather(*work, _poison(client, url, end, counts))
                await _calm(client, port)
                if warm:
                    before, files = process.memory_info().rss, process.num_fds()
            active = await _calm(client, port)
            growth = 100 * (process.memory_info().rss / before - 1)
            more = process.num_fds() - files
    label = f"{streams} streams for {seconds:g} s beside poison requests"
    return [
        Row(f"{label}: whole answers", counts["whole"], goal="some", met=counts["whole"] > 0),
        Row(f"{label}: lost answers", counts["lost"], goal="0", met=counts["lost"] == 0),
        Row(f"{label}: poison requests", counts["poison"], f"of {len(_POISON)} kinds"),
        Row(f"{label}: of them answered with a server error", counts["500"], goal="0", met=counts["500"] == 0),
        Row(f"{label}: requests still in hand", active, goal="0", met=active == 0),
        Row(f"{label}: memory after against before", round(growth, 1), "%", "at most 5%", growth <= 5),
        Row(f"{label}: memory before", round(before / _MIB, 1), "MiB"),
        Row(f"{label}: open files, after minus before", more, goal="at most 5", met=more <= 5),
    ]


def _asked(**more: Any) -> dict[str, Any]:
    return {"model": f"nano-s{SUFFIX}", "messages": [{"role": "user", "content": "4*17+38=?"}]} | more


async def _streams(client: httpx.AsyncClient, url: str, end: float, counts: Counter[str]) -> None:
    """One stream after another, at least one."""
    while True:
        lines = []
        async with client.stream("POST", url, json=_asked(stream=True)) as reply:
            async for line in reply.aiter_lines():
                lines += [line] if line else []
        done = lines[-1:] == ["data: [DONE]"] and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "stop"
        counts["whole" if done else "lost"] += 1
        if time.monotonic() >= end:
            return


async def _poison(client: httpx.AsyncClient, url: str, end: float, counts: Counter[str]) -> None:
    """All at once, at least once, each with a client that leaves as soon as it is answered; and again."""

    async def one(poison: dict[str, Any] | bytes) -> None:
        body = poison if isinstance(poison, bytes) else json.dumps(_asked(**poison)).encode()
        status = (await client.post(url, content=body)).status_code
        counts["poison"] += 1
        counts["500"] += status >= 500
        async with client.stream("POST", url, json=_asked(stream=True)) as reply:
            await anext(reply.aiter_lines())

    while True:
        await asyncio.gather(*map(one, _POISON.values()))
        if time.monotonic() >= end:
            return


async def _calm(client: httpx.AsyncClient, port: int) -> int:
    """Requests still in hand, once there are none or after 20 s; memory needs a moment to go back."""
    for _ in range(20):
        await asyncio.sleep(1)
        active: int = (await client.get(f"http://127.0.0.1:{port}/healthz")).json()["active"]
        if not active:
            break
    await asyncio.sleep(2)
    return active
