"""A newcomer's path from an empty folder: clone, `make serve`, drag a slider in the page, ask from Python, tune an
expert, publish it, see what it gains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.clients.conftest import free_port
from tests.docs.blocks import REPOSITORY, blocks_of
from tests.docs.runner import PageRunner
from tests.docs.test_pages import OF_NEWCOMERS
from tests.playground.conftest import ARGUMENTS, Tab
from tests.tools import need

playwright = pytest.importorskip("playwright.sync_api")

PATIENCE = 180.0


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone in which `make serve` runs."""

    folder: Path
    url: str


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("newcomer") / "proxyserve"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True, timeout=60)
    make_environment(folder)
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")}
    environment.pop("PYTHONPATH", None)
    command = ["make", "serve", f"ARGS=--port {port} --expert-root {folder}"]
    log = folder / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while not is_ready(url):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Clone(folder, url)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        finally:
            server.kill()


def make_environment(folder: Path) -> None:
    """A .venv as `make install` leaves it, with nothing to download: its packages are those that run this test."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    (packages,) = (folder / ".venv").glob("lib/python*/site-packages")
    sources = [folder, folder / "kernels", folder / "clients" / "python"]
    lines = [*map(str, sources), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (packages / "newcomer.pth").write_text("".join(f"{line}\n" for line in lines))
    python, program = folder / ".venv" / "bin" / "python", folder / ".venv" / "bin" / "proxyserve"
    program.write_text(f"#!{python}\nfrom proxyserve.cli.main import main\nmain()\n")
    program.chmod(0o755)
    (folder / ".venv" / ".installed").touch()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").is_success
    except httpx.TransportError:
        return False


def drag_a_slider(url: str) -> None:
    """In the page that the server shows: an answer of base and expert streams; with less weight it is the base's."""
    with (
        playwright.sync_playwright() as started,
        started.chromium.launch(executable_path=need("chromium"), args=ARGUMENTS) as browser,
        browser.new_page() as page,
    ):
        page.set_default_timeout(PATIENCE * 1000)
        playwright.expect.set_options(timeout=PATIENCE * 1000)
        page.goto(url)
        tab = Tab(page)
        tab.send()
        tab.settled()
        assert tab.text(0).startswith("birthplace: Nudreth")
        tab.weigh("record", 0.2)
        playwright.expect(tab.answer(0).locator(".tokens")).not_to_contain_text("birthplace")


@pytest.mark.slow
def test_a_newcomer_gets_from_a_clone_to_an_expert_of_their_own(clone: Clone) -> None:
    drag_a_slider(clone.url)
    walk = PageRunner(clone.folder, clone.url, clone.folder / ".venv" / "bin")
    try:
        for name in OF_NEWCOMERS:
            for block in blocks_of(REPOSITORY / name):
                if block.not_run is None:
                    walk.run(block)
    finally:
        walk.close()
    (card,) = [
        expert
        for expert in httpx.get(f"{clone.url}/admin/v1/experts").json()["data"]
        if expert["name"] == "card"
    ]
    assert card["state"] == "published", card
