"""Two hundred clients at once, of which many leave, abort, or read slowly: everybody gets an answer, a refusal that
says when to come back, or what they did themselves, and afterwards nothing is left of them.

PROXYSERVE_LOAD_SECONDS says for how long (`make load`: two minutes)."""

from __future__ import annotations

import asyncio
import gc
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import pytest

from tests.api.load_clients import Client, Outcome, Tally
from tests.api.test_keys import record, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads what the server holds from /proc"),
]

SECONDS = float(os.environ.get("PROXYSERVE_LOAD_SECONDS", "15"))

#: How many clients each key has: one floods the server, one has always something to ask, one is held to a rate.
CLIENTS = {"flood": 140, "ann": 40, "ben": 20}
KEYS = (
    record("flood", max_waiting_requests=40),
    record("ann"),
    record("ben", requests_per_minute=20, max_running=4),
    record("watch", role="monitor"),
)

#: Caps that so many clients reach, and KV memory that is short, so that choices are preempted.
OPTIONS = ("--max-batch", "16", "--kv-memory", "2MiB", "--max-waiting-requests", "55", "--log-format", "json")

START_SECONDS = 120.0
STOP_SECONDS = 60.0
IDLE_SECONDS = 60.0

#: Grows with what allocators keep and with caches that have a bound, whatever the duration.
MOST_GROWTH = 100 * 2**20
#: The pipes to the process that compiles grammars, which stays.
HELPER_FILES = 2
#: Threads that wait for the next blocking call end after a while: at most the event loop's pool of 40.
POOL_THREADS = 40


@dataclass(frozen=True)
class Server:
    """`proxyserve demo` in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def metric(self, name: str, *, label: str = "") -> float:
        """The sum of its samples, or of those that have `label`."""
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30) as client:
            text = client.get("/metrics", headers={"Authorization": "Bearer sk-watch"}).text
        samples = re.findall(rf"^({name}(?:{{.*}})?) (\S+)$", text, re.MULTILINE)
        assert samples, f"there is no metric {name}"
        return sum(float(value) for sample, value in samples if label in sample)


@dataclass(frozen=True)
class Held:
    """What the server's process has, its files without sockets; `resident` in bytes."""

    sockets: int
    files: int
    threads: int
    resident: int

    @classmethod
    def by(cls, server: Server) -> Held:
        folder = Path("/proc", str(server.process.pid))
        targets = []
        for entry in (folder / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                targets.append(str(entry.readlink()))
        sockets = sum(target.startswith("socket:") for target in targets)
        status = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", (folder / "status").read_text(), re.MULTILINE))
        return cls(sockets, len(targets) - sockets, int(status["Threads"]), 1024 * int(status["VmRSS"]))

    def __str__(self) -> str:
        return (
            f"{self.resident >> 20} MiB, {self.sockets} sockets, {self.files} files, {self.threads} threads"
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    log = tmp_path / "log"
    keys = write(tmp_path / "keys.yaml", *KEYS)
    command = [sys.executable, "-m", "proxyserve", "demo", "--port", str(port), "--api-key-file", str(keys)]
    # Settings of whoever runs the tests must not reach the server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, *OPTIONS], env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            server = Server(process, port, log)
            soon(lambda: is_ready(server), START_SECONDS)
            yield server
        finally:
            process.kill()


def is_ready(server: Server) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    try:
        return httpx.get(f"http://127.0.0.1:{server.port}/ready", timeout=30).status_code == 200
    except httpx.ConnectError:
        return False


def soon(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


@contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """Ask for /health four times a second, on a thread, and collect how many seconds each answer took."""
    seconds: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.25):
            started = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            healthy = answer.status == 200 and answer.read() != b""
            connection.close()
            seconds.append(time.perf_counter() - started if healthy else float("inf"))

    watcher = threading.Thread(target=watch, name="health-watch")
    watcher.start()
    try:
        yield seconds
    finally:
        over.set()
        watcher.join()


@contextmanager
def unmoved_heap() -> Iterator[None]:
    """A full garbage collection looks at all that the tests have imported, and meanwhile no client could read: it would
    be measured as the server's slowness."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def run_clients(server: Server, seconds: float) -> tuple[Tally, int]:
    """What became of all requests, and the server's resident bytes when half of the time was over."""
    tally = Tally()
    end = asyncio.get_running_loop().time() + seconds
    keys = [key for key, count in CLIENTS.items() for _ in range(count)]
    async with asyncio.TaskGroup() as tasks:
        for seed, key in enumerate(keys):
            tasks.create_task(Client(server.port, key, seed, tally).keep_asking(end))
        await asyncio.sleep(seconds / 2)
        middle = Held.by(server).resident
    return tally, middle


def test_a_crowd(server: Server) -> None:
    before = Held.by(server)
    started = time.monotonic()
    with unmoved_heap(), watched(server) as health:
        tally, middle = asyncio.run(run_clients(server, SECONDS))
    seconds = time.monotonic() - started
    tokens = {key: server.metric("proxyserve_key_tokens_total", label=f'key="{key}"') for key in CLIENTS}
    preemptions = server.metric("proxyserve_num_preemptions_total")
    print(f"\n{sum(tally.outcomes.values())} requests in {seconds:.0f} s:", tally)
    print(f"{server.metric('proxyserve_generation_tokens_total') / seconds:.0f} tokens/s generated,", end=" ")
    print(f"prompts and answers by key {tokens}, {preemptions:g} preemptions")
    print(f"/health: median {median(health):.3f} s, worst {max(health):.3f} s of {len(health)}")
    print(f"before {before}, middle {middle >> 20} MiB, after {Held.by(server)}")

    assert not tally.faults, "\n".join(tally.faults)
    soon(lambda: is_idle(server), IDLE_SECONDS)
    soon(lambda: Held.by(server).sockets <= before.sockets, IDLE_SECONDS)
    soon(lambda: Held.by(server).files <= before.files + HELPER_FILES, IDLE_SECONDS)
    soon(lambda: Held.by(server).threads <= before.threads + POOL_THREADS, IDLE_SECONDS)
    assert Held.by(server).resident - middle < MOST_GROWTH
    assert max(health) < 10.0
    # Every line is a record; what is none, a traceback that nobody caught, is an error as well.
    lines = server.log.read_text().splitlines()
    errors = [line for line in lines if not line.startswith('{"time": ') or '"level": "error"' in line]
    assert errors == []

    # It was what it says: all of this happened.
    assert all(tally.of(outcome) for outcome in set(Outcome) - {Outcome.CORNERED})
    assert {code for _, code in tally.refusals} == {"queue_full", "key_limit", "rate_limit"}
    assert preemptions > 0
    # Who has always something to ask gets as much as who floods the server, less what it misses by being refused: the
    # caps leave it few places in the queue.
    assert tokens["ann"] > 0.35 * tokens["flood"]

    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(STOP_SECONDS) == 0, server.log.read_text()


def is_idle(server: Server) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "waiting_tokens", "kv_blocks_in_use")
    return is_ready(server) and all(server.metric(f"proxyserve_{name}") == 0 for name in names)
