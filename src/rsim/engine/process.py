"""Servers as processes below this one, which end when it does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from rsim.errors import UserError

# The server ends with its parent, however that ends: the kernel is asked for a signal (PR_SET_PDEATHSIG).
_GUARD = f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); os.execvp(sys.argv[1], sys.argv[1:])"


def start_server(
    name: str,
    words: list[str],
    host: str,
    log: Path,
    *,
    seconds: float,
    environment: dict[str, str] | None = None,
) -> tuple[subprocess.Popen[bytes], str]:
    """Runs a command that serves HTTP and waits until ``/health`` is well; its output goes to ``log``.

    Args:
        name: of the server, for errors.
        words: the command; ``{host}`` and ``{port}`` in it are filled in, the port with a free one.
        seconds: in which it must be well.

    Returns:
        The process and the server's address.

    Raises:
        UserError: it ends, or is not well in time.
    """
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    address = f"http://{host}:{port}"
    command = [word.replace("{host}", host).replace("{port}", str(port)) for word in words]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _GUARD, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )
    deadline = time.monotonic() + seconds
    while not _answers(address):
        if process.poll() is not None:
            raise UserError(f"the {name} server ended with {process.returncode}", f"its output is in {log}")
        if time.monotonic() > deadline:
            stop_server(process)
            raise UserError(f"the {name} server did not answer within {seconds:.0f} s", f"its output is in {log}")
        time.sleep(0.5)
    return process, address


def stop_server(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
