"""The process that brings models from the hub, with a cache and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxyserve.errors import LoadError
from proxyserve.experts.hub import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with `org/name`, and nothing that answers at the hub's address."""
    home = tmp_path / "home"
    folder = home / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_what_is_in_the_cache_needs_no_network(cache: Path) -> None:
    assert fetch("org/name") == cache / "snapshots" / COMMIT
    assert fetch(f"org/name@{COMMIT}") == cache / "snapshots" / COMMIT


@pytest.mark.parametrize("hub_id", ["org/nothing", "org/name@v2"])
def test_what_cannot_be_had_is_a_load_error_of_one_line(cache: Path, hub_id: str) -> None:
    with pytest.raises(LoadError) as caught:
        fetch(hub_id)
    message = caught.value.message
    assert message.startswith(f"'{hub_id}' cannot be had from the hub: ")
    assert "\n" not in message and "Connect" in message


def test_the_process_says_one_line(cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxyserve.experts.hub", "org/nothing"],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
