"""Servers as processes: started, found ready, stopped while others have their turn, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter, sleep

import httpx

from benchmarks.contestants import Server
from proxyserve.bench.load.drive import Target

#: For every server: one thread, nothing from the network, nothing of this process's own paths.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_PATIENCE = 10.0


class NotStartedError(Exception):
    """A server that ended or did not answer; says why in one line."""


class Running:
    """A server of which this process is the parent. It is in a group of its own, which signals go to."""

    def __init__(self, server: Server, log: Path, cores: Sequence[int] | None = None) -> None:
        self.server = server
        self._port = _free_port()
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                _on_cores(server.command_at(self._port), cores),
                env=environment_of(server, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def target(self) -> Target:
        return self.server.target(self._port)

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises NotStartedError."""
        until = perf_counter() + seconds
        while perf_counter() < until:
            if (status := self._process.poll()) is not None:
                raise NotStartedError(f"ended with status {status}: {self._last_words()}")
            try:
                if httpx.get(f"{self.target.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            sleep(0.5)
        raise NotStartedError(f"not ready after {seconds:.0f} s: {self._last_words()}")

    def pause(self) -> None:
        """Let it take no time until `turn`."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run meanwhile."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def stop(self) -> None:
        """End it and everything that it started."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        wrong = [line for line in lines if "Error" in line or "error" in line]
        return (wrong or lines or ["it said nothing"])[-1].strip()[:200]


def environment_of(server: Server, own: Mapping[str, str]) -> dict[str, str]:
    """Peers do not see where this process's Python looks for modules: they have their own versions."""
    ours = server.name.startswith("proxyserve")
    kept = {name: value for name, value in own.items() if ours or name != "PYTHONPATH"}
    return {**kept, **_ENVIRONMENT, **server.environment}


def _on_cores(command: list[str], cores: Sequence[int] | None) -> list[str]:
    if cores is None:
        return command
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
