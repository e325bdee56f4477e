"""Streamed responses that notice at once when their client goes away, also while the upstream says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

T = TypeVar("T")


class WatchedStream(StreamingResponse):
    """Streams ``chunks``. Whatever becomes of the client, ``chunks`` is closed and ``done`` is called in the end.

    (Starlette's own response finds out when it next has something to send.)
    """

    done: Callable[[], None]

    def __init__(self, chunks: AsyncGenerator[bytes], status: int, headers: dict[str, str]) -> None:
        super().__init__(chunks, status, headers)
        self.chunks = chunks

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work = asyncio.ensure_future(self.stream_response(send))
        watch = asyncio.ensure_future(client_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            await cancel(work, watch)
            await self.chunks.aclose()
            self.done()


async def client_gone(receive: Any) -> None:
    """Returns when the client of a request, whose body was read, has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class ClientGone(Exception):
    """The client of a request has gone; there is no one to answer."""


async def unless_gone(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(client_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        await cancel(task, watch)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels the tasks and waits until they have cleaned up."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
