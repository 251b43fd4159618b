"""`bench serve`: what it prints and writes, and which options it refuses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from proxyserve.bench.load import chart
from proxyserve.cli.bench_serve import _loads, _share
from proxyserve.cli.main import app
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.errors import ProxyserveError
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, serve
from tests.tiny import TinyFamily


@pytest.fixture
def live(tiny_models: ModelSet) -> Iterator[Live]:
    engine = AsyncEngine(Engine(tiny_models, EngineConfig(max_batch=8, kv_memory=4 * 2**20)))
    engine.start()
    with serve(engine) as live:
        yield live
    engine.close()


def bench(family: TinyFamily, url: str, *options: str) -> Result:
    arguments = ["bench", "serve", url, "--tokenizer", str(family.base), "--prompt", "5", "--output", "3"]
    return CliRunner().invoke(app, [*arguments, *options], env={"COLUMNS": "200"})


def test_a_measurement(live: Live, tiny_family: TinyFamily, tmp_path: Path) -> None:
    found, picture = tmp_path / "found.json", tmp_path / "chart.png"
    loads = ("--clients", "1,2", "--rate", "100", "--requests", "4", "--rounds", "2", "--warmup", "1")
    files = ("--save", str(found), "--chart", str(picture))
    shown = bench(
        tiny_family, live.url, "--model", "atlas", "--model", "atlas+qa:0.5=2", "--ids", *loads, *files
    )
    assert shown.exit_code == 0, shown.output
    assert all(load in shown.stdout for load in ("1 client ", "2 clients", "100 requests/s"))
    assert shown.stdout.count("0 of 8") == 3
    result = json.loads(found.read_text())
    assert result["workload"]["models"] == {"atlas": 1.0, "atlas+qa:0.5": 2.0}
    for load in result["loads"]:
        assert load["answered"] == 8 and load["errors"] == {} and load["doubts"] == {}
        assert load["tokens_per_second"]["median"] > 0.0
        assert len(load["seconds"]["gap"]["p90"]["rounds"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nobody_listens(tiny_family: TinyFamily) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    loads = ("--clients", "2", "--requests", "3", "--rounds", "1", "--warmup", "0")
    shown = bench(tiny_family, f"http://127.0.0.1:{port}", "--model", "atlas", *loads)
    assert shown.exit_code == 1
    assert "3 of 3" in shown.stdout and "2 clients: 3 x refused" in shown.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "a"), "Give --clients or --rate"),
        (("--model", "a", "--clients", "1.5"), "'1.5' for --clients: 1.5 is no whole number"),
        (("--model", "a", "--clients", "1,-2"), "'1,-2' for --clients"),
        (("--model", "a", "--clients", "few"), "'few' for --clients"),
        (("--model", "a", "--rate", "inf"), "'inf' for --rate"),
        (("--model", "a", "--rate", ""), "'' for --rate"),
        (("--model", "a=0", "--clients", "1"), "'a=0' for --model: the share after '=' must be above 0"),
        (("--model", "a", "--model", "a=2", "--clients", "1"), "--model has 'a' twice"),
        (("--model", "a", "--clients", "1", "--prompt", "0"), "--prompt: '0' is no distribution of lengths"),
        (("--model", "a", "--clients", "1", "--output", "9-3"), "--output: '9-3' is no distribution"),
        (("--model", "a", "--clients", "1", "--body", "{"), "--body is no JSON"),
        (("--model", "a", "--clients", "1", "--body", "[]"), "--body must be a JSON object"),
        (("--model", "a", "--clients", "1", "--save", "/nowhere/a.json"), "--save: there is no folder"),
        (("--model", "a", "--clients", "1", "--chart", "/nowhere/a.png"), "--chart: there is no folder"),
        (("--model", "a", "--clients", "1", "--tokenizer", "."), "give --tokenizer the folder"),
    ],
)
def test_options_that_are_refused(tiny_family: TinyFamily, options: tuple[str, ...], message: str) -> None:
    """Before anybody is asked."""
    shown = bench(tiny_family, "http://127.0.0.1:1", *options)
    assert shown.exit_code != 0
    assert message in f"{shown.output} {shown.exception}"


def test_an_address_that_is_none(tiny_family: TinyFamily) -> None:
    shown = bench(tiny_family, "localhost:8000", "--model", "a", "--clients", "1")
    assert "'localhost:8000' is no address of a server" in f"{shown.output} {shown.exception}"


def test_a_chart_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    with pytest.raises(ProxyserveError, match="leave --chart out"):
        chart.check_charts()


@pytest.mark.parametrize(
    ("text", "name", "share"),
    [("a", "a", 1.0), ("a=3", "a", 3.0), ("a=b", "a=b", 1.0), ("a=b=0.5", "a=b", 0.5)],
)
def test_shares(text: str, name: str, share: float) -> None:
    assert _share(text) == (name, share)


def test_how_many_requests_a_load_has() -> None:
    assert [str(load) for load in _loads("1,8", "0.5", None)] == ["1 client", "8 clients", "0.5 requests/s"]
    assert [load.requests for load in _loads("1,8", "0.1,10", None)] == [8, 32, 8, 200]
    assert [load.requests for load in _loads("1,8", None, 5)] == [5, 5]
