"""Starts llama.cpp's server, built by ``studies/llama_server.sh``: a process of one thread for each core."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from rsim.errors import UserError

_SECONDS = 300.0  # until it has loaded the model
# A slot has its own cache and no other (none is saved when it changes hands). Weights that are not repacked give a
# sampled token the same logits whatever is sampled beside it, and are no slower.
_SETTINGS = "--threads 1 --threads-batch 1 --no-kv-unified --cache-ram 0 --no-ui --no-repack"
# The kernel is asked for a signal (PR_SET_PDEATHSIG), unless the parent is gone by then.
_GUARD = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, int(sys.argv[2])); "
    "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[3], sys.argv[3:])"
)


def ending_with_parent(command: list[str], sent: signal.Signals) -> list[str]:
    """A command that does what ``command`` does, and is ``sent`` a signal when this process ends, however that ends."""
    return [sys.executable, "-c", _GUARD, str(os.getpid()), str(int(sent)), *command]


def server_program() -> Path:
    """``$RSIM_LLAMA_SERVER``, or where ``studies/llama_server.sh`` puts the program. It may not be there."""
    cache = Path(os.environ.get("RSIM_CACHE") or Path.home() / ".cache" / "rsim")
    return Path(os.environ.get("RSIM_LLAMA_SERVER") or cache / "llama" / "llama-server")


@contextmanager
def llama_servers(
    model: Path,
    log: Path,
    *,
    slots: int,
    context: int,
    cores: tuple[int, ...] = (),
    more: tuple[str, ...] = (),
) -> Iterator[str]:
    """Servers of the GGUF file ``model`` while the block lasts.

    Two servers of one thread, each pinned to a core, sample more than one of two threads, which wait for each
    other. Their addresses come as ``rollout.llama_url`` takes them.

    Args:
        log: the file that their output is added to.
        slots: sequences at a time, of each server.
        context: tokens of one slot: the longest question and ``rollout.max_tokens``, and one more.
        cores: one server pinned to each of these CPU cores; none: one server, not pinned.
        more: further arguments of the server.

    Raises:
        UserError: the program is not there, or a server does not start.
    """
    program = server_program()
    if not program.is_file():
        raise UserError(
            f"no llama.cpp server at {program}",
            "build it with studies/llama_server.sh, or set $RSIM_LLAMA_SERVER",
        )
    words = [str(program), "--model", str(model), *_SETTINGS.split()]
    words += ["--parallel", str(slots), "--ctx-size", str(slots * context), *more]
    running: list[subprocess.Popen[bytes]] = []
    addresses = []
    saved = tempfile.TemporaryDirectory()  # of slots: a file of each server's at most for each of its slots
    try:
        for pin in [["taskset", "-c", str(core)] for core in cores] or [[]]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            folder = tempfile.mkdtemp(dir=saved.name)
            command = [*pin, *words, "--host", "127.0.0.1", "--port", str(port), "--slot-save-path", folder]
            with log.open("ab") as output:
                guarded = ending_with_parent(command, signal.SIGTERM)
                running.append(subprocess.Popen(guarded, stdout=output, stderr=subprocess.STDOUT))
            addresses.append(f"http://127.0.0.1:{port}")
            _wait_for(running[-1], addresses[-1], log)
        yield ",".join(addresses)
    finally:
        for process in running:
            _stop(process)
        saved.cleanup()


def _wait_for(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Raises `UserError` where it ends, or is not well in time."""
    deadline = time.monotonic() + _SECONDS
    while not _answers(address):
        if process.poll() is not None:
            raise UserError(f"the llama.cpp server ended with {process.returncode}", f"its output is in {log}")
        if time.monotonic() > deadline:
            raise UserError(f"the llama.cpp server did not answer within {_SECONDS:.0f} s", f"its output is in {log}")
        time.sleep(0.5)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
