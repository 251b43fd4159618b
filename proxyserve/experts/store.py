"""What survives a restart: which generation of each expert serves, what a rollback goes back to, and the presets.

One SQLite file, `state.db`, in the state folder. Each change is one transaction and is on the disk when its call
returns; whatever instant a process or a machine stops at, the next start finds either all of a change or nothing of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxyserve.errors import InvalidRequest, ProxyserveError, SwapConflict, UnknownModel
from proxyserve.experts.source import ExpertSpec

DATABASE = "state.db"
LOCK = "state.lock"

#: "prxy", in the header of the file: tells our databases from others.
APPLICATION_ID = 0x70727879
#: Goes up when rows get a meaning, or specs a field, that programs of the version before would overlook.
SCHEMA_VERSION = 1

# `names` keeps a name for ever, since its numbers are never used again. A name that has an origin and no published
# generation was deleted: an unchanged command line does not bring it back.
# What came from outside (spec, origin, error, value) is JSON in ASCII: paths may hold what is no UTF-8.
_SCHEMA = f"""
    CREATE TABLE names (name TEXT PRIMARY KEY, last INTEGER NOT NULL, origin TEXT, error TEXT);
    CREATE TABLE generations (
        expert TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('published', 'previous')),
        generation INTEGER NOT NULL, spec TEXT NOT NULL, content_hash TEXT NOT NULL, created REAL NOT NULL,
        PRIMARY KEY (expert, role)
    );
    CREATE TABLE loads (
        expert TEXT NOT NULL, generation INTEGER NOT NULL, spec TEXT NOT NULL, PRIMARY KEY (expert, generation)
    );
    CREATE TABLE presets (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {SCHEMA_VERSION};
"""


class StateError(ProxyserveError):
    """What should survive cannot be read or written; the message names the file and says what to do."""


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A generation that was published. `generation` is never used again for the name, not even after a delete.
    `created` is in seconds since the epoch."""

    expert: str
    generation: int
    spec: ExpertSpec
    content_hash: str
    created: float


@dataclass(frozen=True, slots=True)
class StoredExpert:
    """`previous` is what a rollback goes back to. `origin` is the text by which the command line last brought the name,
    None if it never did: while the command line says the same, it has nothing to say about the expert."""

    name: str
    published: StoredGeneration
    previous: StoredGeneration | None
    origin: str | None


@dataclass(frozen=True, slots=True)
class Restored:
    """All that survived. `experts` are in order of name; `presets` are fusion objects as they were given. `deleted`
    maps the names of deleted experts to their origins, where they had one. `dropped` has a message for each change that
    was under way and for each generation whose spec means nothing to this program. `last_errors` maps names to why
    their last load failed, until a newer generation is published or the expert is deleted."""

    experts: tuple[StoredExpert, ...]
    presets: Mapping[str, Mapping[str, Any]]
    deleted: Mapping[str, str]
    dropped: tuple[str, ...]
    last_errors: Mapping[str, str] = field(default_factory=dict)


class StateStore:
    """Thread-safe. Every method raises StateError if the file cannot be read or written; the change is then not made.
    Each waits for the disk: not for an event loop."""

    def __init__(
        self, connection: sqlite3.Connection, file: Path | None, lock_descriptor: int | None
    ) -> None:
        """Use `open`. `file` None: in memory."""
        self._connection = connection
        self._file = file
        self._lock_descriptor = lock_descriptor
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, folder: Path | None) -> StateStore:
        """The store in `folder`, which is made if need be, or one in memory that nothing survives. Raises StateError if
        the folder cannot be used, another process uses it, or the database in it is damaged or of another version."""
        if folder is None:
            connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.executescript(_SCHEMA)
            return cls(connection, None, None)
        _make_folder(folder)
        descriptor = _lock(folder)
        try:
            file = folder / DATABASE
            if not file.exists():
                _create(file)
            return cls(_connect(file), file, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Lets another process open the folder. Nothing may be called after it, but for `close`."""
        with self._mutex:
            self._connection.close()
            if self._lock_descriptor is not None:
                os.close(self._lock_descriptor)
                self._lock_descriptor = None

    # Restoring ---------------------------------------------------------------------------------------------------

    def restore(self) -> Restored:
        """What is stored. Forgets loads that were under way, after naming them in `dropped`."""
        with self._transaction() as connection:
            names = connection.execute("SELECT name, origin, error FROM names ORDER BY name").fetchall()
            loads = connection.execute(
                "SELECT generation, expert, spec FROM loads ORDER BY expert, generation"
            ).fetchall()
            presets = connection.execute("SELECT name, value FROM presets ORDER BY name").fetchall()
            dropped = [
                f"the load of generation {generation} of expert '{expert}' was not finished; it was of {spec}"
                for generation, expert, spec in loads
            ]
            experts = []
            deleted = {}
            for name, origin, _ in names:
                if self._has_published(name):
                    expert = self._read_expert(name, dropped)
                    experts += [] if expert is None else [expert]
                elif origin is not None:
                    deleted[name] = self._parsed(origin, str)
            restored = Restored(
                tuple(experts),
                {name: self._parsed(value, dict) for name, value in presets},
                deleted,
                tuple(dropped),
                {name: self._parsed(error, str) for name, _, error in names if error is not None},
            )
            connection.execute("DELETE FROM loads")
        return restored

    # Generations -------------------------------------------------------------------------------------------------

    def next_generation(self, expert: str) -> int:
        """A number that this name has never had and will never have again, from 1."""
        with self._transaction() as connection:
            ((generation,),) = connection.execute(
                "INSERT INTO names (name, last) VALUES (?, 1)"
                " ON CONFLICT (name) DO UPDATE SET last = last + 1 RETURNING last",
                (expert,),
            ).fetchall()
        return int(generation)

    def begin(self, expert: str, generation: int, spec: ExpertSpec) -> None:
        """A load has begun: until `publish` or `fail`, a restart reports it as dropped."""
        with self._transaction() as connection:
            self._require_reserved(expert, generation)
            connection.execute(
                "INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (expert, generation, _text(spec.as_json()))
            )

    def fail(self, expert: str, generation: int, error: str) -> None:
        """A load has failed or was given up."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM loads WHERE expert = ? AND generation = ?", (expert, generation))
            connection.execute("UPDATE names SET error = ? WHERE name = ?", (_text(error), expert))

    def publish(self, stored: StoredGeneration, *, origin: str | None = None) -> None:
        """From now on `stored` serves, and the generation that did becomes `previous`. Its load, if one had begun, is
        over. The same generation again, loaded anew, leaves `previous` as it is. `origin` None keeps the one that the
        name has, be it that of a deleted expert."""
        expert = stored.expert
        with self._transaction() as connection:
            self._require_reserved(expert, stored.generation)
            serving = connection.execute(
                "SELECT generation FROM generations WHERE expert = ? AND role = 'published'", (expert,)
            ).fetchone()
            if serving is not None and serving[0] > stored.generation:
                raise ValueError(
                    f"generation {stored.generation} of '{expert}' is older than {serving[0]}, which serves"
                )
            if serving is not None and serving[0] < stored.generation:
                connection.execute(
                    "DELETE FROM generations WHERE expert = ? AND role = 'previous'", (expert,)
                )
                connection.execute("UPDATE generations SET role = 'previous' WHERE expert = ?", (expert,))
            connection.execute(
                "INSERT OR REPLACE INTO generations VALUES (?, 'published', ?, ?, ?, ?)",
                (
                    expert,
                    stored.generation,
                    _text(stored.spec.as_json()),
                    stored.content_hash,
                    stored.created,
                ),
            )
            connection.execute(
                "DELETE FROM loads WHERE expert = ? AND generation = ?", (expert, stored.generation)
            )
            connection.execute(
                "UPDATE names SET origin = coalesce(?, origin), error = NULL WHERE name = ?",
                (None if origin is None else _text(origin), expert),
            )

    def roll_back(self, expert: str) -> StoredExpert:
        """The previous generation serves again. The one that served is forgotten: there is one step back, and never one
        to what was rolled back from. Raises UnknownModel, and SwapConflict where there is nothing to go back to."""
        with self._transaction() as connection:
            if not self._has_published(expert):
                raise UnknownModel(f"There is no expert '{expert}'.", param=None)
            connection.execute("DELETE FROM generations WHERE expert = ? AND role = 'published'", (expert,))
            connection.execute("UPDATE generations SET role = 'published' WHERE expert = ?", (expert,))
            unreadable: list[str] = []
            restored = self._read_expert(expert, unreadable) if self._has_published(expert) else None
            if restored is None:
                reason = (
                    unreadable[0]
                    if unreadable
                    else "it has had no other generation, or was rolled back already"
                )
                raise SwapConflict(f"Expert '{expert}' cannot be rolled back: {reason}.")
        return restored

    def delete(self, expert: str, *, with_origin: bool = False) -> None:
        """Forgets the expert, if there is one, but for the numbers that it has used and, unless `with_origin`, its
        origin, so that the command line does not bring it back."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM generations WHERE expert = ?", (expert,))
            connection.execute("UPDATE names SET error = NULL WHERE name = ?", (expert,))
            if with_origin:
                connection.execute("UPDATE names SET origin = NULL WHERE name = ?", (expert,))

    # Presets -----------------------------------------------------------------------------------------------------

    def put_preset(self, name: str, value: Mapping[str, Any]) -> None:
        """`value` is a fusion object as JSON value."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO presets VALUES (?, ?)", (name, _text(dict(value))))

    def delete_preset(self, name: str) -> None:
        """Forgets the preset, if there is one."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM presets WHERE name = ?", (name,))

    # Rows --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside is done and on the disk afterwards, or, after any error, not done."""
        with self._mutex:
            connection = self._connection
            with _explained(self._file):
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    # SQLite may have rolled back by itself. What cannot be rolled back now (the disk is gone) is by the
                    # next program that opens the file.
                    with suppress(sqlite3.Error):
                        if connection.in_transaction:
                            connection.execute("ROLLBACK")
                    raise

    def _has_published(self, expert: str) -> bool:
        query = "SELECT 1 FROM generations WHERE expert = ? AND role = 'published'"
        return self._connection.execute(query, (expert,)).fetchone() is not None

    def _read_expert(self, name: str, unreadable: list[str]) -> StoredExpert | None:
        """A name that has a published generation, None if its spec means nothing here. Adds to `unreadable`."""
        ((origin,),) = self._connection.execute("SELECT origin FROM names WHERE name = ?", (name,)).fetchall()
        found: dict[str, StoredGeneration] = {}
        for role, generation, spec, content_hash, created in self._connection.execute(
            "SELECT role, generation, spec, content_hash, created FROM generations WHERE expert = ?", (name,)
        ):
            value = self._parsed(spec, dict)
            try:
                readable = ExpertSpec.of_json(value)
            except (
                InvalidRequest,
                LookupError,
                TypeError,
                ValueError,
                AttributeError,
                OverflowError,
            ) as error:
                unreadable.append(
                    f"the {role} generation {generation} of expert '{name}' means nothing to this program"
                    f" ({type(error).__name__}: {error}): {spec}"
                )
            else:
                found[role] = StoredGeneration(name, generation, readable, content_hash, created)
        if "published" not in found:
            return None
        return StoredExpert(
            name,
            found["published"],
            found.get("previous"),
            None if origin is None else self._parsed(origin, str),
        )

    def _require_reserved(self, expert: str, generation: int) -> None:
        last = self._connection.execute("SELECT last FROM names WHERE name = ?", (expert,)).fetchone()
        if last is None or not 1 <= generation <= last[0]:
            raise ValueError(f"generation {generation} of '{expert}' was never reserved")

    def _parsed(self, text: str, kind: type[Any]) -> Any:
        """The JSON value of a column. Raises StateError where it is none or no `kind`."""
        try:
            value = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            value = None
        if not isinstance(value, kind):
            raise _damaged(self._file, f"a row of it should hold JSON and holds {str(text)[:80]!r}")
        return value


# The folder ----------------------------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    """With its parents, readable by its owner only, and on the disk."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)
    except OSError as error:
        raise StateError(f"The state folder {folder} cannot be made: {error.strerror}.") from error


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder until it is closed, at the latest by the end of the process. The file stays:
    who removes a lock file removes it under somebody who has just opened it."""
    file = folder / LOCK
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StateError(f"{file} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateError(
            f"The state folder {folder} is in use by another server; stop that one, or use another folder."
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise StateError(f"{file} cannot be locked: {error.strerror}. Use a local disk.") from error
    return descriptor


def _create(file: Path) -> None:
    """An empty store. It gets its name when it is whole, so a `state.db` without tables is never one of ours."""
    journal = file.with_name(f"{file.name}-journal")
    if journal.exists():
        # SQLite would play it into the new file.
        raise StateError(
            f"{journal} is there without {file.name}, to which it belongs. Put the two together again, or move it away"
            " to start empty."
        )
    unfinished = file.with_name(f"{file.name}.new")
    with _explained(file):
        try:
            for leftover in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
                leftover.unlink(missing_ok=True)
            connection = sqlite3.connect(unfinished, isolation_level=None)
            try:
                connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            finally:
                connection.close()
            unfinished.chmod(0o600)
            unfinished.replace(file)
            sync_folder(file.parent)
        except OSError as error:
            raise StateError(f"{file} cannot be made: {error.strerror}.") from error


def _connect(file: Path) -> sqlite3.Connection:
    """To a whole database of ours. Raises StateError."""
    with _explained(file):
        connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            # A rollback journal rather than WAL: between changes everything is in the one file (a plain copy of it is a
            # backup), it works on network file systems, and SQLite notices if the file is moved away under it. WAL
            # would make a change cheaper, of which there are a few a day. EXTRA rather than FULL: with a journal, FULL
            # leaves the removal of the journal, which is what commits, in the cache of the file system, and a power
            # failure would take the last change back.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")
            ((identity,),) = connection.execute("PRAGMA application_id").fetchall()
            ((version,),) = connection.execute("PRAGMA user_version").fetchall()
            if identity != APPLICATION_ID:
                raise _damaged(file, "it is no state of proxyserve")
            if version != SCHEMA_VERSION:
                raise StateError(
                    f"{file} has format {version}, this program reads {SCHEMA_VERSION}. Use the version of proxyserve"
                    " that wrote it, or move it away to start empty."
                )
            ((verdict,), *_) = connection.execute("PRAGMA integrity_check").fetchall()
            if verdict != "ok":
                raise _damaged(file, str(verdict))
        except BaseException:
            connection.close()
            raise
        return connection


def sync_folder(folder: Path) -> None:
    """Puts the names of the files in `folder` on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _damaged(file: Path | None, what: str) -> StateError:
    return StateError(
        f"{file} is damaged: {what}. Put a backup in its place, or move it away (and {DATABASE}-journal, if there is"
        " one) to start empty."
    )


@contextmanager
def _explained(file: Path | None) -> Iterator[None]:
    """Turns what SQLite says of the file into StateError; what it says of its caller passes."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorname", None)
        if code is None:  # from Python, of a column that is no UTF-8
            raise _damaged(file, str(error)) from error
        why = "it was moved away while in use" if code == "SQLITE_READONLY_DBMOVED" else str(error)
        raise StateError(
            f"{file} cannot be read or written: {why}. Check the disk, and who may write there, and start again."
        ) from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise
        raise _damaged(file, str(error)) from error
