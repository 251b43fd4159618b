"""A client that goes away is cancelled at once, and its blocks come back. Real sockets against a real server."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.api.live import Live, assert_idle, is_idle, wait_until

LONG = {"model": "atlas+qa", "prompt": "The quick", "ignore_eos": True, "max_tokens": 240, "n": 8}


@contextmanager
def request(live: Live, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which a completion was asked for and is running."""
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: live.engine.snapshot().running > 0)
        yield connection


def reset(connection: socket.socket) -> None:
    """Close with RST, as a killed process or a broken network does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["reset", "close"])
def test_leaving_cancels_and_returns_blocks(live: Live, stream: bool, leave: Any) -> None:
    before = live.engine.snapshot().finished.get("cancelled", 0)
    with request(live, {**LONG, "stream": stream}) as connection:
        if stream:
            assert b"200" in connection.recv(64)
        assert not is_idle(live.engine.snapshot())
        leave(connection)
        assert_idle(live.engine)
    stats = live.engine.snapshot()
    assert stats.finished["cancelled"] - before > 0, "it ran to its end, so this shows nothing"


def test_leaving_disturbs_nobody(live: Live) -> None:
    body = {"model": "atlas+qa", "prompt": "name:", "max_tokens": 40, "seed": 1}
    alone = live.post("/v1/completions", **body).json()["choices"]
    with request(live, {**LONG, "n": 4}) as connection:
        started = live.http.stream("POST", "/v1/completions", json={**body, "stream": True})
        with started as response:
            reset(connection)
            data = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(part["text"] for chunk in data for part in chunk["choices"]) == alone[0]["text"]


def test_leaving_during_the_upload_is_no_failure(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    tasks = live.server.server_state.tasks
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.sendall(head)
        wait_until(lambda: tasks)
        reset(connection)
    wait_until(lambda: not tasks)
    assert caplog.text == ""


def test_leaving_while_waiting_in_the_queue(live: Live) -> None:
    with request(live, LONG), request(live, LONG) as second:
        wait_until(lambda: live.engine.snapshot().waiting > 0)
        reset(second)
        wait_until(lambda: live.engine.snapshot().waiting == 0)


async def test_many_clients_that_leave_at_random(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url, timeout=30) as client:

        async def visit(number: int) -> str:
            body = {**LONG, "n": 1 + number % 2, "max_tokens": 30, "stream": number % 3 > 0, "seed": number}
            try:
                call = client.post("/v1/completions", json=body)
                response = await asyncio.wait_for(call, 0.02 * (number % 7) if number % 2 else 30)
            except TimeoutError:
                return "left"
            assert response.status_code == 200
            return "answered"

        started = time.monotonic()
        outcomes = await asyncio.gather(*(visit(number) for number in range(24)))
    assert set(outcomes) == {"left", "answered"}
    assert time.monotonic() - started < 30
