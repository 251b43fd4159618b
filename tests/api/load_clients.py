"""Clients of the load test. Each asks, waits, leaves or aborts, again and again, and says how it went; what must never
happen raises `Fault`."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from tests.api.load_traffic import Ask, next_ask

#: No request may be without an end for so long.
PATIENCE = 90.0

REFUSALS = frozenset({"queue_full", "key_limit", "rate_limit"})


class Manner(Enum):
    """How a client behaves during one request."""

    WAIT = auto()
    READ_SLOWLY = auto()
    LEAVE_IN_BODY = auto()
    LEAVE_BY_CLOCK = auto()
    LEAVE_IN_STREAM = auto()
    ABORT = auto()


_MANNERS = {
    Manner.WAIT: 10,
    Manner.READ_SLOWLY: 1,
    Manner.LEAVE_IN_BODY: 1,
    Manner.LEAVE_BY_CLOCK: 3,
    Manner.LEAVE_IN_STREAM: 2,
    Manner.ABORT: 2,
}


class Outcome(Enum):
    """How a request may end. CORNERED: what it asks for leaves no token that may come next."""

    ANSWERED = auto()
    REFUSED = auto()
    CANCELLED = auto()
    TIMED_OUT = auto()
    LEFT = auto()
    CORNERED = auto()


class Fault(Exception):
    """Something that no client may see."""


class _Left(Exception):
    """The client has gone away, as it meant to."""


@dataclass
class Tally:
    """What became of all requests, by key; refusals also by their code. `faults` says what went wrong, at most 20."""

    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def of(self, outcome: Outcome) -> int:
        return sum(count for (_, what), count in self.outcomes.items() if what is outcome)

    def __str__(self) -> str:
        keys = sorted({key for key, _ in self.outcomes})
        lines = [
            f"{key}: "
            + ", ".join(f"{self.outcomes[key, what]} {what.name.lower()}" for what in Outcome)
            + f" { ({code: count for (of, code), count in self.refusals.items() if of == key}) }"
            for key in keys
        ]
        return "\n".join(["", *lines])

    def fault(self, what: str) -> None:
        if len(self.faults) < 20:
            self.faults.append(what)


@dataclass
class Answer:
    """`data` are a stream's events, or the one body. `body` grows while it comes."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    chunks: int = 0

    @property
    def data(self) -> list[Any]:
        if self.headers["content-type"].startswith("application/json"):
            return [json.loads(self.body)]
        lines = self.body.decode().splitlines()
        found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [entry if entry == "[DONE]" else json.loads(entry) for entry in found]


class Client:
    """One of many, with a `key` and a seed. `port` is the server's, on loopback."""

    def __init__(self, port: int, key: str, seed: int, tally: Tally) -> None:
        self._port = port
        self._key = key
        self._rng = random.Random(seed)
        self._tally = tally
        self._name = f"{key}-{seed}"
        self._asked = 0

    async def keep_asking(self, end: float) -> None:
        """Until the event loop's time is `end`; what is asked for by then is waited for."""
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            ask = next_ask(self._rng)
            manner = self._rng.choices(list(_MANNERS), list(_MANNERS.values()))[0]
            try:
                async with asyncio.timeout(PATIENCE):
                    outcome = await self._visit(ask, manner)
            except TimeoutError:
                self._tally.fault(f"no end after {PATIENCE:g} s: {manner} {ask}")
                return
            except Exception as error:
                self._tally.fault(f"{error!r}: {manner} {ask}")
                continue
            self._tally.outcomes[self._key, outcome] += 1
            if outcome is Outcome.REFUSED:  # less patient than `Retry-After` asks for: this is a load test
                await asyncio.sleep(self._rng.uniform(0.2, 2.0))

    async def _visit(self, ask: Ask, manner: Manner) -> Outcome:
        self._asked += 1
        request_id = f"{self._name}-{self._asked}"
        answer = Answer()
        try:
            async with self._connection(slow=manner is Manner.READ_SLOWLY) as (reader, writer):
                await self._send(writer, ask, request_id, manner)
                await self._read(reader, answer, request_id, manner)
        except _Left:
            return Outcome.LEFT
        return self._judge(ask, manner, answer)

    @asynccontextmanager
    async def _connection(
        self, *, slow: bool
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Closed in one of two ways afterwards: in order, or as a killed process or a broken network does."""
        sock = socket.socket()
        sock.setblocking(False)
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        if self._rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**16)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _send(self, writer: asyncio.StreamWriter, ask: Ask, request_id: str, manner: Manner) -> None:
        content = json.dumps(ask.body).encode()
        head = self._head(ask.path, len(content), request_id)
        if manner is Manner.LEAVE_IN_BODY:
            writer.write(head + content[: self._rng.randrange(len(content))])
            await writer.drain()
            await asyncio.sleep(self._rng.uniform(0.0, 0.1))
            raise _Left
        writer.write(head + content)
        await writer.drain()

    def _head(self, path: str, length: int, request_id: str) -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer sk-{self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\nx-request-id: {request_id}\r\n\r\n"
        ).encode()

    async def _read(
        self, reader: asyncio.StreamReader, answer: Answer, request_id: str, manner: Manner
    ) -> None:
        """All of the answer, into `answer`. Raises _Left, and Fault for one that breaks off."""
        try:
            match manner:
                case Manner.LEAVE_BY_CLOCK:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._rng.choice((0.0, 0.02, 0.2, 1.0))):
                            return await _receive(reader, answer)
                    raise _Left
                case Manner.LEAVE_IN_STREAM:
                    await _receive(reader, answer, leave_after=self._rng.randint(1, 6))
                case Manner.READ_SLOWLY:
                    await _receive(reader, answer, pause=0.05)
                case Manner.ABORT:
                    async with asyncio.TaskGroup() as tasks:
                        aborting = tasks.create_task(self._abort(request_id))
                        await _receive(reader, answer)
                        aborting.cancel()
                case _:
                    await _receive(reader, answer)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Fault(f"the answer breaks off: {answer}") from error

    async def _abort(self, request_id: str) -> None:
        """Cancel one's own request, which may be over, after a while."""
        await asyncio.sleep(self._rng.uniform(0.0, 1.5))
        async with self._connection(slow=False) as (reader, writer):
            writer.write(self._head(f"/v1/requests/{request_id}/cancel", 0, f"{request_id}-abort"))
            answer = Answer()
            await _receive(reader, answer)
            if answer.status not in (200, 404):
                raise Fault(f"cancelling is answered {answer}")

    def _judge(self, ask: Ask, manner: Manner, answer: Answer) -> Outcome:
        data = answer.data
        if answer.status == 429:
            code = data[0]["error"]["code"]
            if int(answer.headers["retry-after"]) < 1 or code not in REFUSALS:
                raise Fault(f"a bad refusal: {answer}")
            self._tally.refusals[self._key, code] += 1
            return Outcome.REFUSED
        problem = _problem(answer, data)
        if problem is None:
            if answer.status != 200 or not _is_complete(ask, data):
                raise Fault(f"not complete: {answer}")
            return Outcome.ANSWERED
        if "time is over" in problem and ask.may_time_out and answer.status in (200, 504):
            return Outcome.TIMED_OUT
        if "cancelled by its id" in problem and manner is Manner.ABORT and answer.status in (200, 499):
            return Outcome.CANCELLED
        if "No token may come next" in problem and ask.may_be_cornered and answer.status in (200, 400):
            return Outcome.CORNERED
        raise Fault(f"{answer.status} {problem}")


async def _receive(
    reader: asyncio.StreamReader, answer: Answer, *, leave_after: int | None = None, pause: float = 0.0
) -> None:
    """Read one HTTP answer. Raises _Left after so many chunks of a body, IncompleteReadError if it breaks off."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    answer.status = int(head[0].split()[1])
    answer.headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
    }
    if "chunked" not in answer.headers.get("transfer-encoding", ""):
        answer.body += await reader.readexactly(int(answer.headers["content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        answer.body += (await reader.readexactly(size + 2))[:-2]
        answer.chunks += 1
        if answer.chunks == leave_after:
            raise _Left
        if pause:
            await asyncio.sleep(pause)
    await reader.readexactly(2)


def _problem(answer: Answer, data: list[Any]) -> str | None:
    """The message of the error that an answer is or ends with, None without one."""
    last = data[-1] if data else None
    if not isinstance(last, dict):
        return None
    error = last.get("error") or last.get("response", {}).get("error")
    return None if error is None else str(error["message"])


def _is_complete(ask: Ask, data: list[Any]) -> bool:
    """Whether every choice came to its end, and the stream to its."""
    if ask.path == "/v1/responses":
        body = data[-1]["response"] if ask.stream else data[-1]
        return body["status"] in ("completed", "incomplete") and body["usage"]["output_tokens"] > 0
    if ask.path == "/v1/score":
        return len(data[0]["continuations"]) == ask.choices
    if ask.stream and data.pop() != "[DONE]":
        return False
    choices = [choice for part in data for choice in part["choices"]]
    ended = sorted(choice["index"] for choice in choices if choice["finish_reason"] is not None)
    return ended == list(range(ask.choices))
