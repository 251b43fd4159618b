"""The nginx example: a real nginx in front of a real server whose engine does what the test says, and when."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxyserve.config import Limits, ServerConfig
from proxyserve.engine.submission import Submission
from proxyserve.errors import QueueFull
from proxyserve.models.model_set import ModelSet
from proxyserve.types import OutputEvent
from tests.api.fakes import FakeEngine, last, token
from tests.api.live import Live, serve, wait_until
from tests.clients.conftest import free_port
from tests.deploy.nginx_server import NAME, Nginx, configure, run_nginx
from tests.tools import need

BODY = {"model": "atlas+qa", "prompt": "Hi"}
PATH = "/v1/completions"
JSON = {"content-type": "application/json"}


class Steps:
    """An engine's answer of which the test lets out one token at a time."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)

    def allow(self) -> None:
        self._allowed.release()

    async def script(self, submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        for number in range(5):
            while not self._allowed.acquire(blocking=False):  # noqa: ASYNC110  another thread says when
                await asyncio.sleep(0.002)
            if number < 4:
                yield token(submissions[0], f"piece{number} ")
        yield last(submissions[0], "end", tokens=5)


@pytest.fixture(scope="module")
def engine(tiny_models: ModelSet) -> FakeEngine:
    return FakeEngine(tiny_models)


@pytest.fixture(scope="module")
def behind(engine: FakeEngine) -> Iterator[Live]:
    # Without keys it answers to no name but this machine's own and those of origins.
    with serve(engine, ServerConfig(cors_origins=(f"https://{NAME}",))) as live:
        yield live


@pytest.fixture(scope="module")
def example(repository: Path) -> Path:
    return repository / "deploy" / "nginx" / "proxyserve.conf"


@pytest.fixture(scope="module")
def nginx(behind: Live, example: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    port = free_port()
    main = configure(example, tmp_path_factory.mktemp("nginx"), port, behind.url.removeprefix("http://"))
    with run_nginx(main, port) as nginx:
        yield nginx


@contextmanager
def steps(engine: FakeEngine) -> Iterator[Steps]:
    """Afterwards nothing of the answer is left in the server."""
    answer = Steps()
    engine.script = answer.script
    yield answer
    wait_until(lambda: engine.open_streams == 0)


@contextmanager
def connect(nginx: Nginx, protocol: str) -> Iterator[ssl.SSLSocket]:
    trust = ssl.create_default_context(cafile=str(nginx.certificate))
    trust.set_alpn_protocols([protocol])
    with (
        socket.create_connection(nginx.address, timeout=20) as plain,
        trust.wrap_socket(plain, server_hostname=NAME) as connection,
    ):
        yield connection


def pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line[6:])["choices"][0]["text"]


def test_nginx_accepts_it_without_a_word(example: Path, tmp_path: Path) -> None:
    main = configure(example, tmp_path, 8443, "127.0.0.1:8000")
    command = [need("nginx"), "-t", "-e", "stderr", "-c", main]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr


@pytest.mark.parametrize("accept", ["identity", "gzip"])
def test_tokens_come_one_by_one(nginx: Nginx, engine: FakeEngine, accept: str) -> None:
    """The second token does not exist before the first has arrived: a proxy that collects anything never ends."""
    with steps(engine) as answer, nginx.client() as client:
        answer.allow()
        headers = {"accept-encoding": accept}
        with client.stream("POST", PATH, json={**BODY, "stream": True}, headers=headers) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert "content-encoding" not in response.headers
            assert response.headers["strict-transport-security"]
            seen = []
            for piece in pieces(response.iter_lines()):
                if piece:
                    seen.append(piece)
                    answer.allow()
    assert seen == ["piece0 ", "piece1 ", "piece2 ", "piece3 ", "end"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_is_gone_for_the_server_too(
    nginx: Nginx, engine: FakeEngine, stream: bool
) -> None:
    """`steps` waits until the server has closed the answer, which nobody lets out any further."""
    content = json.dumps({**BODY, "stream": stream}).encode()
    headers = f"Host: {NAME}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    head = f"POST {PATH} HTTP/1.1\r\n{headers}".encode()
    with steps(engine) as answer, connect(nginx, "http/1.1") as connection:
        connection.sendall(head + content)
        wait_until(lambda: engine.open_streams == 1)
        if stream:
            answer.allow()
            assert connection.recv(64).startswith(b"HTTP/1.1 200")


def test_refusals_pass_through(nginx: Nginx, engine: FakeEngine) -> None:
    engine.refusal = QueueFull("too much", retry_after=7)
    try:
        with nginx.client() as client:
            response = client.post(PATH, json=BODY)
    finally:
        engine.refusal = None
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("path", ["/admin", "/admin/v1/experts", "/metrics", "/load", "/metrics/"])
def test_what_is_for_operators_is_not_there(nginx: Nginx, behind: Live, path: str) -> None:
    with nginx.client() as client:
        response = client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "route_not_found"
        assert "x-request-id" not in response.headers, "the server was asked"
        for written in (path.replace("/", "//", 1), path.replace("m", "%6d", 1), f"/v1/..{path}"):
            with connect(nginx, "http/1.1") as connection:
                connection.sendall(f"GET {written} HTTP/1.0\r\nHost: {NAME}\r\n\r\n".encode())
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 404"), written
            assert b"x-request-id" not in answer.lower(), f"the server was asked for {written}"
    assert behind.http.get("/metrics").status_code == 200, "the server itself has it"


def test_request_ids(nginx: Nginx) -> None:
    with nginx.client() as client:
        own = client.get("/health", headers={"x-request-id": "mine-1"})
        made = client.get("/health")
    assert own.headers["x-request-id"] == "mine-1"
    assert len(made.headers["x-request-id"]) == 32, "nginx makes 32 hexadecimal digits"
    wait_until(lambda: made.headers["x-request-id"] in nginx.access_log.read_text())
    assert "id=mine-1" in nginx.access_log.read_text()


def test_both_take_bodies_of_the_same_size(nginx: Nginx, behind: Live) -> None:
    largest = Limits().max_body_bytes
    with nginx.client() as client:
        for size in (largest, largest + 1):
            body = b'{"model": "atlas", "prompt": ""}'.ljust(size)
            answers = [http.post(PATH, content=body, headers=JSON) for http in (client, behind.http)]
            codes = [answer.json()["error"]["code"] for answer in answers]
            assert answers[0].status_code == answers[1].status_code == (400 if size == largest else 413)
            assert codes[0] == codes[1]


def test_http2_is_spoken_and_plain_http_is_not(nginx: Nginx) -> None:
    with connect(nginx, "h2") as connection:
        assert connection.selected_alpn_protocol() == "h2"
        assert connection.version() == "TLSv1.3"
    with socket.create_connection(nginx.address, timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert plain.recv(64).startswith(b"HTTP/1.1 400")


def test_a_server_that_is_not_there_is_a_503(example: Path, tmp_path: Path) -> None:
    port = free_port()
    main = configure(example, tmp_path, port, f"127.0.0.1:{free_port()}")
    with run_nginx(main, port) as alone, alone.client() as client:
        response = client.post(PATH, json=BODY)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "not_ready"
