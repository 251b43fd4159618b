"""Servers whose base is in two processes: experts change, and processes end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from proxyserve.api.errors import StartupError
from proxyserve.cli.opening import open_server
from proxyserve.cli.settings import ExpertSettings, ServeSettings
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.demo.family import family_paths
from proxyserve.engine.sharded.runner import ShardedRunner
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.upstream import RemoteSource
from proxyserve.types import FinishReason
from tests.api.live import wait_until
from tests.experts.contents import build_world
from tests.experts.kinds import base_kind, proxy_kind
from tests.experts.swapping import begin, check_answer, open_world

PROMPT = (5, 17, 200, 33, 9, 120, 64)


async def test_experts_change_and_the_base_cannot(tmp_path: Path) -> None:
    """Whole models and LoRA rows beside a divided base, swapped while a request runs; an adapter over the base is
    refused; then the other process dies while nothing runs."""
    world = build_world(tmp_path)
    with open_world(world, tensor_parallel=2) as server:
        qa = proxy_kind({"qa": 1.0}, PROMPT)
        await server.put("qa", "first")
        running = await begin(server, qa, "long")
        await server.put("qa", "lora")
        await check_answer(server, qa, 2)
        assert (await running.all())[0].last.finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]
        alone = base_kind(PROMPT)
        [answer] = await server.ask(alone, "alone")
        assert answer.tokens == server.expected(alone, answer)
        over = ExpertSpec(Source(path=str(world.root / "lora-wide"), of="atlas"), None)
        status = await server.put("wide", over)
        assert status.last_error is not None and "there can be no adapter over it" in status.last_error

        base = server.plain.runners[server.plain.models.base.key]
        assert isinstance(base, ShardedRunner)
        os.kill(base.ranks.pids[0], signal.SIGKILL)
        wait_until(lambda: server.engine.state == "dead")
        assert server.engine.lost
        assert server.engine.failure is not None and "has ended with code -9" in server.engine.failure


def test_a_base_on_another_server_is_refused() -> None:
    engine = EngineConfig(tensor_parallel=2, device="cpu")
    settings = ServeSettings(engine, ServerConfig(), FusionPolicy(), {}, {}, ExpertSettings())
    remote = RemoteSource("http://127.0.0.1:1/v1", family_paths().base)
    with (
        pytest.raises(StartupError, match="not for one on another server"),
        open_server(remote, [], settings, served_name=None, progress=lambda _: None),
    ):
        pass


@pytest.mark.slow
def test_the_command_serves_and_ends_with_a_part_of_its_base(tmp_path: Path) -> None:
    """Over HTTP; then the other process is killed in the midst of a stream."""
    log = tmp_path / "log"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = ["--port", str(port), "--device", "cpu", "--tensor-parallel", "2", "--speculate", "off"]
    with log.open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "proxyserve", "demo", *options],
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            _wait_until_ready(http, server, log)
            question = {"model": "atlas+qa", "prompt": "Question: What is 3 + 4?\nAnswer:", "temperature": 0}
            answer = http.post("/v1/completions", json={**question, "max_tokens": 8}).json()
            assert answer["usage"]["completion_tokens"] > 0
            assert "proxyserve_base_parts 2.0" in http.get("/metrics").text
            told = log.read_text()
            assert "in 2 parts (--tensor-parallel)" in told
            follower = int(told.split("rank 1 is process ")[1].split(";")[0])
            long = {**question, "max_tokens": 450, "ignore_eos": True, "stream": True}
            with http.stream("POST", "/v1/completions", json=long) as stream:
                lines = (line for line in stream.iter_lines() if line)
                next(lines)
                os.kill(follower, signal.SIGKILL)
                last = list(lines)[-1]
            assert "The server has lost a part of the base and ends." in last
        assert server.wait(30) == 1
        assert (
            f"rank 1 of the base (process {follower}) has ended with code -9. Start it again."
            in log.read_text()
        )
    finally:
        server.kill()
        server.wait()


def _wait_until_ready(http: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if http.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)


def test_a_follower_ends_with_the_process_that_it_follows(tmp_path: Path) -> None:
    """Killed, so that it can tell nobody; and while the follower waits for the others, where it hears of nothing."""
    # The shell is rank 0 here: it starts a follower, whose number it prints, and meets it nowhere.
    follow = (
        f"{sys.executable} -m proxyserve.engine.sharded 0 1 2 cpu {tmp_path / 'store'} 1 $$ & echo $!; wait"
    )
    rank0 = subprocess.Popen(["sh", "-c", follow], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rank0.stdout is not None
    follower = int(rank0.stdout.readline())
    status = Path(f"/proc/{follower}/status")
    try:
        wait_until(lambda: _ignores(status.read_text(), signal.SIGTERM), seconds=60)
    finally:
        rank0.kill()
        rank0.communicate()
    wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text())


def _ignores(status: str, number: int) -> bool:
    """What a process in which it has got so far does: it is past the imports, and has asked for the parent's death."""
    [ignored] = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(ignored, 16) & (1 << (number - 1)))
