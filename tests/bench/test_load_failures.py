"""What servers do wrong is counted by kind, and ends no measurement."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from typing import Any

import pytest

from proxyserve.bench.load import drive
from proxyserve.bench.load.drive import Load, Round, run_round
from proxyserve.bench.load.statistics import summarize
from proxyserve.errors import ProxyserveError
from tests.bench.load import (
    OVER,
    STREAM,
    Answering,
    answering,
    chunk,
    completion,
    event,
    target,
    whole,
    workload,
)
from tests.tiny import TinyFamily

Writer = asyncio.StreamWriter


async def run(family: TinyFamily, answer: Answering, load: Load, **options: Any) -> Round:
    async with answering(answer) as url:
        return await run_round(target(url, **options), workload(family.base), load)


def kinds(found: Round) -> Counter[str]:
    return Counter(failure.kind for failure in found.failures)


async def test_a_server_that_is_full(tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is told when to come back does so; what it was refused is counted, and not asked again."""
    waited: list[float] = []
    sleep = asyncio.sleep

    async def wait(seconds: float) -> None:
        if seconds != drive._TICK:
            waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(drive.asyncio, "sleep", wait)
    after = {1: "Retry-After: 2\r\n", 2: "Retry-After: 3600\r\n", 4: ""}

    async def answer(number: int, _: dict[str, Any], writer: Writer) -> None:
        if number in after:
            writer.write(whole(b"full", status="429 Too Many Requests", headers=after[number]))
        else:
            writer.write(completion(4))

    found = await run(tiny_family, answer, Load(6, clients=1), stream=False)
    assert len(found.answers) == 3 and kinds(found) == {"status 429": 3}
    assert {failure.message for failure in found.failures} == {"full"}
    assert waited == [2.0, drive._MOST_WAIT]
    # Who arrives waits for nobody.
    waited.clear()
    found = await run(tiny_family, answer, Load(6, rate=1e6), stream=False)
    assert kinds(found) == {"status 429": 3} and 2.0 not in waited


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (b"", "cut"),
        (STREAM + event("a"), "cut"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "cut"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "malformed"),
        (STREAM + b"zz\r\n", "malformed"),
        (STREAM + chunk(b"data: {]\n\n") + OVER, "malformed"),
        (STREAM + chunk(b"data: [1]\n\n") + OVER, "malformed"),
        (STREAM + chunk(b'data: {"choices": [7]}\n\n') + OVER, "malformed"),
        (STREAM + chunk(b"data: \xff\n\n") + OVER, "malformed"),
        (whole(b"no JSON"), "empty"),
        (whole(b""), "malformed"),
        (whole(b'{"choices": 7}'), "malformed"),
        (whole(b'{"choices": [{"text": "a"}], "usage": 7}'), "malformed"),
        (whole(b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": "4"}}'), "malformed"),
        (STREAM + event("a") + chunk(b'data: {"error": {"message": "gone"}}\n\n') + OVER, "error event"),
        (STREAM + event("") + OVER, "empty"),
        (STREAM + OVER, "malformed"),
        (whole(b"oh", status="500 Internal Server Error"), "status 500"),
        (whole(b"", status="503 Service Unavailable"), "status 503"),
    ],
)
async def test_an_answer_that_is_none(tiny_family: TinyFamily, response: bytes, kind: str) -> None:
    async def answer(number: int, _: dict[str, Any], writer: Writer) -> None:
        writer.write(response if number else completion(4))

    found = await run(tiny_family, answer, Load(3, clients=1))
    assert len(found.answers) == 1 and kinds(found) == {kind: 2}


async def test_an_error_in_a_stream_is_quoted(tiny_family: TinyFamily) -> None:
    async def answer(_: int, __: dict[str, Any], writer: Writer) -> None:
        writer.write(STREAM + chunk(b'data: {"error": {"message": "the engine died"}}\n\n') + OVER)

    summary = summarize(Load(1, clients=1), [await run(tiny_family, answer, Load(1, clients=1))])
    assert "the engine died" in summary.messages["error event"]
    assert summary.answered == 0 and "1 x error event" in summary.troubles
    # NaN is none of JSON's: what nobody measured is null.
    written = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert written["seconds"]["ttft"]["p50"]["median"] is None
    assert written["errors"] == {"error event": {"count": 1, "first": summary.messages["error event"]}}


@pytest.mark.parametrize("load", [Load(3, clients=2), Load(3, rate=1e6)], ids=str)
async def test_nobody_listens(tiny_family: TinyFamily, load: Load) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = await run_round(target(f"http://127.0.0.1:{port}"), workload(tiny_family.base), load)
    assert kinds(found) == {"refused": 3} and found.answers == ()


async def test_a_server_that_does_not_answer_in_time(tiny_family: TinyFamily) -> None:
    async def answer(_: int, __: dict[str, Any], writer: Writer) -> None:
        writer.write(STREAM + event("a"))
        await writer.drain()
        await asyncio.wait([asyncio.ensure_future(writer.wait_closed())])  # by the client

    found = await run(tiny_family, answer, Load(3, clients=3), timeout=0.05)
    assert kinds(found) == {"timeout": 3} and found.answers == ()


async def test_events_may_be_cut_anywhere(tiny_family: TinyFamily) -> None:
    """By chunks of one byte, with either line ending, comments between them, and an error that is none."""
    lines = (
        ': hello\r\n\r\ndata: {"choices": [{"text": "é", "token_ids": [1, 2]}], "error": null}\r\n\r\n'
        'data: {"choices": [{"text": "", "token_ids": [3, 4], "finish_reason": "length"}], "usage": null}\n\n'
        'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'
    )

    async def answer(_: int, __: dict[str, Any], writer: Writer) -> None:
        data = lines.encode()
        writer.write(STREAM + b"".join(chunk(data[at : at + 1]) for at in range(len(data))) + OVER)

    found = await run(tiny_family, answer, Load(1, clients=1))
    (answered,) = found.answers
    assert (answered.prompt_usage, answered.usage, answered.ids, answered.doubts) == (5, 4, 4, ())
    assert len(answered.pieces) == 2


@pytest.mark.parametrize(
    ("response", "doubts"),
    [
        (completion(4), ()),
        (completion(3), ("answer not as long as asked for",)),
        (completion(4, prompt_tokens=6), ("prompt not counted as sent",)),
        (whole(b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 4}}'), ("no finish_reason",)),
        (
            whole(
                b'{"choices": [{"text": "a", "token_ids": [1], "finish_reason": "length"}],'
                b'"usage": {"completion_tokens": 4}}'
            ),
            ("usage is not the number of ids",),
        ),
    ],
)
async def test_answers_that_do_not_fit_together(
    tiny_family: TinyFamily, response: bytes, doubts: tuple[str, ...]
) -> None:
    async def answer(_: int, __: dict[str, Any], writer: Writer) -> None:
        writer.write(response)

    found = await run(tiny_family, answer, Load(2, clients=1), stream=False)
    assert [answer.doubts for answer in found.answers] == [doubts] * 2
    assert summarize(Load(2, clients=1), [found]).doubts == dict.fromkeys(doubts, 2)


@pytest.mark.parametrize("chat", [False, True])
async def test_what_is_sent(tiny_family: TinyFamily, chat: bool) -> None:
    bodies: list[dict[str, Any]] = []

    async def answer(_: int, body: dict[str, Any], writer: Writer) -> None:
        bodies.append(body)
        writer.write(completion(4))

    folder = tiny_family.experts["qa"]
    async with answering(answer) as url:
        asked = workload(folder, as_text=chat)
        to = target(url + "/v1/", chat=chat, extra={"ignore_eos": None, "top_k": 3})
        await run_round(to, asked, Load(1, clients=1), first=7)
    ask = asked.ask(7)
    prompt = {"messages": [{"role": "user", "content": ask.prompt}]} if chat else {"prompt": ask.prompt}
    expected = {"model": "atlas", "max_tokens": 4, "temperature": 0, "top_k": 3, **prompt}
    assert bodies == [{**expected, "stream": True, "stream_options": {"include_usage": True}}]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:99999", "http://[::1"]
)
async def test_an_address_that_is_none(tiny_family: TinyFamily, url: str) -> None:
    with pytest.raises(ProxyserveError, match="address of a server"):
        await run_round(target(url), workload(tiny_family.base), Load(1, clients=1))


async def test_a_key_is_sent_and_addresses_have_brackets_where_they_need_them() -> None:
    address = drive.Target("http://[::1]:81/base/v1", "sk-1").address
    head = address.head(3)
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: [::1]:81\r\n")
    assert b"\r\nAuthorization: Bearer sk-1\r\n" in head and head.endswith(b"\r\n\r\n")
    assert drive.Target("https://host", chat=True).address.port == 443
