"""The plug-in server under load: what it costs, and what it survives.

*overhead*: beside the bare upstream. *stress*: many streams, a dying upstream, hostile clients. The upstream is
`studies.serve_upstream`, a process that answers at once. ``--beside optillm --beside litellm`` measures these as well, optillm
with its approach *none* and LiteLLM's proxy, in environments of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer

from rsim.policies.loading import load_planner, quiet_models
from rsim.policies.strategies import load_strategies
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import LITELLM, environment, free_port, rsim_server, served

ISSUE = 5
_STEPS = 4  # of a planned answer, by the sequence below
_SEQUENCE = "sequence:sub-planning,decomposition,validation,termination"


def run(
    part: Literal["overhead", "stress"],
    beside: Annotated[list[str] | None, typer.Option(help="May be repeated: optillm, litellm.")] = None,
    requests: int = 400,
    seconds: float = 60,
    streams: int = 64,
) -> Iterator[Row]:
    if part == "stress":
        yield from asyncio.run(stress(streams, seconds))
    else:
        yield from overhead(requests, beside or [])


def _upstream(port: int) -> list[str]:
    return [sys.executable, "-m", "studies.serve_upstream", str(port)]


def _server(port: int, upstream: int, planner: str, *more: str) -> list[str]:
    return rsim_server(port, planner, "--upstream", f"http://127.0.0.1:{upstream}/v1", "--mode", "turn", *more)


# --- overhead ---


def overhead(count: int, beside: list[str]) -> Iterator[Row]:
    up, own, learned = (free_port() for _ in range(3))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        quiet_models()
        load_planner("nano-s", load_strategies("lab"), seed=0).save_pretrained(folder)
        for command, port in ((_upstream(up), up), (_server(own, up, _SEQUENCE), own), (_server(learned, up, folder), learned)):
            stack.enter_context(served(command, port))
        direct, through = asyncio.run(_in_turn([up, own], count, "m"))
        added = _added(direct, through)
        yield Row("pass-through, median added latency", added, "ms", "at most 3 ms", added <= 3)
        yield Row("the upstream alone, median latency", round(1e3 * statistics.median(direct), 2), "ms")
        rate = statistics.median(asyncio.run(_rate(own, "m")) for _ in range(3))
        yield Row("pass-through, 32 at once", round(rate), "requests/s")
        for name in beside:
            theirs, latency = _other(name, up, count)
            yield Row(f"{name}, 32 at once", round(theirs), "requests/s")
            yield Row(f"{name}, median added latency", _added(direct, latency), "ms")
            faster = rate / theirs
            yield Row(f"pass-through, throughput against {name}'s", round(faster, 1), "x", "at least 5", faster >= 5)
        planners = (("a rule as planner", own, 0.0), ("the nano planner", learned, _planner_time(learned, count)))
        for name, port, planning in planners:
            mine = 1e3 * (asyncio.run(_planned_step(up, port, max(count // 4, 20))) - planning)
            yield Row(f"planned, rsim's own time per step, {name}", round(mine, 2), "ms", "at most 5 ms", mine <= 5)
            if planning:
                yield Row("planned, the nano planner's forward pass", round(1e3 * planning, 2), "ms")


def _other(name: str, up: int, count: int) -> tuple[float, list[float]]:
    """Requests a second through another proxy, and the seconds of single ones."""
    port, address = free_port(), f"http://127.0.0.1:{up}/v1"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "litellm.json")
        behind = {"model": "openai/m", "api_base": address, "api_key": "x"}
        config.write_text(json.dumps({"model_list": [{"model_name": "m", "litellm_params": behind}]}))
        optillm = ["--approach", "none", "--port", str(port), "--base-url", address]
        litellm = ["--config", str(config), "--port", str(port)]
        if name == "optillm":
            command, env = [str(environment("optillm") / "optillm"), *optillm], {"OPENAI_API_KEY": "x"}
        else:
            command, env = [str(environment("clients") / "litellm"), *litellm], LITELLM
        with served(command, port, env):
            rate = statistics.median(asyncio.run(_rate(port, "m")) for _ in range(3))
            return rate, asyncio.run(_in_turn([port], count // 4, "m"))[0]


def _body(model: str, name: str = "q", *, stream: bool = False, delay: float = 0.0) -> dict[str, Any]:
    said = f"{name} DELAY={delay}" if delay else name
    return {"model": model, "messages": [{"role": "user", "content": said}], "stream": stream}


async def _in_turn(ports: list[int], count: int, model: str) -> list[list[float]]:
    """Seconds of each request, one at a time, the servers in turn."""
    taken: list[list[float]] = [[] for _ in ports]
    async with httpx.AsyncClient(timeout=60) as http:
        for i in range(count + 20):
            for seconds, port in zip(taken, ports, strict=True):
                began = time.perf_counter()
                response = await http.post(_url(port), json=_body(model))
                response.raise_for_status()
                if i >= 20:
                    seconds.append(time.perf_counter() - began)
    return taken


def _added(direct: list[float], through: list[float]) -> float:
    return round(1e3 * (statistics.median(through) - statistics.median(direct)), 2)


async def _rate(port: int, model: str, seconds: float = 5.0, at_once: int = 32) -> float:
    done = 0
    end = time.perf_counter() + seconds

    async def worker(http: httpx.AsyncClient) -> None:
        nonlocal done
        while time.perf_counter() < end:
            (await http.post(_url(port), json=_body(model))).raise_for_status()
            done += 1

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=at_once)) as http:
        await asyncio.gather(*(worker(http) for _ in range(at_once)))
    return done / seconds


async def _planned_step(up: int, port: int, count: int) -> float:
    """Seconds that a step takes through rsim beyond the upstream's own: medians of whole answers and of bare streamed calls."""
    taken, bare, steps = [], [], []
    async with httpx.AsyncClient(timeout=60) as http:
        for _ in range(count):
            began = time.perf_counter()
            reply = await http.post(_url(port), json=_body(f"m{SUFFIX}"))
            taken.append(time.perf_counter() - began)
            steps.append(len(reply.json()["rsim"]["choices"][0]["steps"]))
            began = time.perf_counter()
            async with http.stream("POST", _url(up), json=_body("m", stream=True)) as response:
                async for _line in response.aiter_lines():
                    pass
            bare.append(time.perf_counter() - began)
    per_answer = statistics.median(steps)
    return statistics.median(taken) / per_answer - statistics.median(bare)


def _planner_time(port: int, count: int) -> float:
    """Seconds of a planner's forward pass for one request, by the server's own count."""
    asyncio.run(_in_turn([port], max(count // 20, 10), f"m{SUFFIX}"))
    shown = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in shown.splitlines() if not line.startswith("#")}
    steps = sum(v for k, v in values.items() if k.startswith("rsim_steps_total"))
    return values["rsim_planner_seconds"] / steps


# --- stress ---


async def stress(streams: int, seconds: float) -> list[Row]:
    """Planned streams for ``seconds``; after a third the upstream is killed and restarted; hostile clients all the while."""
    up, own = free_port(), free_port()
    counts: Counter[str] = Counter()
    names = itertools.count()
    with ExitStack() as upstreams, ExitStack() as servers:
        upstreams.enter_context(served(_upstream(up), up))
        command = _server(own, up, _SEQUENCE, "--slots", str(streams), "--waiting", "200")
        server = servers.enter_context(served(command, own))
        await asyncio.gather(*(_one(own, next(names), counts) for _ in range(2 * streams)))
        before = _usage_of(server.pid)
        counts.clear()
        end = time.perf_counter() + seconds

        async def worker() -> None:
            async with httpx.AsyncClient(timeout=60) as http:
                while time.perf_counter() < end:
                    await _one(own, next(names), counts, http)

        async def killer() -> None:
            await asyncio.sleep(seconds / 3)
            upstreams.close()
            await asyncio.sleep(2)
            await asyncio.to_thread(upstreams.enter_context, served(_upstream(up), up))

        hostile = [_slow_loris(own, end, counts), _big_bodies(own, end, counts), _leavers(own, end, counts)]
        await asyncio.gather(*(worker() for _ in range(streams)), killer(), *hostile)
        for _ in range(100):
            active = httpx.get(f"http://127.0.0.1:{own}/healthz").json()["active"]
            if active == 0:
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(25)  # the slow ones' time limit
        after = _usage_of(server.pid)
    growth, files = 100 * (after["memory"] / before["memory"] - 1), after["files"] - before["files"]
    whole, wrong, refused, big = (counts[kind] for kind in ("whole", "wrong", "413", "big"))
    return [
        Row(f"{streams} streams for {seconds:g} s: answers complete", whole, "answers", "more than none", whole > 0),
        Row("answers mixed up or cut without an error", wrong, "answers", "0", wrong == 0),
        Row("answers ended by an error while the upstream was down", counts["failed"], "answers"),
        Row("slow connections closed by the server", counts["loris"], "connections"),
        Row("bodies over the limit refused with 413", refused, "requests", f"all {big}", 0 < refused == big),
        Row("clients that left in mid-stream", counts["left"], "clients"),
        Row("requests still in hand at the end", active, goal="0", met=active == 0),
        Row("memory after against before", round(growth, 1), "%", "flat: at most 5%", growth <= 5),
        Row("open files and connections, after minus before", files, goal="flat: at most 5", met=files <= 5),
    ]


async def _one(port: int, number: int, counts: Counter[str], http: httpx.AsyncClient | None = None) -> None:
    """One planned stream: every word that the upstream wrote must be this question's name."""
    if http is None:
        async with httpx.AsyncClient(timeout=60) as own:
            await _one(port, number, counts, own)
        return
    name, written, finished, failed = f"q{number}", [], False, False
    try:
        async with http.stream("POST", _url(port), json=_body(f"m{SUFFIX}", name, stream=True)) as response:
            if response.status_code != 200:
                failed = True
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                failed |= "error" in chunk
                for choice in chunk.get("choices", []):
                    if "rsim" not in chunk and choice["delta"].get("content", "").strip():
                        written.append(choice["delta"]["content"].strip())
                    finished |= choice["finish_reason"] is not None
    except httpx.HTTPError:
        failed = True
    if failed:
        counts["failed"] += 1
        await asyncio.sleep(0.05)
    elif finished and written and set(written) == {name} and len(written) == 8 * _STEPS:
        counts["whole"] += 1
    else:
        counts["wrong"] += 1


async def _slow_loris(port: int, end: float, counts: Counter[str]) -> None:
    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with_header = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: "
        writer.write(with_header)
        try:
            while time.perf_counter() < end + 24:
                writer.write(b"a")
                await writer.drain()
                if reader.at_eof():
                    break
                await asyncio.sleep(0.5)
        except OSError:
            pass
        counts["loris"] += reader.at_eof()
        writer.close()

    await asyncio.gather(*(one() for _ in range(20)))


async def _big_bodies(port: int, end: float, counts: Counter[str]) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        while time.perf_counter() < end:
            body = json.dumps(_body(f"m{SUFFIX}", "x" * 11 * 2**20)).encode()
            response = await http.post(_url(port), content=body)
            counts["big"] += 1
            counts[str(response.status_code)] += 1
            await asyncio.sleep(0.5)


async def _leavers(port: int, end: float, counts: Counter[str]) -> None:
    while time.perf_counter() < end:
        async with httpx.AsyncClient(timeout=60) as http:
            body = _body(f"m{SUFFIX}", "gone", stream=True, delay=0.5)
            try:
                async with http.stream("POST", _url(port), json=body) as response:
                    async for _ in response.aiter_lines():
                        if random.random() < 0.5:
                            break
            except httpx.HTTPError:
                pass
            counts["left"] += 1
        await asyncio.sleep(0.1)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1/chat/completions"


def _usage_of(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    memory = float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
    return {"memory": memory, "files": len(os.listdir(f"/proc/{pid}/fd"))}
