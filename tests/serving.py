"""A server in a thread of its own, for tests that need real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from rsim.serving.connections import PatientProtocol


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Yields the base URL, with ``/v1``."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http=PatientProtocol))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
