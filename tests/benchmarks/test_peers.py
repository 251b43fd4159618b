"""Proxyserve beside other servers: how they are started and asked, and what the table says of those that do not start.
No peer is installed here; a few lines of Python stand for them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from benchmarks import compare as comparing
from benchmarks import peers
from benchmarks.compare import Settings, compare
from benchmarks.contestants import LOOP, Contestant, Models, Server, contestants, gguf_of, servers, write_gguf
from benchmarks.processes import NotStartedError, Running, environment_of
from benchmarks.table import best_peer, markdown
from proxyserve.bench.agreeing import build_agreeing_family
from proxyserve.bench.models import ModelShape
from proxyserve.errors import ProxyserveError

TINY = ModelShape(hidden=192, layers=2, heads=4, kv_heads=2, intermediate=96, tied=False)

# A server without a model: nothing of its answers is right but the number of tokens.
STAND_IN = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, new = body["prompt"], body["max_tokens"]
        usage = {"prompt_tokens": len(prompt.split() if isinstance(prompt, str) else prompt), "completion_tokens": new}
        choice = {"index": 0, "text": " w2" * new, "finish_reason": "length"}
        answer = json.dumps({"choices": [choice], "usage": usage})
        if body.get("stream"):
            answer = f"data: {answer}\\n\\ndata: [DONE]\\n\\n"
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *arguments):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "base", tmp_path / "tuned", tmp_path / "untuned", "bfloat16", 128)


# Command lines -------------------------------------------------------------------------------------------------------


def test_everybody_gets_the_model_the_dtype_and_one_thread(models: Models, tmp_path: Path) -> None:
    found = {server.name: server for server in servers(models, tmp_path)}
    assert set(found) == {"proxyserve", "proxyserve, drafts", "vLLM", "llama.cpp", "transformers serve"}
    for name, server in found.items():
        command = server.command_at(8123)
        assert command[-4:] == ["--host", "127.0.0.1", "--port", "8123"]
        model = gguf_of(models) if name == "llama.cpp" else models.base
        assert str(model) in command
        assert environment_of(server, {})["OMP_NUM_THREADS"] == "1"
        if name != "llama.cpp":  # whose file is written in it
            assert command[command.index("--dtype") + 1] == "bfloat16"
    llama = found["llama.cpp"].command
    assert [llama[llama.index(option) + 1] for option in ("--threads", "--threads-batch")] == ["1", "1"]
    # Each of its requests has a part of the context of its own.
    assert (
        int(llama[llama.index("--ctx-size") + 1])
        == int(llama[llama.index("--parallel") + 1]) * models.context
    )
    speculation = {
        name: server.command[server.command.index("--speculate") + 1]
        for name, server in found.items()
        if name.startswith("proxyserve")
    }
    assert speculation == {"proxyserve": "off", "proxyserve, drafts": "auto"}


def test_our_options_exist() -> None:
    from proxyserve.cli.main import app

    models = Models(Path("b"), Path("t"), Path("u"), "float32", 128)
    known = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    (ours, _) = [server for server in servers(models, Path()) if server.name.startswith("proxyserve")]
    options = [part for part in ours.command if part.startswith("--")]
    assert options
    assert [option for option in options if option not in known] == []


def test_every_contestant_has_its_server(models: Models, tmp_path: Path) -> None:
    names = {server.name for server in servers(models, tmp_path)}
    assert {one.server for one in contestants(models)} - {LOOP.server} == names
    assert all(
        one.peer != one.server.startswith("proxyserve") for one in contestants(models) if one is not LOOP
    )


def test_peers_see_nothing_of_our_modules() -> None:
    own = {"PYTHONPATH": "/here", "HOME": "/home"}
    assert "PYTHONPATH" not in environment_of(Server("vLLM", ()), own)
    assert environment_of(Server("proxyserve", ()), own)["PYTHONPATH"] == "/here"


def test_what_is_not_installed_is_said_without_a_path(models: Models, tmp_path: Path) -> None:
    missing = {server.name: server.missing for server in servers(models, tmp_path)}
    assert missing["vLLM"] == "not installed: no vllm/bin/python"
    assert missing["llama.cpp"] == "not installed: no llama/bin/llama-server"
    assert missing["proxyserve"] is None
    failure = write_gguf(models, tmp_path)
    assert failure is not None
    assert "GGUF" in failure


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> typer.Typer:
    """The command line, which measures nothing: it fails with the settings."""

    def stop(settings: Settings, **ignored: object) -> None:
        raise ProxyserveError(f"{settings.clients} {settings.rounds}")

    monkeypatch.setattr(peers, "compare", stop)
    monkeypatch.setattr(peers, "mkdtemp", lambda prefix: str(tmp_path))
    app = typer.Typer()
    app.command()(peers.command)
    return app


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "(1, 16, 32) 2"),
        (["--quick"], "(1, 16) 1"),
        (["--quick", "--rounds", "3", "--clients", "4"], "(4,) 3"),
        (["--clients", "1,x"], "'1,x' for --clients: write numbers from 1 to 64"),
        (["--size", "7B"], "'7B' for --size: there are 68M, 300M."),
    ],
)
def test_what_is_measured(command: typer.Typer, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, ProxyserveError)
    assert said in str(result.exception)


# Processes -----------------------------------------------------------------------------------------------------------


def test_a_server_runs_in_its_turns_only(tmp_path: Path) -> None:
    running = Running(Server("vLLM", (sys.executable, "-c", STAND_IN)), tmp_path / "log")
    try:
        running.wait(30.0)
        running.pause()
        process = running._process.pid
        assert os.waitid(os.P_PID, process, os.WSTOPPED).si_status == signal.SIGSTOP  # type: ignore[union-attr]
        with running.turn():
            assert os.waitid(os.P_PID, process, os.WCONTINUED) is not None
            running.wait(30.0)
        assert os.waitid(os.P_PID, process, os.WSTOPPED) is not None
    finally:
        running.stop()
    assert running._process.returncode is not None


def test_what_a_server_said_last_is_why_it_did_not_start(tmp_path: Path) -> None:
    program = "print('begins'); raise ValueError('no such model')"
    running = Running(Server("vLLM", (sys.executable, "-c", program)), tmp_path / "log")
    with pytest.raises(NotStartedError, match="status 1: ValueError: no such model"):
        running.wait(30.0)
    running.stop()


# A whole run ---------------------------------------------------------------------------------------------------------


def test_a_run_reports_those_that_do_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One server that works, one that is not installed, one that ends, one that is no program, and the loop."""
    stand_in = Server("works", (sys.executable, "-c", STAND_IN), texts=True)
    ends = Server("ends", (sys.executable, "-c", "raise SystemExit('out of memory')"), quiet=True)
    absent = Server("absent", ("nothing",), missing="not installed: no absent/bin/server")
    no_program = Server("no program", (str(tmp_path / "nothing"),))
    monkeypatch.setattr(comparing, "servers", lambda models, peers: [stand_in, absent, no_program, ends])
    monkeypatch.setattr(
        comparing,
        "contestants",
        lambda models: [
            *(
                Contestant(name, name, "base", peer=True)
                for name in ("works", "absent", "no program", "ends")
            ),
            LOOP,
        ],
    )
    monkeypatch.setattr(comparing, "SIZES", {"tiny": (TINY, TINY)})
    monkeypatch.setattr(comparing, "build_agreeing_family", partial(build_agreeing_family, vocabulary=400))
    settings = Settings(tmp_path, size="tiny", clients=(1, 2), rounds=2, prompt=5, new=4)
    messages: list[str] = []
    threads = torch.get_num_threads()
    try:
        result = compare(settings, logs=tmp_path, progress=messages.append).as_dict()
    finally:
        torch.set_num_threads(threads)
    json.dumps(result, allow_nan=False)
    assert str(tmp_path) not in json.dumps(result["settings"])
    found = {one["name"]: one for one in result["contestants"]}
    assert found["works"]["failure"] is None
    assert [load["answered"] for load in found["works"]["loads"]] == [4, 4]
    assert not any(load["errors"] or load["doubts"] for load in found["works"]["loads"])
    assert found["works"]["right"] == (0, 32)
    assert found[LOOP.name]["right"] == (32, 32)
    assert found["absent"]["failure"] == "not installed: no absent/bin/server"
    assert found["ends"]["failure"] == "ended with status 1: out of memory"
    assert "could not be started" in found["no program"]["failure"]
    # Rounds are interleaved: everybody had a turn at a load before anybody had the next one.
    turns = [message for message in messages if message.startswith("round")]
    assert [turn.split(":")[1].strip() for turn in turns] == ["works", LOOP.name] * 4
    table = markdown(result)
    assert table.count("| works |") == 2
    assert table.count("| absent | not measured |") == 2
    assert "- ends: ended with status 1: out of memory" in table


# The table -----------------------------------------------------------------------------------------------------------


def recorded(name: str, speed: float | None, *, fused: bool = False, peer: bool = False) -> dict[str, Any]:
    """A contestant with one load; without speed, one that failed."""
    figure = {"median": speed, "low": speed, "high": speed}
    load = {
        "tokens_per_second": figure,
        "seconds": {"ttft": {"p50": {"median": 0.25}}, "per_token": {"p50": {"median": 0.0125}}},
        "errors": {"cut": {"count": 3, "first": ""}} if name == "slow" else {},
        "doubts": {},
    }
    return {
        "name": name,
        "fused": fused,
        "peer": peer,
        "failure": "not installed" if speed is None else None,
        "right": None if speed is None else [32, 32],
        "loads": [] if speed is None else [load],
    }


def comparison(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": {
            "size": "68M",
            "dtype": "float32",
            "share": 0.8,
            "prompt": 64,
            "new": 64,
            "rounds": 2,
            "clients": [16],
        },
        "began": "2026-11-21T15:00:00+00:00",
        "machine": {"cpu": "a CPU", "cores": 2, "instructions": ["avx2"], "load_average": 0.5},
        "versions": {"proxyserve": "1.0"},
        "contestants": list(entries),
    }


def test_everybody_is_held_against_the_best_peer() -> None:
    result = comparison(
        recorded("ours", 300.0, fused=True),
        recorded("slow", 100.0, peer=True),
        recorded("fast", 200.0, peer=True),
        recorded("gone", None, peer=True),
    )
    assert best_peer(result, 0) == 200.0
    table = markdown(result)
    assert "| ours | 300 | 300-300 | **1.50x** | 250 | 12.5 | 32 of 32 |" in table
    assert "| slow | 100 | 100-100 | 0.50x |" in table
    assert "| gone | not measured |" in table
    assert "- gone: not installed" in table
    assert "- slow, 16 clients: 3 x cut" in table


def test_without_peers_there_are_no_ratios() -> None:
    result = comparison(recorded("ours", 300.0, fused=True), recorded("gone", None, peer=True))
    assert best_peer(result, 0) is None
    assert "| ours | 300 | 300-300 |  | 250 |" in markdown(result)


# Model files ---------------------------------------------------------------------------------------------------------


def test_words_are_whole_in_text_prompts(tmp_path: Path) -> None:
    """Special words begin others: w1 and w15."""
    family = build_agreeing_family(tmp_path, [], base=TINY, vocabulary=400)
    tokenizer = Tokenizer.from_file(str(family.base / "tokenizer.json"))
    ids = list(range(400))
    assert tokenizer.encode(" ".join(f"w{index}" for index in ids)).ids == ids


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_files_hold_every_weight(tmp_path: Path, dtype: str) -> None:
    import gguf

    from benchmarks.gguf_file import write_gguf as write

    family = build_agreeing_family(tmp_path, [], base=TINY, vocabulary=400)
    write(family.base, tmp_path / "base.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "base.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert len(names) == 3 + 9 * TINY.layers
    assert {tensor.tensor_type.name for tensor in reader.tensors if tensor.name == "output.weight"} == {
        {"float32": "F32", "bfloat16": "BF16"}[dtype]
    }


def test_the_installer_is_a_script_without_machine_paths(repository: Path) -> None:
    script = repository / "benchmarks" / "setup_peers.sh"
    assert os.access(script, os.X_OK)
    if (bash := shutil.which("bash")) is not None:
        subprocess.run([bash, "-n", str(script)], check=True)
    text = script.read_text()
    assert "http" not in text
    assert "/home" not in text
