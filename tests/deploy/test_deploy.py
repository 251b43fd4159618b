"""What can be checked of deploy/ without a container engine and without systemd as process 1."""

from __future__ import annotations

import json
import re
import runpy
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

from proxyserve import __version__
from proxyserve.api.keys import read_key_file
from proxyserve.cli.main import COMMANDS
from proxyserve.config import ServerConfig
from tests.tools import need

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
    """Options and variables of `proxyserve COMMAND`, in one string each."""
    texts = {}
    for command in ("serve", "demo"):
        words: list[str] = []
        for parameter in COMMANDS[command].load(command).params:
            variables = parameter.envvar or []
            words += [*parameter.opts, *parameter.secondary_opts]
            words += [variables] if isinstance(variables, str) else variables
        texts[command] = " ".join(words)
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
    assert json.loads(value_of(instructions, "ENTRYPOINT")) == ["tini", "--", "proxyserve"]
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
    """Answers /ready with its attributes `status` and `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/ready" else 404)
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is the library's
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check_health(deploy: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PROXYSERVE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-S", str(deploy / "container" / "healthcheck.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("status", "body", "ready", "live"),
    [
        (200, b'{"status": "ready"}', 0, 0),
        (503, b'{"status": "draining"}', 1, 0),
        (503, b'{"status": "dead"}', 1, 1),
        (503, b"<html>from somebody else</html>", 1, 1),
    ],
)
def test_health_check(
    ready_server: HTTPServer, deploy: Path, status: int, body: bytes, ready: int, live: int
) -> None:
    ready_server.status, ready_server.body = status, body
    for expected, arguments in ((ready, ()), (live, ("--live",))):
        result = check_health(deploy, ready_server.server_port, *arguments)
        assert result.returncode == expected, result.stdout + result.stderr
        assert (body.decode() in result.stdout) == bool(expected)


@pytest.mark.parametrize("arguments", [(), ("--live",)])
def test_health_check_without_a_server(deploy: Path, arguments: tuple[str, ...]) -> None:
    result = check_health(deploy, 9, *arguments)
    assert result.returncode == 1
    assert "refused" in result.stdout


def test_health_check_says_what_it_takes(deploy: Path) -> None:
    assert check_health(deploy, 9, "--alive").returncode == 2


def test_images_are_built_from_what_is_named(
    deploy: Path, instructions: list[tuple[str, str]], service: dict[str, Any]
) -> None:
    """Base images have a version, arguments exist, versions are this one's, and compose builds the same images."""
    arguments = dict(rest.split("=", 1) for head, rest in instructions if head == "ARG")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    assert {rest.split()[0] for head, rest in instructions if head == "FROM"} == {"${PYTHON_IMAGE}"}
    targets = json.loads((deploy / "container" / "docker-bake.json").read_text())["target"]
    override = yaml.safe_load((deploy / "compose" / "compose.gpu.yaml").read_text())["services"]["server"]
    for target, composed in ((targets["cpu"], service), (targets["cuda"], override)):
        assert set(target["args"]) <= set(arguments)
        assert target["args"]["VERSION"] == __version__
        assert target["tags"] == [composed["image"]]
        same = {name: value for name, value in composed["build"]["args"].items() if name != "TORCH_INDEX_URL"}
        assert same.items() <= target["args"].items()
    labels = " ".join(rest for head, rest in instructions if head == "LABEL")
    assert "org.opencontainers.image.version" in labels
    assert not re.search(
        r"(?i)(secret|token|password|api_key)\w*=(?!/run/)", " ".join(map(" ".join, instructions))
    )


# Compose --------------------------------------------------------------------------------------------------------


def test_compose_gives_the_server_time_to_drain(service: dict[str, Any]) -> None:
    assert float(service["stop_grace_period"].removesuffix("s")) > DRAIN


def test_compose_mounts_the_keys_where_the_image_looks(
    service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    """A file of records needs its suffix, so the variable of the image is replaced."""
    assert "PROXYSERVE_API_KEY_FILE" in variables_of(instructions)
    (secret,) = service["secrets"]
    assert service["environment"]["PROXYSERVE_API_KEY_FILE"] == f"/run/secrets/{secret['target']}"


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


@pytest.fixture(scope="session")
def composed(deploy: Path) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((deploy / "compose" / "compose.yaml").read_text())
    return services


def test_compose_pins_limits_and_hardens_every_service(composed: dict[str, Any]) -> None:
    for name, each in composed["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", each["image"]), name
        assert each["deploy"]["resources"]["limits"]["memory"]
        assert (each["read_only"], each["cap_drop"]) == (True, ["ALL"])
        assert each["security_opt"] == ["no-new-privileges:true"]
        assert each["restart"] == "unless-stopped"
        assert all(port.startswith("127.0.0.1:") for port in each["ports"])
        assert not any(
            re.search("PASSWORD$|KEY$|TOKEN$", variable) for variable in each.get("environment", ())
        )


def test_compose_names_what_is_there(composed: dict[str, Any], deploy: Path) -> None:
    """Files that are mounted, volumes, secrets; and who waits for whom waits for something that says it is healthy."""
    services = composed["services"]
    made = {f"./secrets/{name}" for name in make_secrets(deploy)}
    assert {entry["file"] for entry in composed["secrets"].values()} <= made
    for each in services.values():
        for mount in each["volumes"]:
            source = mount.rsplit(":", 2 if mount.endswith(":ro") else 1)[0]
            if source.startswith("."):
                assert (deploy / "compose" / source).exists(), source
            elif not source.startswith("$"):
                assert source in composed["volumes"]
        for secret in each["secrets"]:
            assert (secret if isinstance(secret, str) else secret["source"]) in composed["secrets"]
        for other, how in each.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[other]


def make_secrets(deploy: Path) -> set[str]:
    """The names of the files that the script makes."""
    module = runpy.run_path(str(deploy / "compose" / "make_secrets.py"))
    return {file for _, file in module["KEYS"].values()} | {"keys.yaml", "grafana-password"}


def test_secrets_are_made_once(deploy: Path, tmp_path: Path) -> None:
    """What they hold is used in `test_stack`."""
    script = tmp_path / "make_secrets.py"
    shutil.copy(deploy / "compose" / "make_secrets.py", script)
    codes = [
        subprocess.run([sys.executable, script], capture_output=True, check=False).returncode for _ in "ab"
    ]
    assert codes == [0, 1]
    folder = tmp_path / "secrets"
    assert {file.name for file in folder.iterdir()} == make_secrets(deploy)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    records = read_key_file(folder / "keys.yaml", "user").records
    assert [record.role for record in records] == ["user", "admin", "monitor"]
    assert "secrets/" in (deploy / "compose" / ".gitignore").read_text().splitlines()


def test_grafana_finds_prometheus_and_the_boards(composed: dict[str, Any], deploy: Path) -> None:
    services = composed["services"]
    mounts = dict(mount.removesuffix(":ro").rsplit(":", 1) for mount in services["grafana"]["volumes"])
    folder = deploy / "compose" / "grafana"
    (source,) = yaml.safe_load((folder / "datasources.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards.yaml").read_text())["providers"]
    address = services["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{address}"
    assert provider["options"]["path"] == mounts["../monitoring/boards"]
    assert mounts["./grafana/datasources.yaml"].startswith("/etc/grafana/provisioning/datasources/")
    assert mounts["./grafana/dashboards.yaml"].startswith("/etc/grafana/provisioning/dashboards/")
    interval = yaml.safe_load((deploy / "compose" / "prometheus.yml").read_text())["global"][
        "scrape_interval"
    ]
    assert source["jsonData"]["timeInterval"] == interval


def test_promtool_accepts_the_configuration(composed: dict[str, Any], deploy: Path, tmp_path: Path) -> None:
    """With its files at the places where compose mounts them."""
    prometheus = composed["services"]["prometheus"]
    text = (deploy / "compose" / "prometheus.yml").read_text()
    mounts = dict(mount.removesuffix(":ro").rsplit(":", 1)[::-1] for mount in prometheus["volumes"])
    config = next(word.partition("=")[2] for word in prometheus["command"] if "config.file" in word)
    assert mounts[config] == "./prometheus.yml"
    rules = deploy / "compose" / mounts["/etc/prometheus/rules.yml"]
    (tmp_path / "key").write_text("sk-x")
    text = text.replace("/etc/prometheus/rules.yml", str(rules.resolve()))
    text = text.replace(f"/run/secrets/{prometheus['secrets'][0]}", str(tmp_path / "key"))
    assert "/run/secrets" not in text
    file = tmp_path / "prometheus.yml"
    file.write_text(text)
    result = subprocess.run(
        [need("promtool"), "check", "config", file], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rules found" in result.stdout


# systemd --------------------------------------------------------------------------------------------------------


def test_unit_gives_the_server_time_to_drain(unit: RawConfigParser) -> None:
    assert float(unit["Service"]["TimeoutStopSec"]) > DRAIN


@pytest.fixture
def installed(deploy: Path, tmp_path: Path) -> Path:
    """The unit with its drop-in for GPUs. systemd insists that the program exists."""
    text = (deploy / "systemd" / "proxyserve.service").read_text()
    unit = tmp_path / "proxyserve.service"
    unit.write_text(text.replace("/opt/proxyserve/bin/proxyserve", sys.executable))
    drop_in = tmp_path / "proxyserve.service.d"
    drop_in.mkdir()
    shutil.copy(deploy / "systemd" / "gpu.conf", drop_in)
    return unit


def test_systemd_accepts_the_unit(installed: Path) -> None:
    command = [need("systemd-analyze"), "verify", "--man=no", str(installed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize(("gpu", "most"), [(False, 1.2), (True, 1.4)])
def test_systemd_finds_little_exposed(installed: Path, gpu: bool, most: float) -> None:
    """Its score goes from 0 to 10, all that a unit may be exposed to; 2 and less is what it calls OK."""
    if not gpu:
        shutil.rmtree(installed.with_name("proxyserve.service.d"))
    command = [need("systemd-analyze"), "security", "--offline=true", "--no-pager", str(installed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (score,) = re.findall(r"Overall exposure level for proxyserve.service: ([0-9.]+)", result.stdout)
    assert float(score) <= most, result.stdout
