"""OpenAI's own TypeScript package, unmodified, against a live server. `openai_typescript/drive.ts` is the program; it
is checked by the TypeScript compiler first. Version 6 of the package is the newest that runs on Node 20."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.clients.node_packages import NodePackages, run


@pytest.mark.slow
def test_a_typescript_application_works_unmodified(live_url: str, node_packages: NodePackages) -> None:
    seen: dict[str, Any] = json.loads(run(["node", "drive.js", live_url], node_packages.built))
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


def _wait_until_idle(url: str) -> None:
    """The abandoned stream gave its lanes back."""
    for _ in range(100):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        if all(line.endswith(" 0.0") for line in lines if line.startswith("proxyserve_num_requests_running")):
            return
    pytest.fail("a request still runs")
