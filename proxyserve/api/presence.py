"""Work that lasts only as long as somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from proxyserve.errors import NotReady

T = TypeVar("T")


class ServerStopping(NotReady):
    """The time to drain is over and the answer is not complete."""

    def __init__(self) -> None:
        super().__init__(
            "The server is shutting down and could not finish this answer; try again elsewhere or later."
        )


async def while_present(work: Coroutine[Any, Any, T], receive: Receive, stopping: asyncio.Event) -> T:
    """Run `work`, but cancel it as soon as the client is gone or the server stops.

    Waits for messages instead of asking now and then: `receive` must be the connection's, with the body already read,
    so that the next message is `http.disconnect`. `work` has ended (and cleaned up) when this returns or raises.
    Raises ClientDisconnect, ServerStopping, or what `work` raises.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    stop = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({working, leaving, stop}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if stop.done() and stop.result():
            raise ServerStopping
        leaving.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving, stop):
            task.cancel()
        await asyncio.gather(working, leaving, stop, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
