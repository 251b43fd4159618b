"""SIGTERM: nobody new, nobody cut off before the time is over, everybody told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxyserve.config import ServerConfig
from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.submission import Submission
from proxyserve.models.model_set import ModelSet
from proxyserve.types import OutputEvent
from tests.api.fakes import FakeEngine, last, token
from tests.api.live import Live, assert_idle, serve, wait_until
from tests.tiny import TinyFamily

BODY = {"model": "atlas+qa", "prompt": "The quick", "ignore_eos": True, "max_tokens": 200}


class Background(threading.Thread):
    """One request whose answer is looked at later."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__()
        self._url = url
        self._body = body
        self.status = 0
        self.text = ""
        self.start()

    def run(self) -> None:
        response = httpx.post(f"{self._url}/v1/completions", json=self._body, timeout=30)
        self.status, self.text = response.status_code, response.text

    def result(self) -> tuple[int, str]:
        self.join(30)
        assert not self.is_alive()
        return self.status, self.text


def begin_drain(live: Live, *, choices: int) -> None:
    """Send the signal once that many choices are at work."""

    def at_work() -> bool:
        stats = live.engine.snapshot()
        return stats.running + stats.waiting >= choices

    wait_until(at_work)
    live.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: live.engine.state == "draining")


def test_running_streams_finish_and_new_work_is_refused(tiny_engine: AsyncEngine) -> None:
    with serve(tiny_engine) as live:
        body = {**BODY, "max_tokens": 100, "n": 8}
        running = [Background(live.url, **body, stream=stream) for stream in (True, False)]
        begin_drain(live, choices=16)
        assert live.engine.snapshot().waiting, "what waits in the queue is answered as well"
        ready = live.http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        refused = live.post("/v1/completions", **BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "not_ready"
        streamed, whole = (thread.result() for thread in running)
        assert streamed[1].endswith("data: [DONE]\n\n")
        assert json.loads(whole[1])["usage"]["completion_tokens"] == 800
        live.thread.join(10)
        assert not live.thread.is_alive()
    assert_idle(tiny_engine)


@pytest.mark.parametrize("hurry", [False, True], ids=["time-is-over", "second-signal"])
def test_what_is_left_gets_an_error(tiny_engine: AsyncEngine, hurry: bool) -> None:
    config = ServerConfig(drain_seconds=30.0 if hurry else 0.1)
    with serve(tiny_engine, config) as live:
        running = [Background(live.url, **BODY, n=16, stream=stream) for stream in (True, False)]
        begin_drain(live, choices=32)
        started = time.monotonic()
        if hurry:
            live.server.handle_exit(signal.SIGTERM, None)
        streamed, whole = (thread.result() for thread in running)
        assert streamed[0] == 200
        error = json.loads(streamed[1].strip().splitlines()[-1].removeprefix("data: "))["error"]
        assert "shutting down" in error["message"]
        assert whole[0] == 503
        assert "shutting down" in json.loads(whole[1])["error"]["message"]
        live.thread.join(10)
        assert not live.thread.is_alive()
        assert time.monotonic() - started < 8
    assert_idle(tiny_engine)


def test_answers_on_their_way_are_not_cut_off(tiny_models: ModelSet) -> None:
    """The engine is idle long before a slow reader has everything."""

    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        for _ in range(20):
            await asyncio.sleep(0.02)
            yield token(submissions[0], "so far")
        yield last(submissions[0])

    engine = FakeEngine(tiny_models, script)
    with serve(engine) as live:
        running = [Background(live.url, **BODY, stream=stream) for stream in (True, False)]
        wait_until(lambda: engine.open_streams == 2)
        live.server.handle_exit(signal.SIGTERM, None)
        streamed, whole = (thread.result() for thread in running)
    assert streamed[1].endswith("data: [DONE]\n\n")
    assert whole[0] == 200


def test_idle_server_stops_at_once(tiny_engine: AsyncEngine) -> None:
    with serve(tiny_engine) as live:
        started = time.monotonic()
        live.stop()
        assert time.monotonic() - started < 2


PROGRAM = """
import sys
from pathlib import Path
import torch
from proxyserve.api.server import run_server
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.family import ExpertSource, load_family

torch.set_num_threads(1)
base, tuned, untuned, port = sys.argv[1:]
models = load_family(Path(base), [ExpertSource("qa", Path(tuned), Path(untuned))], base_name="atlas")
run_server(AsyncEngine(Engine(models, EngineConfig(kv_memory=4 * 2**20))), ServerConfig(port=int(port)))
"""


def test_process_exits_with_zero(tiny_family: TinyFamily, repository: Path, free_port: int) -> None:
    """On SIGTERM, after the last answer; `tests/cli/test_cli.py` has SIGINT."""
    arguments = [tiny_family.base, tiny_family.experts["qa"], tiny_family.untuned, free_port]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{repository}:{repository / 'kernels'}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{free_port}"

        def is_ready() -> bool:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                return httpx.get(f"{url}/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, seconds=60)
        running = Background(url, **BODY, stream=True)
        wait_until(lambda: "num_requests_running 1" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert running.result()[1].endswith("data: [DONE]\n\n")
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate()
