"""`proxyserve score`: given texts, and the answers of a live server."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from proxyserve.cli.explained import coloured, explained_table, totals
from proxyserve.cli.main import app
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.errors import ProxyserveError
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, serve
from tests.cli.output import said
from tests.tiny import TinyFamily


def entry(token: str, push: float, *, flip: bool = False) -> dict[str, Any]:
    return {
        "token": token,
        "fused": {"logprob": -1.0, "top": []},
        "lanes": {"base": {"logprob": -1.0 - push, "top": []}},
        "weights": {"qa": 1.0},
        "push": {"qa": push},
        "kl": 0.5,
        "flip": flip,
        "gated": False,
    }


def test_colours() -> None:
    up, more, down, still = (coloured(entry("x", push)) for push in (1.0, 3.0, -1.0, 0.0))
    assert "rgb(198,235,198)" in str(up.style) and "rgb(122,235,122)" in str(more.style)
    assert "rgb(235,198,198)" in str(down.style)
    assert not str(still.style)
    assert "underline" in str(coloured(entry("x", 0.0, flip=True)).style)


@pytest.mark.parametrize("token", ["[/INST]", "[red]"])
def test_tokens_are_no_markup(token: str) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(coloured(entry(token, 1.0)), explained_table([entry(token, 1.0)]))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(token) == 2


def test_totals() -> None:
    found = totals([entry("a", 1.0), entry("b", 1.0, flip=True)])
    assert found == {
        "tokens": 2,
        "logprob": -2.0,
        "perplexity": pytest.approx(math.e),
        "mean_kl": 0.5,
        "flips": 1,
    }
    assert totals([])["mean_kl"] is None


@pytest.fixture
def local(tiny_family: TinyFamily) -> list[str]:
    expert = f"qa={tiny_family.experts['qa']},{tiny_family.untuned}"
    return ["score", str(tiny_family.base), "--expert", expert, "--prompt", "The quick brown"]


def test_a_given_text(local: list[str], tiny_family: TinyFamily) -> None:
    fusion = json.dumps({"experts": {"qa": 2.0}})
    result = CliRunner().invoke(app, [*local, "--text", " fox jumps", "--fusion", fusion, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "".join(token["token"] for token in found["entries"]) == " fox jumps"
    for token in found["entries"]:
        delta = token["lanes"]["qa.tuned"]["logprob"] - token["lanes"]["qa.untuned"]["logprob"]
        assert token["push"]["qa"] == pytest.approx(2.0 * delta)
        assert len(token["fused"]["top"]) == 3
    assert found["logprob"] == pytest.approx(sum(token["fused"]["logprob"] for token in found["entries"]))
    base = tiny_family.base.name
    shown = CliRunner().invoke(app, [*local, "--text", " fox jumps", "--model", f"{base}+qa:2"])
    assert shown.exit_code == 0, shown.output
    assert " fox jumps" in shown.stdout and f"log-prob {found['logprob']:.3f}" in shown.stdout


@pytest.fixture(scope="module")
def live(tiny_models: ModelSet) -> Iterator[Live]:
    engine = AsyncEngine(Engine(tiny_models, EngineConfig(max_batch=4, max_batch_tokens=64, kv_memory=2**20)))
    engine.start()
    with serve(engine) as server:
        yield server
    engine.close()


def test_a_servers_answer(live: Live, tmp_path: Path) -> None:
    arguments = [
        "score",
        "--server",
        live.url,
        "--prompt",
        "The quick",
        "--model",
        "atlas+qa",
        "--max-tokens",
        "5",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    body = {"model": "atlas+qa", "prompt": "The quick", "max_tokens": 5, "temperature": 0, "logprobs": 0}
    direct = live.post("/v1/completions", **body).json()["choices"][0]
    assert [token["fused"]["logprob"] for token in found["entries"]] == pytest.approx(
        direct["logprobs"]["token_logprobs"], abs=1e-5
    )
    shown = CliRunner().invoke(app, [*arguments, "--fusion", '{"rule": "dynamic"}'])
    assert shown.exit_code == 0 and "push qa" in shown.stdout
    refused = CliRunner().invoke(app, [*arguments, "--fusion", '{"rule": "dynamite"}'])
    assert refused.exit_code == 1 and "the rules are" in str(refused.exception)


def test_refusals(live: Live, local: list[str]) -> None:
    for arguments, words in (
        (["score"], "either"),
        (["score", "--server", live.url, "--prompt", "a"], "--model"),
        (["score", "--server", live.url, "--model", "atlas"], "--prompt"),
        ([*local, "--text", "a", "--fusion", "["], "not JSON"),
        ([*local, "--text", "a", "--fusion", '{"explain": 2}'], "--top"),
        ([*local, "--text", ""], "empty"),
        ([*local, "--text", "a", "--max-tokens", "3"], "--max-tokens"),
        ([*local, "--server", live.url, "--model", "atlas"], "BASE"),
        (["score", "--server", live.url, "--device", "cpu"], "--device"),
        (["score", "--text", "a", "--expert", "qa=/nowhere"], "name BASE"),
        ([*local, "--text", "a", "--fusion", "{}", "--model", "x"], "not both"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and words in said(result), arguments
    away = CliRunner().invoke(
        app, ["score", "--server", "http://127.0.0.1:9", "--model", "a", "--prompt", "a"]
    )
    assert away.exit_code == 1 and "cannot be reached" in str(away.exception)


@pytest.mark.parametrize("event", [b'{"choices": [{"index": 0, "text": "x"}]}', b"no JSON", b"[]"])
def test_a_server_that_explains_nothing(event: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"data: " + event + b"\n\ndata: [DONE]\n\n")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        result = CliRunner().invoke(app, ["score", "--server", url, "--model", "a", "--prompt", "a"])
        server.shutdown()
    assert isinstance(result.exception, ProxyserveError), result.exception
    assert "proxyserve server" in str(result.exception)
