"""Log lines: one for each request, nothing in them that a client must not put there, and nothing of its texts."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from proxyserve.api.logs import JsonFormatter, TextFormatter, configure_logging, visible
from proxyserve.api.record import RequestRecord
from proxyserve.api.request_log import RequestLog
from proxyserve.config import LogConfig, LogFormat, LogLevel
from tests.api.live import Live, wait_until

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """`configure_logging` into a buffer; undone afterwards."""
    root = logging.getLogger()
    names = ("proxyserve", "proxyserve_kernels", "proxyserve.audit")
    before = [(logger, logger.level) for logger in (root, *map(logging.getLogger, names))]
    handlers = list(root.handlers)
    for handler in handlers:  # pytest's; `force` would close them
        root.removeHandler(handler)

    def run(form: LogFormat = "json", level: LogLevel = "info") -> io.StringIO:
        stream = io.StringIO()
        configure_logging(LogConfig(form, level), stream)
        return stream

    yield run
    root.handlers[:] = handlers
    for logger, level in before:
        logger.setLevel(level)


def requests_in(stream: io.StringIO) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [entry for entry in entries if entry["logger"] == "proxyserve.requests"]


def wait_for_lines(stream: io.StringIO, count: int) -> list[dict[str, Any]]:
    """A line is written when the answer has gone, which its reader does not wait for."""
    wait_until(lambda: len(requests_in(stream)) >= count)
    found = requests_in(stream)
    assert len(found) == count, found
    return found


# What a line says -----------------------------------------------------------------------------------------------


def test_a_finished_request_is_one_line(live: Live, configure: Configure) -> None:
    stream = configure()
    answer = live.post("/v1/completions", model="atlas+qa:0.5", prompt="The quick", max_tokens=5, n=2, seed=1)
    (line,) = wait_for_lines(stream, 1)
    body = answer.json()
    times = {name: line.pop(name) for name in [*line] if name.endswith("seconds")}
    assert line.pop("time").endswith("Z")
    reasons = line.pop("finish_reasons")
    assert sorted(reasons) == sorted(choice["finish_reason"] for choice in body["choices"])
    assert line.pop("mean_kl") == pytest.approx(body["fusion"]["mean_kl"], abs=1e-5)
    assert line == {
        "level": "info",
        "logger": "proxyserve.requests",
        "message": "request",
        "method": "POST",
        "route": "/v1/completions",
        "request_id": answer.headers["x-request-id"],
        "status": 200,
        "model": "atlas+qa:0.5",
        "rule": "proxy",
        "experts": {"qa": 1},
        "choices": 2,
        "prompt_tokens": body["usage"]["prompt_tokens"],
        "completion_tokens": body["usage"]["completion_tokens"],
        "flips": body["fusion"]["flips"],
    }
    parts = [times[f"{part}_seconds"] for part in ("queue", "prefill", "decode")]
    assert all(part > 0 for part in parts)
    assert times["first_token_seconds"] < times["seconds"]
    assert sum(parts) < times["seconds"]


def test_streams_refusals_and_probes(live: Live, configure: Configure) -> None:
    stream = configure(level="debug")
    says = [{"role": "user", "content": "a"}]
    live.stream("/v1/chat/completions", model="atlas+qa", messages=says, max_tokens=3)
    live.post("/v1/completions", model="nobody", prompt="a")
    live.post("/v1/completions", model="atlas", prompt="a", max_tokens=-1)
    live.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    live.http.get("/v1/models/atlas")
    live.http.get("/nowhere?secret=1")
    live.http.get("/health")
    lines = wait_for_lines(stream, 7)
    assert lines[0]["stream"] is True and lines[0]["choices"] == 1 and lines[0]["first_token_seconds"] > 0
    assert [line.get("model") for line in lines[:4]] == ["atlas+qa", "nobody", "atlas", None]
    assert [(line["status"], line.get("error")) for line in lines] == [
        (200, None),
        (404, "model_not_found"),
        (400, "invalid_value"),
        (400, "invalid_json"),
        (200, None),
        (404, "route_not_found"),
        (200, None),
    ]
    assert [line["level"] for line in lines] == ["info"] * 6 + ["debug"]
    assert lines[4]["route"] == "/v1/models/{model_id:path}"
    assert lines[5]["path"] == "/nowhere" and "route" not in lines[5]
    assert not any("disconnected" in line for line in lines)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_a_client_that_left(live: Live, configure: Configure, streamed: bool) -> None:
    stream = configure()
    body = {
        "model": "atlas+qa",
        "prompt": "The quick",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": streamed,
    }
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: live.engine.snapshot().running > 0)
    (line,) = wait_for_lines(stream, 1)
    assert line["disconnected"] is True
    assert line["status"] == (200 if streamed else 499)
    assert line["experts"] == {"qa": 1} and line["prompt_tokens"] == 3
    assert line["completion_tokens"] < 200 and "decode_seconds" not in line


@pytest.mark.parametrize(
    ("status", "error", "route", "level"),
    [
        (200, None, "/v1/completions", logging.INFO),
        (200, "generation_failed", "/v1/completions", logging.WARNING),
        (500, "internal", "/v1/completions", logging.ERROR),
        (None, None, "/v1/completions", logging.ERROR),
        (503, "not_ready", "/v1/completions", logging.WARNING),
        (429, "queue_full", "/v1/completions", logging.INFO),
        (200, None, "/metrics", logging.DEBUG),
        (503, None, "/ready", logging.DEBUG),
        (401, "invalid_api_key", "/metrics", logging.INFO),
    ],
)
def test_levels(
    caplog: pytest.LogCaptureFixture, status: int | None, error: str | None, route: str, level: int
) -> None:
    with caplog.at_level(logging.DEBUG, "proxyserve.requests"):
        RequestLog().write(record_with(status=status, error=error, route=route))
    assert [entry.levelno for entry in caplog.records] == [level]


def record_with(**values: Any) -> RequestRecord:
    record = RequestRecord("id", "GET", "/path", complete=True)
    for name, value in values.items():
        setattr(record, name, value)
    return record


def test_a_flood_of_refusals_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = RequestLog(clock=lambda: now[0])

    def lines(count: int, status: int) -> list[dict[str, Any]]:
        caplog.clear()
        for _ in range(count):
            log.write(record_with(status=status))
        return [entry.__dict__["fields"] for entry in caplog.records]

    with caplog.at_level(logging.INFO, "proxyserve.requests"):
        assert len(lines(1000, 401)) == 100
        assert len(lines(300, 200)) == 300, "answers are never left out"
        now[0] = 1.0
        later = lines(50, 404)
    assert len(later) == 20
    assert [line.get("not_logged") for line in later] == [900] + [None] * 19


def test_metadata_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    metadata = {f"key-{number}": "x" * 600 for number in range(40)}
    with caplog.at_level(logging.INFO, "proxyserve.requests"):
        RequestLog().write(record_with(status=200, metadata=metadata))
    (entry,) = caplog.records
    assert entry.__dict__["fields"]["metadata"] == {f"key-{number}": "x" * 100 for number in range(16)}


# What a line must not do ----------------------------------------------------------------------------------------

#: Ends of lines of every kind, a terminal's colours, what turns the direction of writing, half a character.
EVIL = 'a\nINFO x: forged\r\v\f\x1c\x85\u2028\x1b[31m\u202e\x00"= \ud800é'


def made(message: str, fields: dict[str, Any], *, failed: bool) -> logging.LogRecord:
    record = logging.LogRecord("proxyserve.x", logging.INFO, __file__, 1, "%s", (message,), None)
    record.fields = fields
    if failed:
        try:
            raise ValueError(EVIL)
        except ValueError as error:
            record.exc_info = (type(error), error, error.__traceback__)
    return record


@pytest.mark.parametrize("failed", [False, True])
def test_nothing_forges_a_line(failed: bool) -> None:
    fields = {"model": EVIL, "metadata": {EVIL: EVIL}, "list": [EVIL], "plain": "é-1", "flag": True}
    record = made(EVIL, fields, failed=failed)
    text, entry = TextFormatter().format(record), JsonFormatter().format(record)
    first, *rest = text.split("\n")
    assert bool(rest) == failed
    assert all(line.isprintable() for line in (first, *rest))
    assert all(line.startswith("    ") for line in rest), "a traceback looks like no line of the log"
    assert "plain=é-1" in first and "flag=true" in first
    assert entry.isascii() and entry.isprintable()
    decoded = json.loads(entry)
    assert decoded["message"] == EVIL and decoded["metadata"] == {EVIL: EVIL}
    assert ("exception" in decoded) == failed


def test_what_prints_stays_as_it_is() -> None:
    for text in ("plain", "Zürich 東京 🙂", ""):
        assert visible(text) == text


def test_clients_cannot_forge_a_line(live: Live, configure: Configure) -> None:
    stream = configure("text", "debug")
    evil = EVIL.replace("\ud800", "")
    live.post("/v1/completions", model=evil, prompt="a")
    live.http.get("/v1/models/a%0aERROR%20b%e2%80%ae")
    live.http.get("/x%0d%0aERROR%20c%1b[2J")
    live.http.get("/health", headers={"x-request-id": "a b\tc", "user-agent": "ERROR d"})
    wait_until(lambda: stream.getvalue().count("proxyserve.requests") == 4)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert all(" proxyserve.requests: request method=" in line and line.isprintable() for line in lines)


CANARY = "xylophone-7261"


@pytest.mark.parametrize("form", get_args(LogFormat))
@pytest.mark.parametrize("level", get_args(LogLevel))
def test_nothing_of_what_clients_say_is_logged(
    live: Live, configure: Configure, form: LogFormat, level: LogLevel
) -> None:
    stream = configure(form, level)
    says = [{"role": "user", "content": f"Say {CANARY}"}]
    bearer = {
        "authorization": f"Bearer {CANARY}",
        "x-custom": CANARY,
        "traceparent": CANARY,
        "cookie": CANARY,
    }
    text = {"model": "atlas+qa", "prompt": CANARY, "max_tokens": 2, "stop": [CANARY], "user": CANARY}
    live.http.post(f"/v1/completions?key={CANARY}", json=text, headers=bearer)
    live.post("/v1/chat/completions", model="atlas+qa", messages=says, max_tokens=2)
    live.stream("/v1/completions", **text)
    tool = {"type": "function", "function": {"name": "f", "description": CANARY}}
    live.post(
        "/v1/chat/completions",
        model="atlas+qa",
        messages=says,
        max_tokens=2,
        tools=[tool],
        tool_choice="none",
    )
    live.post("/v1/completions", model="atlas", prompt="a", structured_outputs={"regex": f"({CANARY}"})
    live.post("/v1/score", model="atlas", prompt=CANARY, continuations=[CANARY])
    live.post("/tokenize", prompt=CANARY)
    live.post("/v1/completions", model="atlas", prompt=[CANARY, 3])
    live.post("/v1/completions", model="atlas", prompt=CANARY, temperature=CANARY)
    live.post("/v1/completions", **{"model": "atlas", "prompt": "a", CANARY: 1})
    live.http.post(
        "/v1/completions", content=f'{{"{CANARY}'.encode(), headers={"content-type": "application/json"}
    )
    live.http.post("/v1/completions", content=CANARY.encode())
    live.post("/v1/completions", model="atlas", prompt=CANARY, max_tokens=10**6)
    live.post("/v1/completions", model="atlas", prompt="a", fusion={"rule": "formula", "formula": CANARY})
    live.http.get("/health")
    answers = live.http.get("/metrics").text
    if level in ("debug", "info"):
        wait_until(lambda: stream.getvalue().count("proxyserve.requests") >= (16 if level == "debug" else 14))
    assert CANARY not in stream.getvalue()
    assert "Say" not in stream.getvalue()
    assert CANARY not in answers
