"""A real server on a free port, in a thread of the test process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from proxyserve.api.app import create_app
from proxyserve.api.server import DrainingServer, listen
from proxyserve.config import ServerConfig
from proxyserve.engine.loop import AsyncEngine, EngineStats
from proxyserve.experts.manager import ExpertManager

_PATIENCE = 20.0


@dataclass(frozen=True)
class Live:
    """`http` talks to the server; `stop` asks it to drain and waits for its thread."""

    engine: Any
    url: str
    http: httpx.Client
    server: DrainingServer
    thread: threading.Thread

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The data of all events; checks that `[DONE]` is the last and takes it away."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            data = [
                line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")
            ]
        assert data[-1] == "[DONE]", data
        return [json.loads(entry) for entry in data[:-1]]

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The data of all events of a stream of named events; checks the names."""
        response = self.http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        return named_events(response.text)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(_PATIENCE)
        assert not self.thread.is_alive(), "the server does not stop"


def named_events(stream: str) -> list[dict[str, Any]]:
    """The data of the events, each of which has its own type as its name."""
    events: list[dict[str, Any]] = []
    for frame in stream.strip().split("\n\n"):
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@contextmanager
def serve(
    engine: Any, config: ServerConfig | None = None, experts: ExpertManager | None = None
) -> Iterator[Live]:
    """Serve `engine`, and the control plane of `experts`; the caller starts and closes both."""
    config = config or ServerConfig()
    app = create_app(engine, config, experts)
    with listen("127.0.0.1", 0) as listener:
        server = DrainingServer(app)
        thread = threading.Thread(target=server.run, args=([listener],), name="test-server")
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.start()
        wait_until(lambda: server.started)
        with httpx.Client(base_url=url, timeout=_PATIENCE) as http:
            live = Live(engine, url, http, server, thread)
            try:
                yield live
            finally:
                live.stop()


def wait_until(condition: Any, *, seconds: float = _PATIENCE) -> None:
    """For things that another thread does soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def is_idle(stats: EngineStats) -> bool:
    return stats.running == stats.waiting == 0 and all(
        pool.blocks_in_use == 0 for pool in stats.pools.values()
    )


def assert_idle(engine: AsyncEngine) -> None:
    """Every choice has ended and every block is back."""
    wait_until(lambda: is_idle(engine.snapshot()), seconds=5.0)
