"""Every line of the audit log is whole or the last, stays readable, and is on the disk when its call returns."""

from __future__ import annotations

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from proxyserve.experts.audit import AuditLog, read_audit
from proxyserve.experts.store import StateError

ACTOR = "key:0123456789ab"


def details(file: Path) -> list[str]:
    return [entry["detail"] for entry in read_audit(file)]


def test_a_line_says_who_when_and_what(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path)
    before = datetime.now(UTC)
    log.record(
        "expert.put",
        actor=ACTOR,
        expert="qa",
        generation=3,
        content_hash="ab" * 32,
        outcome="failed",
        detail="NaN on the probe",
    )
    log.record("drain", actor="operator", outcome="done")
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
    time = first.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert abs((datetime.fromisoformat(time) - before).total_seconds()) < 60
    assert first == {
        "actor": ACTOR,
        "action": "expert.put",
        "expert": "qa",
        "generation": 3,
        "content_hash": "ab" * 32,
        "outcome": "failed",
        "detail": "NaN on the probe",
    }
    assert set(second) == {"time", "actor", "action", "outcome"}


def test_lines_are_added_to_those_of_earlier_runs(tmp_path: Path) -> None:
    for run in range(3):
        log = AuditLog.open(tmp_path)
        log.record("start", actor="start-up", outcome="done", detail=str(run))
        log.close()
    assert details(tmp_path / "audit.jsonl") == ["0", "1", "2"]


def test_nothing_in_a_detail_breaks_a_line(tmp_path: Path) -> None:
    awkward = 'a\nb\r\u2028"\\\x00' + os.fsdecode(b"\xff")
    log = AuditLog.open(tmp_path)
    log.record("expert.put", actor=ACTOR, outcome="failed", detail=awkward)
    log.close()
    assert (tmp_path / "audit.jsonl").read_bytes().count(b"\n") == 1
    assert details(tmp_path / "audit.jsonl") == [awkward]


def test_a_log_cut_anywhere_keeps_its_whole_lines_and_all_later_ones(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path)
    log.record("preset.put", actor=ACTOR, outcome="done", detail="first")
    log.record("preset.put", actor=ACTOR, outcome="done", detail="second")
    log.close()
    file = tmp_path / "audit.jsonl"
    content = file.read_bytes()
    first = content.index(b"\n")
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        # What is whole but for its end of line is whole.
        whole = ["first"] * (length >= first) + ["second"] * (length >= len(content) - 1)
        assert details(file) == whole
        log = AuditLog.open(tmp_path)
        log.record("preset.put", actor=ACTOR, outcome="done", detail="third")
        log.close()
        assert details(file) == [*whole, "third"]
        assert file.read_bytes().startswith(content[:length])


def test_zeros_that_a_power_failure_left_are_no_line(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_bytes(b"\x00" * 100)
    log = AuditLog.open(tmp_path)
    log.record("drain", actor=ACTOR, outcome="done", detail="after")
    log.close()
    assert details(tmp_path / "audit.jsonl") == ["after"]


def test_a_line_is_one_write_and_then_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog.open(tmp_path)
    calls: list[str] = []
    write, sync = os.write, os.fsync

    def spied_write(descriptor: int, line: bytes) -> int:
        calls.append(line.decode())
        return write(descriptor, line)

    def spied_sync(descriptor: int) -> None:
        calls.append("sync")
        sync(descriptor)

    monkeypatch.setattr(os, "write", spied_write)
    monkeypatch.setattr(os, "fsync", spied_sync)
    log.record("drain", actor=ACTOR, outcome="begun")
    log.record("drain", actor=ACTOR, outcome="done")
    first, *rest = calls
    assert first.endswith("\n")
    assert json.loads(first)["outcome"] == "begun"
    assert rest[0] == rest[2] == "sync"
    assert json.loads(rest[1])["outcome"] == "done"
    log.close()


def test_threads_lose_no_line_while_the_file_is_moved_away(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path)
    lines = [f"{number}" * 500 for number in range(200)]

    def write(number: int) -> None:
        log.record("drain", actor=ACTOR, outcome="done", detail=lines[number])
        with suppress(FileNotFoundError):
            (tmp_path / "audit.jsonl").rename(tmp_path / f"audit.jsonl.{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    log.close()
    found = [detail for file in tmp_path.iterdir() for detail in details(file)]
    assert sorted(found) == sorted(lines)


def test_after_the_file_was_moved_away_a_new_one_begins(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path)
    log.record("drain", actor=ACTOR, outcome="done", detail="before")
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit.jsonl.1")
    log.record("drain", actor=ACTOR, outcome="done", detail="after")
    (tmp_path / "audit.jsonl").unlink()
    (tmp_path / "audit.jsonl").touch()
    log.record("drain", actor=ACTOR, outcome="done", detail="in the operator's own")
    log.close()
    assert details(tmp_path / "audit.jsonl.1") == ["before"]
    assert details(tmp_path / "audit.jsonl") == ["in the operator's own"]


def test_a_full_disk_is_an_error_and_its_torn_line_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog.open(tmp_path)
    log.record("drain", actor=ACTOR, outcome="done", detail="before")
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
        with pytest.raises(StateError, match=r"audit\.jsonl cannot be written: there is no room"):
            log.record("drain", actor=ACTOR, outcome="done", detail="torn")
    log.record("drain", actor=ACTOR, outcome="done", detail="after")
    log.close()
    assert details(tmp_path / "audit.jsonl") == ["before", "after"]


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(StateError, match=r"audit\.jsonl cannot be opened: Is a directory"):
        AuditLog.open(tmp_path)


def test_without_a_folder_the_lines_go_to_the_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    log = AuditLog.open(None)
    with caplog.at_level(logging.INFO, logger="proxyserve.audit"):
        log.record("expert.delete", actor=ACTOR, expert="qa", outcome="done")
    log.close()
    ((name, level, line),) = caplog.record_tuples
    assert (name, level) == ("proxyserve.audit", logging.INFO)
    assert json.loads(line)["action"] == "expert.delete"
    assert list(tmp_path.iterdir()) == []
