"""OpenAI's own TypeScript package, unmodified, against a live server. `openai_typescript/drive.ts` is the program; it
is checked by the TypeScript compiler first. Version 6 of the package is the newest that runs on Node 20."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

SOURCE = Path(__file__).parent / "openai_typescript"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program, beside the packages that it needs."""
    if shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed")
    folder = tmp_path_factory.mktemp("typescript")
    shutil.copytree(
        SOURCE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules", "built")
    )
    _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
    _run(["npx", "--no-install", "tsc"], folder)
    return folder / "built" / "drive.js"


@pytest.mark.slow
def test_a_typescript_application_works_unmodified(live_url: str, program: Path) -> None:
    seen: dict[str, Any] = json.loads(_run(["node", str(program), live_url], program.parent))
    assert {"atlas", "atlas+qa"} <= set(seen["models"])
    assert seen["chat"] == seen["streamed"] == seen["helper"] != ""
    assert seen["fusion"]["generations"] == {"qa": 1}
    assert seen["called"]["name"] == "play"
    assert seen["called"]["arguments"]["instrument"] in ("harp", "flute")
    assert seen["formed"]["instrument"] in ("harp", "flute")
    assert seen["responded"] == [seen["chat"]] * 2
    assert seen["completion"] == 4
    assert seen["refusals"] == [
        {"status": 404, "param": "model", "code": "model_not_found"},
        {"status": 400, "param": "temperature", "code": "invalid_value"},
    ]
    assert seen["abandoned"] == 2
    _wait_until_idle(live_url)


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _wait_until_idle(url: str) -> None:
    """The abandoned stream gave its lanes back."""
    for _ in range(100):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        if all(line.endswith(" 0.0") for line in lines if line.startswith("proxyserve_num_requests_running")):
            return
    pytest.fail("a request still runs")
