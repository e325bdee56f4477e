"""The plug-in server under load: what it costs, and what it survives.

    python -m studies.serve overhead [--optillm] [--record]    pass-through and planned, against the same upstream
    python -m studies.serve stress [--seconds 60] [--record]          64 streams, a dying upstream, hostile clients

The upstream is `studies.serve_upstream`, a process that answers at once. ``--optillm`` measures optillm as well, in an
environment of its own, which `bench/optillm_env.sh` makes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rsim.policies.loading import load_planner, quiet_models
from rsim.policies.strategies import load_strategies
from rsim.serving.server import SUFFIX
from studies.ledger import record, row

_TITLE = "The plug-in server: overhead and endurance"
_STEPS = 4  # of a planned answer, by the sequence below
_SEQUENCE = "sequence:sub-planning,decomposition,validation,termination"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=["overhead", "stress"])
    parser.add_argument("--optillm", action="store_true", help="beside optillm, in the environment of bench/optillm_env.sh")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--record", action="store_true", help="write results/serve.json and its page")
    args = parser.parse_args()
    rows = (
        measure_overhead(args.requests, args.optillm)
        if args.part == "overhead"
        else asyncio.run(stress(args.streams, args.seconds))
    )
    for r in rows:
        print(f"{r['what']:<75} {r['value']!s:<12} {r['unit']:<12} {r['goal']}  {'' if r['met'] is None else r['met']}")
    if args.record:
        record("serve", 5, _TITLE, rows)


# --- processes ---


@contextmanager
def process(
    command: list[str], port: int, env: dict[str, str] | None = None, seconds: float = 120.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A server as a child, once it listens on ``port``."""
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(command, env=os.environ | (env or {}), stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        wait_for(port, seconds)
        yield child
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
        child.wait()


def wait_for(port: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def upstream_command(port: int) -> list[str]:
    return [sys.executable, "-m", "studies.serve_upstream", str(port)]


def serve_command(port: int, upstream: int, planner: str = _SEQUENCE, *more: str) -> list[str]:
    return [sys.executable, "-m", "rsim", "serve", "--planner", planner, "--upstream", f"http://127.0.0.1:{upstream}/v1",
            "--port", str(port), "--mode", "turn", *more]  # fmt: skip


# --- overhead ---


def measure_overhead(count: int, optillm: bool) -> list[dict[str, Any]]:
    up, own, learned, other = (free_port() for _ in range(4))
    planner = _nano_planner()
    with (
        process(upstream_command(up), up),
        process(serve_command(own, up), own),
        process(serve_command(learned, up, planner), learned),
    ):
        direct, through = asyncio.run(_in_turn([up, own], count, "m"))
        rows = [
            row("pass-through, median added latency", _added(direct, through), unit="ms", goal="at most 3 ms",
                met=_added(direct, through) <= 3),
            row("the upstream alone, median latency", round(1e3 * statistics.median(direct), 2), unit="ms"),
        ]  # fmt: skip
        rate = statistics.median(asyncio.run(_rate(own, "m")) for _ in range(3))
        rows.append(row("pass-through, 32 at once", round(rate), unit="requests/s"))
        if optillm:
            address = f"http://127.0.0.1:{up}/v1"
            made = subprocess.run([str(Path(__file__).with_name("optillm_env.sh"))], capture_output=True, text=True, check=True)
            program = str(Path(made.stdout.strip()).with_name("optillm"))
            command = [program, "--approach", "none", "--port", str(other), "--base-url", address]
            with process(command, other, {"OPENAI_API_KEY": "x"}):
                theirs = statistics.median(asyncio.run(_rate(other, "m")) for _ in range(3))
            rows += [
                row("optillm, approach none, 32 at once", round(theirs), unit="requests/s"),
                row("pass-through, throughput against optillm's", round(rate / theirs, 1), unit="x", goal="at least 5",
                    met=rate / theirs >= 5),
            ]  # fmt: skip
        for name, port, planned in (
            ("a rule as planner", own, 0.0),
            ("the nano planner", learned, _planner_time(learned, count)),
        ):
            step = asyncio.run(_planned_step(up, port, max(count // 4, 20)))
            mine = step - planned
            rows.append(row(f"planned, rsim's own time per step, {name}", round(1e3 * mine, 2), unit="ms",
                            goal="at most 5 ms", met=1e3 * mine <= 5))  # fmt: skip
            if planned:
                rows.append(row("planned, the nano planner's forward pass", round(1e3 * planned, 2), unit="ms"))
    return rows


def _nano_planner() -> str:
    """The untrained nano planner, saved where the server can load it."""
    quiet_models()
    folder = Path("runs/bench-serve-planner")
    load_planner("nano-s", load_strategies("lab"), seed=0, head="names").save_pretrained(folder)
    return str(folder)


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
                response = await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=_body(model))
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
            (await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=_body(model))).raise_for_status()
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
            reply = await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=_body(f"m{SUFFIX}"))
            taken.append(time.perf_counter() - began)
            steps.append(len(reply.json()["rsim"]["choices"][0]["steps"]))
            began = time.perf_counter()
            async with http.stream(
                "POST", f"http://127.0.0.1:{up}/v1/chat/completions", json=_body("m", stream=True)
            ) as response:
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


async def stress(streams: int, seconds: float) -> list[dict[str, Any]]:
    """Planned streams for ``seconds``; after a third the upstream is killed and restarted; hostile clients all the while."""
    up, own = free_port(), free_port()
    upstream = subprocess.Popen(upstream_command(up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(up)
    counts: Counter[str] = Counter()
    names = itertools.count()
    try:
        with process(serve_command(own, up, _SEQUENCE, "--slots", str(streams), "--waiting", "200"), own) as server:
            await asyncio.gather(*(_one(own, next(names), counts) for _ in range(2 * streams)))
            before = _usage_of(server.pid)
            counts.clear()
            end = time.perf_counter() + seconds

            async def worker() -> None:
                async with httpx.AsyncClient(timeout=60) as http:
                    while time.perf_counter() < end:
                        await _one(own, next(names), counts, http)

            async def killer() -> None:
                nonlocal upstream
                await asyncio.sleep(seconds / 3)
                upstream.kill()
                upstream.wait()
                await asyncio.sleep(2)
                upstream = subprocess.Popen(upstream_command(up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

            hostile = [_slow_loris(own, end, counts), _big_bodies(own, end, counts), _leavers(own, end, counts)]
            await asyncio.gather(*(worker() for _ in range(streams)), killer(), *hostile)
            for _ in range(100):
                health = httpx.get(f"http://127.0.0.1:{own}/healthz").json()
                if health["active"] == 0:
                    break
                await asyncio.sleep(0.2)
            await asyncio.sleep(25)  # the slow ones' time limit
            after = _usage_of(server.pid)
    finally:
        upstream.kill()
    growth = 100 * (after["memory"] / before["memory"] - 1)
    return [
        row(f"{streams} streams for {seconds:g} s: answers complete", counts["whole"], unit="answers",
            goal="more than none", met=counts["whole"] > 0),
        row("answers mixed up or cut without an error", counts["wrong"], unit="answers", goal="0", met=counts["wrong"] == 0),
        row("answers ended by an error while the upstream was down", counts["failed"], unit="answers"),
        row("slow connections closed by the server", counts["loris"], unit="connections"),
        row("bodies over the limit refused with 413", counts["413"], unit="requests", goal=f"all {counts['big']}",
            met=0 < counts["413"] == counts["big"]),
        row("clients that left in mid-stream", counts["left"], unit="clients"),
        row("requests still in hand at the end", health["active"], goal="0", met=health["active"] == 0),
        row("memory after against before", round(growth, 1), unit="%", goal="flat: at most 5%", met=growth <= 5),
        row("open files and connections, after minus before", after["files"] - before["files"], goal="flat: at most 5",
            met=after["files"] - before["files"] <= 5),
    ]  # fmt: skip


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


if __name__ == "__main__":
    main()
