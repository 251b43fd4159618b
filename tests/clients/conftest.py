"""A real server for the clients: `proxyserve demo` in a process of its own, or the one at PROXYSERVE_TEST_URL."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from proxyserve_client import ProxyServe
from tests.clients.node_packages import NodePackages, installed

START_SECONDS = 120
STOP_SECONDS = 60


@pytest.fixture(scope="session")
def live_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that is ready. One that was started here must end by itself on SIGTERM afterwards."""
    if url := os.environ.get("PROXYSERVE_TEST_URL"):
        yield url
        return
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    # Settings of whoever runs the tests must not reach the server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")}
    command = [sys.executable, "-m", "proxyserve", "demo", "--host", "127.0.0.1", "--port", str(port)]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as server,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server, log)
            yield url
            server.send_signal(signal.SIGTERM)
            assert server.wait(STOP_SECONDS) == 0, log.read_text()
        finally:
            server.kill()


@pytest.fixture(scope="session")
def openapi(live_url: str) -> bytes:
    """The server's OpenAPI document, which it takes a moment to make."""
    return httpx.get(f"{live_url}/openapi.json", timeout=60).content


@pytest.fixture(scope="session")
def node_packages(tmp_path_factory: pytest.TempPathFactory) -> NodePackages:
    """For all processes that run tests."""
    if shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed")
    own = tmp_path_factory.getbasetemp()
    return installed((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "node")


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    with ProxyServe(url) as client:
        for _ in range(START_SECONDS):
            if server.poll() is not None:
                break
            try:
                client.wait_until_ready(timeout=1)
            except TimeoutError:
                continue
            return
    pytest.fail(f"`proxyserve demo` did not become ready:\n{log.read_text()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
