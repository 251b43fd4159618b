"""The command: options from line, environment and file; refusals in one line; a server that really serves."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from proxyserve.cli import demo, options, serve
from proxyserve.cli.main import app
from proxyserve.cli.settings import ServeSettings
from proxyserve.fusion.calibration import Calibration, CalibrationPoint, write_calibrations
from proxyserve.models.family import ExpertSource
from tests.cli.in_process import run_command
from tests.tiny import TinyFamily


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("4GiB", 4 * 2**30), ("1.5 MB", 1_500_000), ("2kib", 2048)]
)
def test_sizes(text: str, size: int) -> None:
    assert options.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 parsecs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        options.parse_size(text)


def test_experts() -> None:
    assert options.parse_expert("qa=/a,/b") == ExpertSource("qa", Path("/a"), Path("/b"))
    assert options.parse_expert("qa=/a") == ExpertSource("qa", Path("/a"), None)
    for text in ("qa", "=x", "qa=", "qa=/a,"):
        with pytest.raises(typer.BadParameter):
            options.parse_expert(text)


@pytest.mark.parametrize("text", ["", "1", "1:2", "a:b", "4:-4"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        options.parse_range(text)


Started = tuple[Path, list[ExpertSource], ServeSettings, str | None]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """What `serve` would have started, instead of starting it."""
    calls: list[Started] = []

    def record(
        base: Path, experts: list[ExpertSource], settings: ServeSettings, *, served_name: str | None = None
    ) -> None:
        calls.append((base, experts, settings, served_name))

    for module in (serve, demo):
        monkeypatch.setattr(module, "serve", record)
    return calls


def test_line_wins_over_environment_over_file(started: list[Started], tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nmax-batch = 3\nkv-memory = "1MiB"\nthreads = 2\n[experts]\nqa = "/t,/u"\n')
    result = CliRunner().invoke(
        app,
        ["serve", "/base", "--config", str(file), "--port", "3"],
        env={"PROXYSERVE_PORT": "2", "PROXYSERVE_THREADS": "4"},
    )
    assert result.exit_code == 0, result.output
    base, experts, settings, _ = started[0]
    assert base == Path("/base") and experts == [ExpertSource("qa", Path("/t"), Path("/u"))]
    assert settings.server.port == 3
    assert settings.engine.threads == 4
    assert (settings.engine.max_batch, settings.engine.kv_memory) == (3, 2**20)


def test_what_a_cpu_settles_itself(started: list[Started], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["serve", "/base"]).exit_code == 0
    engine = started[-1][2].engine
    assert (engine.threads, engine.dtype, engine.prefill_tokens, engine.quantize) == (
        "auto",
        "auto",
        None,
        None,
    )
    file = tmp_path / "server.yaml"
    file.write_text("threads: auto\nquantize: off\ndtype: fastest\n")
    line = ["serve", "/base", "--config", str(file), "--prefill-tokens", "64"]
    assert CliRunner().invoke(app, line).exit_code == 0
    engine = started[-1][2].engine
    assert (engine.threads, engine.dtype, engine.prefill_tokens, engine.quantize) == (
        "auto",
        "fastest",
        64,
        None,
    )
    assert CliRunner().invoke(app, ["serve", "/base", "--quantize", "int8"]).exit_code == 0
    assert started[-1][2].engine.quantize == "int8"
    for option, value in (
        ("--threads", "0"),
        ("--threads", "all"),
        ("--quantize", "int3"),
        ("--prefill-tokens", "0"),
    ):
        refused = CliRunner().invoke(app, ["serve", "/base", option, value])
        assert refused.exit_code == 2 and option in refused.output
    refused = CliRunner().invoke(app, ["serve", "/base", "--prefill-tokens", "16"])
    assert refused.exit_code == 2 and "--prefill-tokens" in refused.output and "17" in refused.output
    assert CliRunner().invoke(app, ["serve", "/base", "--prefill-tokens", "17"]).exit_code == 0


def test_yaml_and_unknown_names(started: list[Started], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("served_name: big\nweight_range: '-1:2'\n")
    assert CliRunner().invoke(app, ["serve", "/base", "--config", str(file)]).exit_code == 0
    assert started[0][3] == "big" and started[0][2].policy.max_weight == 2.0
    file.write_text("prot: 8000\n")
    refused = CliRunner().invoke(app, ["serve", "/base", "--config", str(file)])
    assert refused.exit_code == 2 and "prot" in refused.output
    file.write_text("[1, 2]")
    assert CliRunner().invoke(app, ["serve", "/base", "--config", str(file)]).exit_code == 2


def test_presets_calibrations_and_roles(started: list[Started], tmp_path: Path) -> None:
    write_calibrations(tmp_path / "c.json", {"qa": Calibration("qa", (CalibrationPoint(0.0, 1.0, 2.0),))})
    (tmp_path / "admins").write_text("key\n")
    file = tmp_path / "server.yaml"
    file.write_text("presets:\n  house: {rule: dynamic, experts: {qa: 1}}\n")
    arguments = ["--protect", "qa", "--explain-to-all", "--calibration", str(tmp_path / "c.json")]
    arguments += ["--admin-key-file", str(tmp_path / "admins"), "--config", str(file)]
    result = CliRunner().invoke(app, ["serve", "/base", *arguments])
    assert result.exit_code == 0, result.output
    settings = started[0][2]
    assert json.loads(settings.presets["house"]) == {"rule": "dynamic", "experts": {"qa": 1}}
    assert settings.calibrations["qa"].points[0].general_loss == 2.0
    assert settings.policy.protected == {"qa"} and settings.policy.explain_to_all
    assert settings.server.admin_key_file == tmp_path / "admins"
    line = CliRunner().invoke(app, ["serve", "/base", "--preset", 'a={"rule": "arm"}', "--preset", "b={}"])
    assert line.exit_code == 0 and started[1][2].presets == {"a": '{"rule": "arm"}', "b": "{}"}
    assert CliRunner().invoke(app, ["serve", "/base", "--preset", "house"]).exit_code == 2


@pytest.mark.parametrize("command", [["serve", "/base"], ["demo"]])
def test_drafts(started: list[Started], tmp_path: Path, command: list[str]) -> None:
    """From each source, and as each of them writes it; YAML's bare `off` is a false."""
    files = {"a.yaml": "speculate: off\n", "b.toml": "speculate = 2\n", "c.yaml": "max-drafts: 3\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    yaml, toml, most = (["--config", str(tmp_path / name)] for name in files)
    for arguments, environment, expected in (
        ([], {}, ("auto", 8)),
        (yaml, {}, ("off", 8)),
        (toml, {}, (2, 8)),
        (most, {}, ("auto", 3)),
        (yaml, {"PROXYSERVE_SPECULATE": "auto", "PROXYSERVE_MAX_DRAFTS": "5"}, ("auto", 5)),
        (["--speculate", "4"], {"PROXYSERVE_SPECULATE": "off"}, (4, 8)),
        (["--speculate", "auto", "--max-drafts", "1"], {}, ("auto", 1)),
    ):
        result = CliRunner().invoke(app, [*command, *arguments], env=environment)
        assert result.exit_code == 0, result.output
        engine = started[-1][2].engine
        assert (engine.speculate, engine.max_drafts) == expected
    for wrong, named in (
        (["--speculate", "on"], "--speculate"),
        (["--speculate", "0"], "speculate"),
        (["--speculate", "33"], "1 to 32"),
        (["--max-drafts", "0"], "--max-drafts"),
    ):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert result.exit_code == 2 and named in result.output
    for other in ("off", "4"):
        result = CliRunner().invoke(app, [*command, *most, "--speculate", other])
        assert result.exit_code == 2
        assert "--max-drafts" in result.output and "--speculate" in result.output


@pytest.mark.parametrize("command", [["serve", "/base"], ["demo"]])
def test_pairs(started: list[Started], tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("pairs: apart\n")
    for arguments, environment, expected in (
        ([], {}, "auto"),
        (["--config", str(file)], {}, "apart"),
        (["--config", str(file)], {"PROXYSERVE_PAIRS": "auto"}, "auto"),
        (["--pairs", "together"], {"PROXYSERVE_PAIRS": "apart"}, "together"),
    ):
        result = CliRunner().invoke(app, [*command, *arguments], env=environment)
        assert result.exit_code == 0, result.output
        assert started[-1][2].engine.pairs == expected
    result = CliRunner().invoke(app, [*command, "--pairs", "both"])
    assert result.exit_code == 2 and "--pairs" in result.output


def test_settings_that_contradict_each_other(started: list[Started]) -> None:
    result = CliRunner().invoke(app, ["serve", "/base", "--max-batch", "64", "--max-batch-tokens", "32"])
    assert result.exit_code == 2 and "max_batch_tokens" in result.output
    assert not started


def test_chat_template_and_parsers(started: list[Started], tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    arguments = ["serve", "/base", "--tool-parser", "llama", "--chat-template"]
    environment = {"PROXYSERVE_REASONING_PARSER": "none"}
    result = CliRunner().invoke(app, [*arguments, str(template)], env=environment)
    assert result.exit_code == 0, result.output
    chat = started[0][2].server.chat
    assert (chat.tool_parser, chat.reasoning_parser) == ("llama", "none")
    assert chat.template == template.read_text()
    template.write_text("{% for %}")
    assert CliRunner().invoke(app, [*arguments, str(template)]).exit_code == 2, "no template"


def test_refusals_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "proxyserve", "serve", str(tmp_path / "nowhere")]
    missing = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert missing.returncode == 1 and "no such folder" in missing.stderr
    assert "Traceback" not in missing.stderr
    open_to_all = run_command("serve", str(tmp_path), "--host", "0.0.0.0")
    assert open_to_all.returncode == 1 and "--api-key-file" in open_to_all.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "x={"], "not JSON"),
        (["--preset", 'x={"rule": "none"}'], "the rules are"),
        (["--preset", 'x={"experts": {"ghost": 1}}'], "ghost"),
        (["--preset", 'x={"rule": "formula", "formula": "base + x"}'], "made of itself"),
        (["--protect", "ghost"], "no such expert"),
        (["--calibration", __file__], "no file of calibrations"),
    ],
    ids=str,
)
def test_what_the_operator_got_wrong(arguments: list[str], words: str) -> None:
    result = run_command("demo", "--port", "0", *arguments)
    assert result.returncode == 1, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_demo_paths() -> None:
    result = run_command("demo", "--paths")
    assert result.returncode == 0
    assert Path(json.loads(result.stdout)["base"]).joinpath("config.json").is_file()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def server(tiny_family: TinyFamily, free_port: int, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    config = tmp_path / "server.yaml"
    expert = f"{tiny_family.experts['qa']},{tiny_family.untuned}"
    config.write_text(f"port: {free_port}\nkv-memory: 2MiB\nthreads: 1\nexperts:\n  qa: {expert}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "proxyserve", "serve", str(tiny_family.base), "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_serve(server: subprocess.Popen[str], free_port: int) -> None:
    """Folders and a file in, answers out, exit 0 on SIGINT, and a table that says what is served."""
    with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=30) as client:
        for _ in range(300):
            assert server.poll() is None, server.communicate()
            try:
                if client.get("/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
        assert names == ["atlas", "atlas+qa"]
        answer = client.post(
            "/v1/completions", json={"model": "atlas+qa:0.5", "prompt": "Hello", "max_tokens": 4}
        )
        assert answer.status_code == 200 and answer.json()["fusion"]["generations"] == {"qa": 1}
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 0
    for shown in ("atlas", "qa.tuned", "small", "384 tokens shared", "no keys: whoever connects", "no TLS"):
        assert shown in errors
