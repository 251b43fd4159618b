"""The demo family, served once for all tests of the command line, in a thread of the test process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyserve.cli.opening import open_server
from proxyserve.cli.settings import ServerOptions, make_settings
from proxyserve.demo.family import family_paths
from proxyserve.models.family import ExpertSource
from tests.api.live import Live, serve


@pytest.fixture(scope="session")
def demo() -> Iterator[Live]:
    family = family_paths()
    experts = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    given = ServerOptions(
        dtype="float32",
        kv_memory="64MiB",
        threads="1",
        explain_to_all=True,
        preset=['house={"rule": "dynamic", "experts": {"qa": 1}}'],
    )
    settings = make_settings(given)
    with open_server(
        family.base, experts, settings, served_name=None, progress=lambda message: None
    ) as opened:
        opened.engine.start()
        with serve(opened.engine, settings.server, opened.experts) as live:
            yield live
        opened.engine.close()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For commands in processes of their own: without the settings of whoever runs the tests, and with a home that is
    empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROXYSERVE_", "XDG_"))}
    return {**kept, "HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": "1"}
