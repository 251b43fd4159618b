"""What can be checked of deploy/ without a container engine and without systemd as process 1."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import RawConfigParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxyserve.config import ServerConfig

DRAIN = ServerConfig().drain_seconds


@pytest.fixture(scope="session")
def deploy(repository: Path) -> Path:
    return repository / "deploy"


@pytest.fixture(scope="session")
def service(deploy: Path) -> dict[str, Any]:
    compose = yaml.safe_load((deploy / "compose" / "compose.yaml").read_text())
    server: dict[str, Any] = compose["services"]["server"]
    return server


@pytest.fixture(scope="session")
def unit(deploy: Path) -> RawConfigParser:
    # Interpolation would trip over systemd's own %; `strict` over settings that are given twice, which it allows.
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # names keep their case
    parser.read(deploy / "systemd" / "proxyserve.service")
    return parser


@pytest.fixture(scope="session")
def instructions(deploy: Path) -> list[tuple[str, str]]:
    """The Containerfile as (instruction, arguments), continuation lines joined."""
    lines = (deploy / "container" / "Containerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(head, rest) for head, _, rest in (line.partition(" ") for line in text.splitlines()) if head]


@pytest.fixture(scope="session")
def help_texts() -> dict[str, str]:
    """What `proxyserve COMMAND --help` prints, unwrapped."""
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    texts = {}
    for command in ("serve", "demo"):
        arguments = [sys.executable, "-m", "proxyserve", command, "--help"]
        result = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        texts[command] = result.stdout
    return texts


def options_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def value_of(instructions: list[tuple[str, str]], name: str) -> str:
    """The last value of an instruction that counts once, such as USER."""
    return [rest.strip() for head, rest in instructions if head == name][-1]


def variables_of(instructions: list[tuple[str, str]]) -> dict[str, str]:
    text = " ".join(rest for head, rest in instructions if head == "ENV")
    return dict(word.split("=", 1) for word in shlex.split(text))


# Options --------------------------------------------------------------------------------------------------------


def test_options_of_the_compose_file_exist(service: dict[str, Any], help_texts: dict[str, str]) -> None:
    command, *words = service["command"]
    known = set(re.findall(r"--[a-z][a-z-]*", help_texts[command]))
    assert set(options_of(words)) <= known


def test_options_of_the_unit_exist(unit: RawConfigParser, help_texts: dict[str, str]) -> None:
    _, command, *words = shlex.split(unit["Service"]["ExecStart"])
    known = set(re.findall(r"--[a-z][a-z-]*", help_texts[command]))
    assert set(options_of(words)) <= known


def test_variables_of_the_unit_exist(deploy: Path, help_texts: dict[str, str]) -> None:
    lines = (deploy / "systemd" / "proxyserve.env").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert "PROXYSERVE_BASE" in names
    assert names <= set(re.findall(r"PROXYSERVE_[A-Z_]+", help_texts["serve"]))


def test_variables_of_the_image_exist(
    instructions: list[tuple[str, str]], help_texts: dict[str, str]
) -> None:
    names = [name for name in variables_of(instructions) if name.startswith("PROXYSERVE_")]
    assert len(names) == 3
    for text in help_texts.values():
        assert set(names) <= set(re.findall(r"PROXYSERVE_[A-Z_]+", text))


# Container ------------------------------------------------------------------------------------------------------


def test_image_starts_the_server_itself_as_an_ordinary_user(instructions: list[tuple[str, str]]) -> None:
    # In shell form a shell would be process 1 and keep SIGTERM from the server.
    assert json.loads(value_of(instructions, "ENTRYPOINT")) == ["proxyserve"]
    assert json.loads(value_of(instructions, "CMD")) == ["demo"]
    assert value_of(instructions, "STOPSIGNAL") == "SIGTERM"
    assert value_of(instructions, "USER") == "10001:10001"


def test_what_the_image_copies_is_there_and_not_ignored(
    instructions: list[tuple[str, str]], repository: Path
) -> None:
    allowed = {
        line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copies = [shlex.split(rest) for head, rest in instructions if head == "COPY" and "--from" not in rest]
    sources = [source for *copied, _ in copies for source in copied]
    assert "proxyserve" in sources
    for source in sources:
        assert (repository / source).exists()
        assert source in allowed or str(Path(source).parent) in allowed


@pytest.fixture
def ready_server() -> Iterator[HTTPServer]:
    """Answers /ready with its attribute `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/ready" else 404)
            self.end_headers()
            self.wfile.write(b'{"reason": "draining"}')

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is the library's
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check_health(deploy: Path, port: int) -> subprocess.CompletedProcess[str]:
    environment = {"PROXYSERVE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-S", str(deploy / "container" / "healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_check(ready_server: HTTPServer, deploy: Path, status: int, code: int) -> None:
    ready_server.status = status
    result = check_health(deploy, ready_server.server_port)
    assert result.returncode == code, result.stdout + result.stderr
    assert ("draining" in result.stdout) == (code == 1)


def test_health_check_without_a_server(deploy: Path) -> None:
    result = check_health(deploy, 9)
    assert result.returncode == 1
    assert "refused" in result.stdout


# Compose --------------------------------------------------------------------------------------------------------


def test_compose_gives_the_server_time_to_drain(service: dict[str, Any]) -> None:
    assert float(service["stop_grace_period"].removesuffix("s")) > DRAIN


def test_compose_mounts_the_keys_where_the_image_looks(
    service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    (secret,) = service["secrets"]
    assert variables_of(instructions)["PROXYSERVE_API_KEY_FILE"] == f"/run/secrets/{secret}"


def test_compose_publishes_on_loopback_and_checks_health(
    service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    port = variables_of(instructions)["PROXYSERVE_PORT"]
    assert service["ports"] == [f"127.0.0.1:8000:{port}"]
    kind, *command = service["healthcheck"]["test"]
    assert (kind, command) == ("CMD", json.loads(value_of(instructions, "HEALTHCHECK").partition("CMD ")[2]))


def test_gpu_override_sets_arguments_that_the_image_has(
    deploy: Path, service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    override = yaml.safe_load((deploy / "compose" / "compose.gpu.yaml").read_text())["services"]["server"]
    arguments = {rest.partition("=")[0] for head, rest in instructions if head == "ARG"}
    assert set(override["build"]["args"]) | set(service["build"]["args"]) <= arguments


# systemd --------------------------------------------------------------------------------------------------------


def test_unit_gives_the_server_time_to_drain(unit: RawConfigParser) -> None:
    assert float(unit["Service"]["TimeoutStopSec"]) > DRAIN


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(deploy: Path, tmp_path: Path) -> None:
    text = (deploy / "systemd" / "proxyserve.service").read_text()
    # It insists that the program exists.
    installed = tmp_path / "proxyserve.service"
    installed.write_text(text.replace("/opt/proxyserve/bin/proxyserve", sys.executable))
    drop_in = tmp_path / "proxyserve.service.d"
    drop_in.mkdir()
    shutil.copy(deploy / "systemd" / "gpu.conf", drop_in)
    command = ["systemd-analyze", "verify", "--man=no", str(installed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
