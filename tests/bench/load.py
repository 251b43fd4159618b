"""What the load generator asks in tests, and servers that answer as they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from proxyserve.bench.load.answer import Checks
from proxyserve.bench.load.drive import Target
from proxyserve.bench.load.lengths import Lengths
from proxyserve.bench.load.prompts import Prompts
from proxyserve.bench.load.workload import Workload

#: Writes an answer to a request whose number and JSON it is given; what it leaves open is closed.
Answering = Callable[[int, dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def workload(
    folder: Path,
    *,
    prompt: str = "5",
    output: str = "4",
    as_text: bool = False,
    models: Mapping[str, float] | None = None,
) -> Workload:
    return Workload(
        models or {"atlas": 1.0},
        Lengths.parse(prompt),
        Lengths.parse(output),
        Prompts(folder, as_text=as_text),
    )


def target(url: str, *, chat: bool = False, **options: Any) -> Target:
    """With a greedy law, and checks that hold for `chat`."""
    extra = {"temperature": 0, **options.pop("extra", {})}
    return Target(url, chat=chat, extra=extra, checks=Checks(prompt=not chat), **options)


@asynccontextmanager
async def answering(answer: Answering) -> AsyncIterator[str]:
    """A server that reads requests and leaves their answers to `answer`. Gives its URL."""
    number = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        number += 1
        mine = number - 1
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
        body = json.loads(await reader.readexactly(int(length.split()[1])))
        await answer(mine, body, writer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def whole(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    """An HTTP response of known length."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def completion(tokens: int, **usage: Any) -> bytes:
    """A response that is not streamed."""
    fields = {
        "choices": [{"text": "x" * tokens, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": tokens, **usage},
    }
    return whole(json.dumps(fields).encode())


#: The beginning of a stream in chunks.
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
#: Its end.
OVER = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str, finish_reason: str | None = None) -> bytes:
    """A piece of text in a stream, in a chunk of its own."""
    fields = {"choices": [{"text": text, "finish_reason": finish_reason}]}
    return chunk(b"data: " + json.dumps(fields).encode() + b"\n\n")
