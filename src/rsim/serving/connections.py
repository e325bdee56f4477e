"""Connections that send nothing, or a header byte by byte, are closed: a server must not run out of them."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEADER_SECONDS = 20.0


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a time limit for a request's header, from its first byte (or from the connection's beginning)."""

    _impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._impatience is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._calm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._impatience = self.loop.call_later(_HEADER_SECONDS, self._close)

    def _calm(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _close(self) -> None:
        self._impatience = None
        if not self.transport.is_closing():
            self.transport.close()
