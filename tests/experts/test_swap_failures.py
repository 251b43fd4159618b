"""A change that fails, in whichever phase, leaves what served and takes nothing with it."""

from __future__ import annotations

from typing import Any

import pytest

from proxyserve.errors import LoadError
from proxyserve.experts.generation import Phase
from proxyserve.experts.store import StateError
from tests.experts.contents import World
from tests.experts.faults import Faults
from tests.experts.kinds import proxy_kind
from tests.experts.swapping import Server, check_answer

QA = proxy_kind({"qa": 1.0}, range(5, 26))

#: Failures that leave a generation FAILED, and what its error says.
FAILURES = {
    "read": "server's log",
    "files change": "changed while it was being loaded",
    "verify": "not as it should be",
    "warm": "MemoryError",
    "adopt": "server's log",
    "adopt halfway": "server's log",
    "room": "are left",
    "publish": "disk is full",
}


@pytest.mark.parametrize("point", FAILURES)
async def test_a_failure_leaves_the_old_generation_and_nothing_of_the_new(
    server: Server, faults: Faults, world: World, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    await server.put("qa", "first")
    before = server.holdings()
    faults.arm(point, "qa")
    status = await server.put("qa", world.spec(world.changing))
    assert (status.generation, status.previous, status.state) == (1, None, "published")
    failed = status.generations[0]
    assert (failed.generation, failed.phase) == (2, Phase.FAILED)
    assert FAILURES[point] in (failed.error or "") and status.last_error == failed.error
    assert faults.happened == {point: 1}
    await check_answer(server, QA, 1)
    await server.quiet()
    assert server.holdings() == before
    status = await server.put("qa", "second")
    assert (status.generation, status.last_error) == (3, None)
    await check_answer(server, QA, 3, "after")


@pytest.mark.parametrize("defect", ["damaged", "other tokenizer", "NaN", "adapter for another model"])
async def test_files_that_cannot_be_served(server: Server, world: World, defect: str) -> None:
    await server.put("qa", "first")
    before = server.holdings()
    try:
        status = await server.put("qa", world.broken[defect])
    except LoadError:  # seen at once, from the headers
        status = server.manager.expert("qa")
    else:
        assert status.last_error
    assert (status.generation, status.state) == (1, "published")
    await server.quiet()
    assert server.holdings() == before
    await check_answer(server, QA, 1)


async def test_an_audit_log_that_cannot_be_written_stops_a_change_before_it_begins(
    server: Server, faults: Faults
) -> None:
    await server.put("qa", "first")
    await server.put("qa", "second")
    before = server.holdings()
    for change in (
        lambda: server.put("qa", "merge"),
        lambda: server.roll_back("qa"),
        lambda: server.delete("qa"),
    ):
        faults.arm("audit begun", "qa")
        with pytest.raises(StateError):
            await change()
        status = server.manager.expert("qa")
        assert (status.generation, status.previous, status.state) == (2, 1, "published")
        assert server.holdings() == before
    await check_answer(server, QA, 2)
    assert (await server.put("qa", "merge")).state == "published"


async def test_an_audit_log_that_fails_too_late_undoes_nothing(server: Server, faults: Faults) -> None:
    await server.put("qa", "first")
    faults.arm("audit done", "qa")
    status = await server.put("qa", "second")
    assert (status.generation, status.state, status.last_error) == (2, "published", None)
    await server.quiet()
    assert (server.manager.expert("qa").generation, server.manager.expert("qa").last_error) == (2, None)
    assert server.manager.counters.failures == {}
    await check_answer(server, QA, 2)
    faults.arm("audit done", "qa")
    assert (await server.roll_back("qa")).generation == 1
    faults.arm("audit done", "qa")
    assert (await server.delete("qa")).state == "deleted"


async def test_a_rollback_that_cannot_be_stored_changes_nothing(server: Server, faults: Faults) -> None:
    await server.put("qa", "first")
    await server.put("qa", "second")
    faults.arm("roll back", "qa")
    with pytest.raises(StateError):
        await server.roll_back("qa")
    assert (server.manager.expert("qa").generation, server.manager.expert("qa").previous) == (2, 1)
    await check_answer(server, QA, 2)
    assert (await server.roll_back("qa")).generation == 1


async def test_a_delete_that_cannot_be_stored_changes_nothing(server: Server, faults: Faults) -> None:
    await server.put("qa", "first")
    faults.arm("delete", "qa")
    with pytest.raises(StateError):
        await server.delete("qa")
    assert server.manager.expert("qa").state == "published"
    await check_answer(server, QA, 1)
    assert (await server.delete("qa")).state == "deleted"


async def test_the_loader_survives_what_nobody_expected(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even a failure that cannot be written down."""

    def full(*_: Any) -> None:
        raise StateError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(server.manager._store, "fail", full)
        faults = Faults(server, patch)
        faults.arm("verify", "qa")
        assert (await server.put("qa", "first")).state == "failed"
        await server.quiet()
    assert "did not end as it should" in caplog.text
    assert (await server.put("qa", "first")).state == "published"


async def test_weights_that_only_a_failed_load_needed_are_gone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shared them with an expert that was deleted while it was loading."""
    start = server.holdings()
    await server.put("qa", "first")

    def delete_and_fail(_: Any) -> None:
        server.manager.delete("qa", actor="operator")
        raise LoadError("not as it should be")

    with monkeypatch.context() as patch:
        patch.setattr(server.library, "verify", delete_and_fail)
        assert (await server.put("record", "first")).state == "failed"
    await server.delete("record")
    await server.quiet()
    assert server.holdings() == start
    await server.put("qa", "first")

    def delete_and_fail_early(*_: Any, **__: Any) -> None:
        server.manager.delete("qa", actor="operator")
        raise LoadError("not as it should be")

    with monkeypatch.context() as patch:
        patch.setattr("proxyserve.experts.loading.make_expert", delete_and_fail_early)
        assert (await server.put("record", "first")).state == "failed"
    await server.delete("record")
    await server.quiet()
    assert server.holdings() == start
