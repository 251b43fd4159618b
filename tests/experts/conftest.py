"""A server over tiny models whose experts can be swapped, and failures for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experts.contents import World, build_world
from tests.experts.faults import Faults
from tests.experts.swapping import Server, open_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def server(world: World, tmp_path: Path) -> Iterator[Server]:
    """With the base alone."""
    with open_world(world, state_dir=tmp_path / "state", max_batch=48) as server:
        yield server


@pytest.fixture
def faults(server: Server, monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(server, monkeypatch)
