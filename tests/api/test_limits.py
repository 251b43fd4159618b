"""Requests that take too long, that somebody cancels, or that nobody reads: their lanes are free at once and whoever
waits is told. Real sockets against a real server."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from proxyserve.api.errors import StartupError
from proxyserve.api.server import check_tls
from proxyserve.config import EngineConfig, Limits, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.errors import NotReady
from proxyserve.models.loaded_model import ParkedExpert
from proxyserve.models.model_set import ModelSet
from tests.api.fakes import FakeEngine
from tests.api.live import Live, assert_idle, serve, wait_until
from tests.api.test_keys import as_key, record, write

#: Far more than fits into a deadline.
LONG: dict[str, Any] = {
    "model": "atlas+qa",
    "prompt": "The quick",
    "ignore_eos": True,
    "max_tokens": 240,
    "n": 8,
}


@pytest.fixture(scope="module")
def shared(tiny_models: ModelSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    keys = write(
        tmp_path_factory.mktemp("keys") / "keys.yaml",
        record("ann"),
        record("bob"),
        record("root", role="admin"),
    )
    limits = Limits(
        max_unread_tokens=300,
        body_seconds=0.3,
        header_seconds=0.3,
        max_headers=30,
        max_header_bytes=4096,
    )
    config = ServerConfig(
        api_key_file=keys, limits=limits, request_timeout=20.0, cors_origins=("https://app.example",)
    )
    engine = AsyncEngine(Engine(tiny_models, EngineConfig(max_batch=8, kv_memory=4 * 2**20)), limits)
    engine.start()
    with serve(engine, config) as live:
        live.http.headers.update(as_key("ann"))
        yield live
    engine.close()


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    yield shared
    assert_idle(shared.engine)
    state = shared.server.config.app.state.proxyserve  # type: ignore[union-attr]
    wait_until(lambda: len(state.running) == 0)


class Asked(threading.Thread):
    """A request that is under way."""

    def __init__(self, live: Live, *, headers: dict[str, str] | None = None, **body: Any) -> None:
        super().__init__()
        self._live, self._headers, self._body = live, headers or {}, body
        self.answer: httpx.Response | None = None
        self.start()
        wait_until(lambda: not self._idle())

    def _idle(self) -> bool:
        stats = self._live.engine.snapshot()
        return bool(stats.running == stats.waiting == 0)

    def run(self) -> None:
        with httpx.Client(base_url=self._live.url, timeout=30) as http:
            headers = {**as_key("ann"), **self._headers}
            self.answer = http.post("/v1/completions", json={**LONG, **self._body}, headers=headers)

    def error(self) -> tuple[int, str]:
        """Status and code, of the last event in a stream."""
        self.join(30)
        assert self.answer is not None
        text = self.answer.text
        if self._body.get("stream"):
            assert "[DONE]" not in text
            text = text.strip().rpartition("data: ")[2]
        return self.answer.status_code, json.loads(text)["error"]["code"]


# Deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_running_requests_end_at_their_deadline(live: Live, stream: bool) -> None:
    asked = Asked(live, stream=stream, timeout=0.15)
    assert asked.error() == (200 if stream else 504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/score", {"texts": ["Hi there"]}),
    ],
)
def test_every_route_has_deadlines(live: Live, path: str, body: dict[str, Any]) -> None:
    late = live.post(path, **body, model="atlas+qa", timeout=1e-6)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert live.post(path, **body, model="atlas+qa", timeout=20).status_code == 200


def test_waiting_requests_end_at_their_deadline(live: Live) -> None:
    running = Asked(live, n=8, headers={"x-request-id": "running"})
    wait_until(lambda: live.engine.snapshot().running == 8)
    waiting = Asked(live, n=1, timeout=0.05)
    assert waiting.error() == (504, "deadline_exceeded")
    assert live.engine.snapshot().running == 8, "there was room for it, so this shows nothing"
    cancel(live, "running")
    running.join()


def test_answers_in_time_are_whole(live: Live) -> None:
    answer = live.post("/v1/completions", **{**LONG, "n": 1, "max_tokens": 3, "timeout": 20})
    assert answer.status_code == 200
    for timeout, words in ((-1, "greater than 0"), (21, "allows 20")):
        answer = live.post("/v1/completions", **{**LONG, "timeout": timeout})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "timeout") and words in error["message"]


async def test_loading_an_expert_ends_at_the_deadline(tiny_models: ModelSet) -> None:
    class Loading:
        """A control plane that loads for ever, or for as long as it may."""

        async def wake(self, name: str, seconds: float) -> None:
            await asyncio.sleep(min(seconds, 10.0) + 0.1)
            raise NotReady("It took too long.")

        def experts(self) -> list[Any]:
            return []

    parked = ModelSet(tiny_models.base, parked={"zed": ParkedExpert(None, 256, 0)})
    with serve(FakeEngine(parked), ServerConfig(load_wait_seconds=0.3), Loading()) as live:  # type: ignore[arg-type]
        body = {"model": "atlas", "prompt": "Hi", "fusion": {"rule": "arm", "experts": {"zed": 1}}}
        started = time.monotonic()
        late = live.post("/v1/completions", **body, timeout=0.05)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - started < 0.3
        assert live.post("/v1/completions", **body, timeout=5).status_code == 503


# Cancelling ------------------------------------------------------------------------------------------------------


def cancel(live: Live, request_id: str, name: str = "ann") -> httpx.Response:
    return live.http.post(f"/v1/requests/{request_id}/cancel", headers=as_key(name))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_cancelled_by_the_client_s_own_id(live: Live, stream: bool) -> None:
    asked = Asked(live, stream=stream, headers={"x-request-id": "mine"})
    assert cancel(live, "mine", "bob").status_code == 404, "another key's"
    answer = cancel(live, "mine")
    assert (answer.status_code, answer.json()) == (200, {"id": "mine", "cancelled": 1})
    assert asked.error() == (200 if stream else 499, "request_cancelled")
    assert cancel(live, "mine").json()["error"]["code"] == "request_not_found"


def test_cancelled_by_the_answer_s_id(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="sk-ann", max_retries=0) as client:
        stream = client.completions.create(
            model="atlas+qa", prompt="Hi", n=8, max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(stream))
        assert cancel(live, first.id, "root").status_code == 200, "administrators may cancel all"
        with pytest.raises(openai.APIError) as ended:
            for _ in stream:
                pass
    assert ended.value.code == "request_cancelled"


def test_cancelling_takes_no_body(live: Live) -> None:
    assert live.post("/v1/requests/x/cancel", all=True).status_code == 400


def test_load(live: Live) -> None:
    idle = live.http.get("/load").json()
    assert idle == {"running": 0, "waiting": 0, "waiting_tokens": 0, "kv_use": 0.0}
    asked = Asked(live, n=16, headers={"x-request-id": "busy"})
    wait_until(lambda: (busy := live.http.get("/load").json())["running"] == 8 and busy["waiting"] == 8)
    busy = live.http.get("/load").json()
    assert busy["waiting_tokens"] > 0 and 0.0 < busy["kv_use"] <= 1.0
    cancel(live, "busy")
    asked.join()


# Readers ---------------------------------------------------------------------------------------------------------


@contextmanager
def connection(live: Live, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(10)
        client.connect((host, int(port)))
        yield client


def head(*lines: str, length: int | None = None) -> bytes:
    given = ["POST /v1/completions HTTP/1.1", "Host: x", "Authorization: Bearer sk-ann", *lines]
    if length is not None:
        given += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*given, "", ""]).encode()


def read_all(client: socket.socket) -> bytes:
    """Until the server closes the connection."""
    text = b""
    while piece := client.recv(65536):
        text += piece
    return text


def test_a_reader_that_stalls_is_given_up(live: Live) -> None:
    """What waits for it stays small, its blocks come back long before it would have had everything, and it is told."""
    for listener in live.server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps({**LONG, "stream": True, "n": 16, "logprobs": 5}).encode()
    before = live.engine.snapshot()
    streams = []
    with connection(live, receive_buffer=4096) as client:
        client.sendall(head("Connection: close", length=len(body)) + body)
        wait_until(lambda: live.engine.snapshot().running > 0)
        with live.engine._wake:
            streams = list({id(s): s for s in live.engine._streams.values()}.values())
        most = 0
        while streams[0]._open and not streams[0]._unread.full:
            most = max(most, len(streams[0]._unread))
            time.sleep(0.001)
        assert_idle(live.engine)
        after = live.engine.snapshot()
        assert after.finished["cancelled"] > before.finished.get("cancelled", 0)
        assert most <= 64 + 16 and len(streams[0]._unread) == 0
        assert b"read so slowly" in read_all(client)
    assert after.tokens_generated - before.tokens_generated < 16 * 240


# What comes before a request -------------------------------------------------------------------------------------


def code_of(answer: bytes) -> tuple[int, str]:
    status, _, rest = answer.partition(b"\r\n")
    headers, _, body = rest.partition(b"\r\n\r\n")
    assert b"connection: close" in headers.lower()
    return int(status.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "sent",
    [
        head(*(f"X-{number}: 1" for number in range(40))),
        head("X-Large: " + "x" * 5000),
        head("X-Large: " + "x" * 200_000)[:-4],  # and no end of it
        b"GET /" + b"x" * 200_000,
    ],
    ids=["many", "large", "endless", "target"],
)
def test_header_floods(live: Live, sent: bytes) -> None:
    with connection(live) as client:
        client.sendall(sent)
        assert code_of(read_all(client)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (head()[:-2], 408, "headers_too_slow"),
        (head(length=100) + b'{"model": ', 408, "body_too_slow"),
        (
            head("Transfer-Encoding: chunked", "Content-Type: application/json") + b"2\r\n{}\r\n",
            408,
            "body_too_slow",
        ),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400, "invalid_http"),
    ],
    ids=["headers", "body", "chunked", "other"],
)
def test_clients_that_do_not_finish(live: Live, sent: bytes, status: int, code: str) -> None:
    with connection(live) as client:
        started = time.monotonic()
        client.sendall(sent)
        assert code_of(read_all(client)) == (status, code)
        assert time.monotonic() - started < 5


def test_connections_that_say_nothing_are_closed(live: Live) -> None:
    with connection(live) as client:
        assert read_all(client) == b""


def test_long_answers_are_not_cut_by_these(live: Live) -> None:
    """Several requests on one connection, with pauses and an answer that takes longer than the limits."""
    with httpx.Client(base_url=live.url, headers=as_key("ann"), timeout=30) as http:
        for _ in range(2):
            started = time.monotonic()
            assert http.post("/v1/completions", json={**LONG, "n": 1, "max_tokens": 120}).status_code == 200
            assert time.monotonic() - started > 0.3, "it was too fast to show anything"
            time.sleep(0.35)


def test_too_many_connections(tiny_models: ModelSet) -> None:
    config = ServerConfig(limits=Limits(max_connections=3))
    with serve(FakeEngine(tiny_models), config) as live, connection(live) as first:
        held = [first, *(socket.create_connection(first.getpeername()) for _ in range(2))]
        with socket.create_connection(first.getpeername(), timeout=10) as one_more:
            assert code_of(read_all(one_more)) == (503, "too_many_connections")
        for client in held:
            client.close()

        def answered() -> bool:
            try:
                return live.http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answered)


# Web pages -------------------------------------------------------------------------------------------------------


def test_origins(live: Live) -> None:
    def ask(origin: str, **more: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **more}
        return httpx.options(f"{live.url}/v1/completions", headers=headers)

    allowed = ask("https://app.example", **{"Access-Control-Request-Headers": "authorization,x-stainless-os"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    for origin in ("https://app.example.evil", "http://app.example", "null", "https://sub.app.example"):
        assert "access-control-allow-origin" not in ask(origin).headers
        answer = live.http.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    answer = httpx.get(f"{live.url}/v1/models", headers={"Origin": "https://app.example"})
    assert answer.status_code == 401, "an origin is no key"
    assert answer.headers["access-control-allow-origin"] == "https://app.example", "pages may read refusals"


@pytest.mark.parametrize(
    "origin", ["*", "https://*.example", "https://a.example/", "https://A.example", "a.example"]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        ServerConfig(cors_origins=(origin,))


def test_without_origins_there_is_no_cors(tiny_models: ModelSet) -> None:
    with serve(FakeEngine(tiny_models)) as live:
        headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert live.http.options("/v1/completions", headers=headers).status_code == 405
        assert "access-control-allow-origin" not in live.http.get("/v1/models", headers=headers).headers


# TLS -------------------------------------------------------------------------------------------------------------


def test_tls(tiny_models: ModelSet, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {certificate} "
        "-days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    config = ServerConfig(tls_certificate=certificate, tls_key=key)
    check_tls(config)
    with serve(FakeEngine(tiny_models), config) as live:
        url = live.url.replace("http://", "https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{url}/v1/models", verify=trust).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/v1/models")
        with pytest.raises(httpx.TransportError):
            live.http.get("/v1/models")  # in plain
    with pytest.raises(StartupError, match="cannot be used"):
        check_tls(ServerConfig(tls_certificate=key, tls_key=key))
    with pytest.raises(ValueError, match="go together"):
        ServerConfig(tls_key=key)
