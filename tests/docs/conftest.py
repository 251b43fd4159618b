"""One demo server for all pages, and `proxyserve` commands that start at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from proxyserve.demo.family import family_paths
from tests.clients.conftest import free_port
from tests.docs import forked

PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Commands:
    """`path` is a folder for the front of PATH."""

    path: Path

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                [str(self.path / "proxyserve"), *arguments], stdout=output, stderr=subprocess.STDOUT
            )


@dataclass(frozen=True, slots=True)
class Server:
    """`folder` is one that experts may come from, beside the demo family's."""

    url: str
    folder: Path


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("bin")
    address = folder / "socket"
    command = [sys.executable, forked.__file__, str(address)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment | {"PYTHONPATH": path}) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not address.exists():
                assert process.poll() is None, "the process of commands ended"
                assert time.monotonic() < deadline, "the process of commands did not start"
                time.sleep(0.05)
            (folder / "bin").mkdir()
            forked.install(folder / "bin", address)
            for name in ("python", "python3"):
                (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
                (folder / "bin" / name).chmod(0o755)
            yield Commands(folder / "bin")
        finally:
            process.kill()


@pytest.fixture(scope="session")
def server(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`proxyserve demo`, as the pages start it. It must end by itself on SIGTERM."""
    folder = tmp_path_factory.mktemp("pages")
    port = free_port()
    log = folder / "server.log"
    options = ["--port", str(port), "--state-dir", str(folder / "state")]
    for root in (family_paths().base.parent, folder):
        options += ["--expert-root", str(root)]
    process = commands.start("demo", *options, log=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while not _is_ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Server(url, folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        process.kill()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").is_success
    except httpx.TransportError:
        return False
