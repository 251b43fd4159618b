"""Two server processes: the demo as the other server, and one that has its base there and the demo's experts here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from proxyserve.cli import options, serve
from proxyserve.cli.main import app
from proxyserve.demo.family import family_paths
from proxyserve.models.upstream import RemoteSource

KEY = "sk-between-the-two"
FAMILY = family_paths()


# Options --------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bases that `serve` would have started with."""
    bases: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda base, *_, **__: bases.append(base))
    return bases


def test_options_of_a_remote_base(started: list[Any], tmp_path: Path) -> None:
    key, config = tmp_path / "key", tmp_path / "server.yaml"
    key.write_text(f"{KEY}\n")
    config.write_text(f"base-tokenizer: {tmp_path}\nbase_top_k: 5\nbase-timeout: 9\n")
    result = CliRunner().invoke(
        app,
        ["serve", "http://host:8001/v1/", "--config", str(config), "--base-api-key-file", str(key)],
        env={"PROXYSERVE_BASE_TOP_K": "7", "PROXYSERVE_BASE_MODEL": "big"},
    )
    assert result.exit_code == 0, result.output
    assert started == [
        RemoteSource("http://host:8001/v1", tmp_path, model="big", api_key=KEY, top_k=7, timeout=9.0)
    ]
    assert KEY not in repr(started)
    assert CliRunner().invoke(app, ["serve", "https://host/v1", "--base-tokenizer", "t"]).exit_code == 0
    assert started[1].top_k == 20 and started[1].timeout == 60.0 and started[1].context is None


def test_options_that_make_no_sense(started: list[Any], tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["serve", "http://host:8001/v1"])
    assert refused.exit_code == 2 and "--base-tokenizer" in refused.output
    refused = CliRunner().invoke(app, ["serve", "/folder", "--base-top-k", "5"])
    assert refused.exit_code == 2 and "--base-top-k" in refused.output
    for text in ("", "two keys", f"{KEY}\nanother"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(typer.BadParameter) as error:
            options._first_line(tmp_path / "key")
        assert KEY not in str(error.value)
    assert not started


# Two processes --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A `proxyserve` process on `port` and a client with its key."""

    def __init__(self, log: Path, port: int, *arguments: str) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxyserve", *arguments, "--port", str(port)],
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.http.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ask(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"temperature": 0, "max_tokens": 12, **body})

    def end(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.end()


def demo(folder: Path, port: int) -> Server:
    return Server(
        folder / f"demo-{time.monotonic()}.log", port, "demo", "--api-key-file", str(folder / "key")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote")
    (path / "key").write_text(KEY)
    return path


def remote(folder: Path, port: int, upstream: str, *arguments: str) -> Server:
    experts = [f"--expert={name}={tuned},{FAMILY.untuned}" for name, tuned in FAMILY.experts.items()]
    return Server(
        folder / "remote.log",
        port,
        *("serve", upstream, "--base-tokenizer", str(FAMILY.base)),
        *("--base-api-key-file", str(folder / "key"), "--threads", "1", "--kv-memory", "64MiB"),
        *("--dtype", "float32"),
        *experts,
        *arguments,
    )


PROMPTS = (
    "Task: Where was Kustin born?\nReply:",
    "Question: Who lives in the north?\nAnswer:",
    "name: Ada Lovelace\ncity:",
    "The river flows",
    "3 + 4 =",
)


@pytest.mark.slow
def test_two_servers_and_one(folder: Path) -> None:
    """The same answers as from one server that has it all; an outage ends what it hits and nothing else."""
    upstream_port = free_port()
    url = f"http://127.0.0.1:{upstream_port}/v1"
    with running(demo(folder, upstream_port)) as upstream:
        upstream.wait()
        with running(remote(folder, free_port(), url, "--base-timeout", "5")) as server:
            server.wait()
            compare(upstream, server)
            break_and_mend(folder, upstream, upstream_port, server)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            log = server.log.read_text()
            assert "remote" in log and url in log and "20 likeliest tokens, named by id" in log
            assert KEY not in log


def compare(upstream: Server, server: Server) -> None:
    experts = list(FAMILY.experts)
    certified = tokens = 0
    for model in ("atlas", f"atlas+{experts[0]}", f"atlas+{experts[1]}:0.6"):
        for prompt in PROMPTS:
            mine, whole = (one.ask(model=model, prompt=prompt) for one in (server, upstream))
            assert mine.status_code == 200, mine.text
            got, expected = mine.json(), whole.json()
            fusion = got["fusion"]
            length = got["usage"]["completion_tokens"]
            assert 0 <= fusion["certified"] <= length and 0.0 <= fusion["mean_unseen_mass"] < 1.0
            assert "certified" not in expected.get("fusion", {})
            if model == "atlas":
                assert fusion["certified"] == length
            if fusion["certified"] == length:  # else a token may differ, and all after it
                assert got["choices"][0]["text"] == expected["choices"][0]["text"], (model, prompt)
                assert got["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
            certified += fusion["certified"]
            tokens += length
    assert certified > 0.7 * tokens, f"only {certified} of {tokens} tokens are certified"
    # Streamed and in a batch, too.
    answer = server.ask(model=f"atlas+{experts[0]}", prompt=list(PROMPTS), max_tokens=4).json()
    assert answer["fusion"]["certified"] <= answer["usage"]["completion_tokens"]
    chat = {"model": f"atlas+{experts[0]}", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert server.http.post("/v1/chat/completions", json=chat).json()["fusion"]["certified"] >= 0
    refused = server.ask(model="atlas", prompt="a", fusion={"rule": "dynamic", "experts": {experts[0]: 1}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "fusion.rule"


def break_and_mend(folder: Path, upstream: Server, port: int, server: Server) -> None:
    """The other server dies while a text is being written, stays away for a while, and comes back."""
    body = {"model": "atlas", "prompt": PROMPTS[0], "max_tokens": 150, "temperature": 1.0, "ignore_eos": True}
    lines: list[str] = []
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            lines += [line] if line.startswith("data: ") else []
            if len(lines) == 5 and upstream.process.poll() is None:
                upstream.process.kill()
                upstream.process.wait()
    assert "cannot be reached" in lines[-1] or "cannot be reached" in lines[-2], lines[-2:]
    failed = server.ask(model="atlas", prompt="Hello")
    assert failed.status_code >= 500 and "base's server" in failed.json()["error"]["message"]
    local = server.ask(
        model="atlas", prompt="Hello", fusion={"rule": "contrast", "experts": {next(iter(FAMILY.experts)): 1}}
    )
    assert local.status_code == 200
    assert server.http.get("/ready").status_code == 200
    with running(demo(folder, port)) as again:
        again.wait()
        assert server.ask(model="atlas", prompt="Hello").json()["fusion"]["certified"] > 0


def test_start_without_the_other_server(folder: Path) -> None:
    with running(remote(folder, 0, f"http://127.0.0.1:{free_port()}/v1", "--base-timeout", "1")) as server:
        assert server.process.wait(60) == 1
        log = server.log.read_text()
        assert "cannot be reached" in log and "Is it running" in log
        assert "Traceback" not in log and KEY not in log
