"""The examples of docs/clients.md: each is a file in clients/examples, which runs against a live server and prints what
the page says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.clients.example_packages import EXAMPLES, installed
from tests.clients.node_packages import NodePackages, run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/clients.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all processes that run tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def on_the_page(name: str) -> str:
    """What the page says that the example prints. It must show the example as it is."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    _, found, after = PAGE.partition(f"\n{source}```\n")
    assert found, f"docs/clients.md does not show {name} as it is"
    said = re.match(r"\n```text\n(.*?)```", after, re.DOTALL)
    assert said is not None, f"docs/clients.md does not say what {name} prints"
    return said[1]


def test_curl(live_url: str) -> None:
    assert f"\n{(EXAMPLES / 'curl.sh').read_text()}```\n" in PAGE
    told = run(["bash", str(EXAMPLES / "curl.sh")], EXAMPLES, PROXYSERVE_URL=live_url)
    assert '"content":" harp"' in told and '"push":{"qa":' in told and "data: [DONE]" in told
    assert '"is_greedy":true' in told and '"is_greedy":false' in told


@pytest.mark.parametrize("name", ["openai_python.py", "python_client.py"])
def test_python(live_url: str, name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name)]
    path = {"PYTHONPATH": str(ROOT / "clients/python")}
    assert run(command, ROOT, PROXYSERVE_URL=live_url, **path) == on_the_page(name)


@pytest.mark.slow
def test_typescript(live_url: str, node_packages: NodePackages) -> None:
    told = run(["node", "typescript_client.js"], node_packages.built, PROXYSERVE_URL=live_url)
    assert told == on_the_page("typescript_client.ts")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["langchain_chat.py", "llamaindex_chat.py"])
def test_frameworks(live_url: str, shared: Path, name: str) -> None:
    python = installed(shared / "example-packages")
    told = run([str(python), str(EXAMPLES / name)], EXAMPLES, PROXYSERVE_URL=live_url)
    assert told == on_the_page(name)
