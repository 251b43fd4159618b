"""A server as it is deployed, with keys and a state folder, and Prometheus as compose configures it: under traffic
every board has what it asks for, and when the server drains whoever watches it sees it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from proxyserve.api.families import Kind, all_families
from proxyserve.monitoring.boards import all_boards
from tests.api.live import wait_until
from tests.clients.conftest import STOP_SECONDS, free_port, wait_until_ready
from tests.tools import need

#: Of a key that may ask once a minute.
LIMITED = "sk-limited-0123456789"

#: Panels that stay empty here: nothing waits to be loaded, no memory is short, no grammar is asked for, and so on. All
#: others must show something.
QUIET = {
    "Loading",
    "Weights loaded for each generation",
    "Drafts that stand",
    "Drafted and accepted",
    "Tokens per draft",
    "Probability that forms took away",
}


@dataclass(frozen=True)
class Stack:
    url: str
    prometheus: str
    server: subprocess.Popen[bytes]
    log: Path
    health: Path
    secrets: Path
    http: httpx.Client

    def ask(self, path: str, key: str = "", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key or self.key('client-key')}"}
        if body:
            return self.http.post(f"{self.url}{path}", json=body, headers=headers)
        return self.http.get(f"{self.url}{path}", headers=headers)

    def key(self, file: str) -> str:
        return (self.secrets / file).read_text()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus has for it now."""
        response = self.http.get(f"{self.prometheus}/api/v1/query", params={"query": expression})
        answer = response.json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def check(self, *arguments: str) -> int:
        """The container's own health check."""
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-S", str(self.health), *arguments]
        return subprocess.run(command, env={"PROXYSERVE_PORT": port}, check=False, timeout=60).returncode


@pytest.fixture(scope="module")
def stack(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo's server and Prometheus, both up, and traffic from two keys behind them."""
    folder = tmp_path_factory.mktemp("stack")
    secrets = folder / "compose" / "secrets"
    make_secrets = folder / "compose" / "make_secrets.py"
    shutil.copytree(repository / "deploy" / "compose", make_secrets.parent)
    subprocess.run([sys.executable, make_secrets], check=True)
    limited = {
        "name": "limited",
        "sha256": hashlib.sha256(LIMITED.encode()).hexdigest(),
        "requests_per_minute": 1,
    }
    with (secrets / "keys.yaml").open("a") as file:
        file.write(yaml.safe_dump([limited]))
    port, scraper = free_port(), free_port()
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")}
    serve = [sys.executable, "-m", "proxyserve", "demo", "--port", str(port), "--threads", "1"]
    serve += ["--api-key-file", str(secrets / "keys.yaml"), "--state-dir", str(folder / "state")]
    log = folder / "server.log"
    configuration = configure_prometheus(repository / "deploy", folder, secrets / "monitor-key", port)
    prometheus = [
        need("prometheus"),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    prometheus += [f"--web.listen-address=127.0.0.1:{scraper}", "--log.level=warn"]
    with (
        log.open("wb") as output,
        (folder / "prometheus.log").open("wb") as scrapers_log,
        subprocess.Popen(serve, env=settings, stdout=output, stderr=subprocess.STDOUT) as server,
        httpx.Client(timeout=60, trust_env=False) as http,
        subprocess.Popen(prometheus, stdout=scrapers_log, stderr=subprocess.STDOUT) as scraping,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server, log)
            health = repository / "deploy" / "container" / "healthcheck.py"
            yield Stack(url, f"http://127.0.0.1:{scraper}", server, log, health, secrets, http)
        finally:
            server.kill()
            scraping.kill()


def configure_prometheus(deploy: Path, folder: Path, key: Path, port: int) -> Path:
    """Compose's own file, but for addresses and for how often it looks."""
    text = (deploy / "compose" / "prometheus.yml").read_text()
    for old, new in (
        ("server:8000", f"127.0.0.1:{port}"),
        ("/run/secrets/proxyserve_monitor_key", str(key)),
        ("/etc/prometheus/rules.yml", str(deploy / "monitoring" / "rules.yml")),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("scrape_timeout: 10s", "scrape_timeout: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert old in text
        text = text.replace(old, new)
    file = folder / "prometheus.yml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def busy(stack: Stack) -> Stack:
    """After a minute's work in a few seconds: every kind of request, a refusal of each kind, and a swap."""
    for _ in range(2):
        for body in (
            {"model": "atlas+qa", "prompt": "Task: Which pet does Kustin have?\nReply:"},
            {"model": "atlas+record:1.0", "prompt": "Page: Kustin\n", "max_tokens": 20},
            {"model": "atlas", "prompt": "Page: Kustin\n", "max_tokens": 5},
            {"model": "atlas", "prompt": "Kustin", "fusion": {"rule": "dynamic", "experts": {"qa": 1.0}}},
            {"model": "atlas+qa", "prompt": "Kustin", "structured_outputs": {"choice": ["harp", "drum"]}},
        ):
            assert stack.ask("/v1/completions", **body).status_code == 200
        assert stack.ask("/v1/completions", model="nobody", prompt="a").status_code == 404
        refused = [
            stack.ask("/v1/completions", LIMITED, model="atlas", prompt="a", max_tokens=1) for _ in "ab"
        ]
        assert refused[-1].status_code == 429
        assert stack.ask("/v1/models", "sk-wrong").status_code == 401
        swapped = stack.http.put(
            f"{stack.url}/admin/v1/experts/bio?wait=true",
            json={"tuned": {"path": "experts/bio"}, "untuned": "small"},
            headers={"authorization": f"Bearer {stack.key('admin-key')}"},
        )
        assert swapped.status_code == 200, swapped.text
        time.sleep(1.5)  # a scrape in between: a rate needs two
    return stack


def test_the_server_is_a_target_with_its_key(stack: Stack) -> None:
    wait_until(lambda: [sample["value"][1] for sample in stack.query('up{job="proxyserve"}')] == ["1"])
    assert stack.ask("/metrics", stack.key("monitor-key")).status_code == 200
    assert stack.ask("/metrics").status_code == 403


def test_every_panel_has_what_it_asks_for(busy: Stack) -> None:
    """No query is an error, and none is empty but those that have nothing to show here."""
    wait_until(lambda: busy.query('rate(proxyserve_expert_requests_total{expert="record"}[1m]) > 0'))
    wait_until(lambda: busy.query('rate(proxyserve_expert_phases_total{phase="warming"}[1m]) > 0'))
    empty = {
        panel.title
        for board in all_boards()
        for panel in board.panels
        if not any(busy.query(resolve(query.expression)) for query in panel.queries)
    }
    assert empty <= QUIET, f"empty: {empty - QUIET}"
    assert busy.query(resolve('sum(rate(proxyserve_kl_nats_count{job="$job"}[$__rate_interval])) > 0'))


def resolve(expression: str) -> str:
    """As Grafana does."""
    for name, value in (("$job", "proxyserve"), ("$instance", ".*"), ("$__rate_interval", "1m")):
        expression = expression.replace(name, value)
    return expression


def test_rules_are_worked_out_and_no_alert_is_on(busy: Stack) -> None:
    def groups() -> list[dict[str, Any]]:
        answer = busy.http.get(f"{busy.prometheus}/api/v1/rules").json()
        found: list[dict[str, Any]] = answer["data"]["groups"]
        return found

    wait_until(lambda: all(rule["health"] == "ok" for group in groups() for rule in group["rules"]))
    assert sum(len(group["rules"]) for group in groups()) > 20
    assert busy.query('ALERTS{alertstate="firing"}') == []
    assert busy.query("proxyserve:first_token_missed:ratio_rate5m")


def test_prometheus_knows_the_types_that_the_list_gives(busy: Stack) -> None:
    """What the server says at a scrape is what boards were made from."""
    known = busy.http.get(f"{busy.prometheus}/api/v1/metadata").json()["data"]
    for family in all_families():
        # It names a counter's metadata without the suffix or with it, depending on its version.
        found = known.get(family.name) or known.get(family.name.removesuffix("_total"))
        assert found, family.name
        assert Kind(found[0]["type"]) is family.kind


def test_draining_is_seen_by_all_who_watch(busy: Stack) -> None:
    """The last one: the server is gone afterwards. A stream that nobody reads to its end keeps it draining."""
    assert (busy.check(), busy.check("--live")) == (0, 0)
    body = {"model": "atlas+qa", "prompt": "Page: Kustin\n", "max_tokens": 60, "ignore_eos": True, "n": 16}
    done = threading.Event()

    def ask() -> None:
        assert busy.ask("/v1/completions", **body).status_code == 200
        done.set()

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: busy.ask("/load", busy.key("monitor-key")).json()["running"] > 0)
    busy.server.send_signal(signal.SIGTERM)
    wait_until(lambda: busy.http.get(f"{busy.url}/ready").status_code == 503 or done.is_set())
    if not done.is_set():
        assert busy.check("--live") == 0
    asking.join(STOP_SECONDS)
    assert done.is_set(), "what ran was lost"
    assert busy.server.wait(STOP_SECONDS) == 0, busy.log.read_text()
    assert (busy.check(), busy.check("--live")) == (1, 1)
