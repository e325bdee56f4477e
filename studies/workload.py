"""What the speed measurements share: questions made on the spot, runs in a process of their own, printing."""

from __future__ import annotations

import json
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rsim.engine.vllm import save_untied
from rsim.policies.loading import load_reasoner

_NAMES = ("Tom", "Ann", "Mia", "Leo", "Zoe", "Max")
_THINGS = ("hens", "boxes of pens", "rows of chairs", "bags of rice", "shelves of books")


def questions(count: int, seed: int = 0) -> list[str]:
    """Grade-school word problems of some 40 to 60 tokens."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        name, other = rng.sample(_NAMES, 2)
        a, b, c = (rng.randint(2, 30) for _ in range(3))
        made.append(
            f"{name} has {a} {rng.choice(_THINGS)}, each worth {b} dollars. {other} gives {name} {c} more of them and then "
            f"takes away half of what {name} has. How many dollars is what {name} has left worth?"
        )
    return made


def in_child(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs ``python -m MODULE --child JSON`` and returns the JSON of its last line: its memory is its own."""
    command = [sys.executable, "-m", module, "--child", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextmanager
def served_model(model: str, *arguments: str, timeout: float = 300) -> Iterator[httpx.Client]:
    """A vLLM server for ``model`` in the environment of ``bench/vllm_env.sh`` (which makes it), and a client of it."""
    script = Path(__file__).with_name("vllm_env.sh")
    subprocess.run([str(script)], stdout=subprocess.DEVNULL, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        reasoner = load_reasoner(model)
        save_untied(reasoner.model, Path(folder) / "model")
        reasoner.tokenizer.save_pretrained(f"{folder}/model")
        command = [str(script), "serve", f"{folder}/model", str(port), *arguments]
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server:
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout) as client:
                    _wait_for(client, server, timeout, Path(log.name))
                    yield client
            finally:
                server.terminate()


def _wait_for(client: httpx.Client, server: subprocess.Popen[bytes], timeout: float, log: Path) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until and server.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise SystemExit("the vLLM server did not start; its log ends: " + log.read_text(errors="replace")[-2000:])


def peak_gib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        value = f"{r['value']:g}" if isinstance(r["value"], int | float) else str(r["value"])
        print(f"{r['what']:<78} {value:<10} {r['unit']:<9} {r['goal']:<14} {'' if r['met'] is None else r['met']}", flush=True)
