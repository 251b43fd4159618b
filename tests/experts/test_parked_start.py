"""A restart that has no room for all that was published."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from proxyserve.errors import ExpertParked
from proxyserve.experts.source import ExpertSpec, Source
from tests.experts.shelf import Shelf, answer, make_shelf, open_state, put

KV = 2**17


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("made"), "llama")


@pytest.fixture
def root(made: Shelf, tmp_path: Path) -> Path:
    return shutil.copytree(made.root, tmp_path / "root")


def publish_two(root: Path, state: Path) -> tuple[list[int], int]:
    """`qa` and `other`; returns what `other` answers, and the bytes of the server with `qa` alone."""
    with open_state(root / "atlas", state, roots=[root], kv_memory=KV) as opened:
        put(opened, "qa", ExpertSpec(Source("qa"), Source("small")))
        alone = opened.engine.engine.residents.bytes
        put(opened, "other", ExpertSpec(Source("record"), Source("small")))
        return answer(opened, "other").tokens, alone


def test_experts_without_room_are_parked_and_woken(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    tokens, alone = publish_two(root, state)
    with open_state(
        root / "atlas", state, roots=[root], kv_memory=KV, memory=alone, evict_idle=True
    ) as opened:
        states = {status.name: status.state for status in opened.experts.experts()}
        assert sorted(states.values()) == ["parked", "published"], opened.messages
        [parked] = [name for name, found in states.items() if found == "parked"]
        assert any("parked" in message for message in opened.messages)
        with pytest.raises(ExpertParked):
            answer(opened, parked)
        asyncio.run(opened.experts.wake(parked, 30.0))
        assert opened.experts.expert(parked).state == "published"
        assert answer(opened, "other").tokens == tokens if parked == "other" else True
        assert opened.engine.engine.residents.bytes <= alone
        [evicted] = [status.name for status in opened.experts.experts() if status.state == "parked"]
        assert evicted != parked


def test_they_are_dropped_where_nothing_may_be_parked(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    _, alone = publish_two(root, state)
    with open_state(root / "atlas", state, roots=[root], kv_memory=KV, memory=alone) as opened:
        states = {status.name: status.state for status in opened.experts.experts()}
        assert sorted(states.values()) == ["failed", "published"]
        [failed] = [name for name, found in states.items() if found == "failed"]
        assert "--evict-idle" in str(opened.experts.expert(failed).last_error)
        opened.experts.delete(failed, actor="operator")
        assert failed not in {status.name for status in opened.experts.experts()}
    with open_state(root / "atlas", state, roots=[root], kv_memory=KV) as opened:
        assert failed not in {status.name for status in opened.experts.experts()}


def test_what_has_just_come_is_not_the_first_to_go(root: Path, tmp_path: Path) -> None:
    _, alone = publish_two(root, tmp_path / "other")
    with open_state(
        root / "atlas", tmp_path / "state", roots=[root], kv_memory=KV, memory=alone, evict_idle=True
    ) as opened:
        put(opened, "qa", ExpertSpec(Source("qa"), Source("small")))
        answer(opened, "qa")
        put(opened, "other", ExpertSpec(Source("record"), Source("small")))
        states = {status.name: status.state for status in opened.experts.experts()}
        assert states == {"other": "published", "qa": "parked"}
        with pytest.raises(ExpertParked):
            answer(opened, "qa")
        asyncio.run(opened.experts.wake("qa", 30.0))
        assert {status.name: status.state for status in opened.experts.experts()} == {
            "other": "parked",
            "qa": "published",
        }
