"""Who changed what and when: one JSON object per line, in `audit.jsonl` in the state folder.

Lines are only ever added. Actors are hashes of keys, never keys, and no prompt comes near this file.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from proxyserve.experts.store import StateError, sync_folder

AUDIT = "audit.jsonl"

Outcome = Literal["begun", "done", "failed"]

_logger = logging.getLogger("proxyserve.audit")
logger = logging.getLogger(__name__)


class AuditLog:
    """Thread-safe. The file may be moved away at any time (logrotate); the next line then begins a new one."""

    def __init__(self, file: Path | None) -> None:
        """Use `open`."""
        self._file = file
        self._descriptor: int | None = None
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, folder: Path | None) -> AuditLog:
        """The log in `folder`, which exists, or, without one, the standard logger `proxyserve.audit` at INFO. Raises
        StateError if the file cannot be written."""
        if folder is None:
            return cls(None)
        log = cls(folder / AUDIT)
        log._opened(folder / AUDIT)
        return log

    def conclude(self, action: str, **fields: Any) -> None:
        """`record` for what has happened and cannot be taken back: that it had begun is in the log already, so a line
        that cannot be written is reported to the program's own log."""
        try:
            self.record(action, **fields)
        except StateError:
            logger.exception("%s: %s", action, fields)

    def record(
        self,
        action: str,
        *,
        actor: str,
        outcome: Outcome,
        expert: str | None = None,
        generation: int | None = None,
        content_hash: str | None = None,
        detail: str | None = None,
    ) -> None:
        """Adds a line, which is on the disk afterwards; what is None is left out of it. Raises StateError if it cannot
        be written."""
        fields = {
            "actor": actor,
            "action": action,
            "expert": expert,
            "generation": generation,
            "content_hash": content_hash,
            "outcome": outcome,
            "detail": detail,
        }
        with self._mutex:
            time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            given = {name: value for name, value in fields.items() if value is not None}
            line = json.dumps({"time": time, **given})
            if self._file is None:
                _logger.info("%s", line)
            else:
                self._append(self._file, f"{line}\n".encode("ascii"))

    def close(self) -> None:
        with self._mutex:
            self._close()

    def _append(self, file: Path, line: bytes) -> None:
        """In one write: a line is whole, or is the last one."""
        descriptor = self._opened(file)
        try:
            written = os.write(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            self._close()
            raise StateError(f"{file} cannot be written: {error.strerror}.") from error
        if written < len(line):
            self._close()  # opening it again ends the torn line
            raise StateError(f"{file} cannot be written: there is no room on the disk.")

    def _opened(self, file: Path) -> int:
        """A descriptor of the file that has the name now, at the beginning of a line. Raises StateError."""
        if self._descriptor is not None and _is_at(self._descriptor, file):
            return self._descriptor
        self._close()
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
            sync_folder(file.parent)
            size = os.fstat(self._descriptor).st_size
            if size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n":
                os.write(self._descriptor, b"\n")
        except OSError as error:
            self._close()
            raise StateError(f"{file} cannot be opened: {error.strerror}.") from error
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_audit(file: Path) -> list[dict[str, Any]]:
    """The lines of an audit log, oldest first. Lines that are not whole, because a machine stopped while they were
    written, are left out. Raises OSError."""
    entries = []
    for line in file.read_bytes().split(b"\n"):
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file has that name still, and not another one or none."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False
