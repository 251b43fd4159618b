"""Failures to inject into every phase of a change."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxyserve.errors import LoadError
from proxyserve.experts import loading
from proxyserve.experts.store import StateError
from tests.experts.swapping import Server


class Faults:
    """Failures in the phases of a swap. `arm` one for an expert: it happens once, on that expert's behalf. `happened`
    counts them."""

    POINTS = (
        "read",
        "files change",
        "verify",
        "warm",
        "adopt",
        "adopt halfway",
        "room",
        "publish",
        "roll back",
        "delete",
        "audit begun",
        "audit done",
        "audit failed",
    )

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self.happened: Counter[str] = Counter()
        self._armed: set[tuple[str, str]] = set()
        self._loading = ""  # the expert that the one loader thread is at
        self._server = server
        manager, library, engine = server.manager, server.library, server.plain
        store, audit, room = manager._store, manager._audit, manager._room
        load, verify, warm = library.load, library.verify, library.warm
        adopt, make = engine.adopt, room.make
        publish, roll_back, delete, record = store.publish, store.roll_back, store.delete, audit.record

        def load_(recipe: Any, name: str, *rest: Any, **named: Any) -> Any:
            self._loading = name
            self._raise("read", name, RuntimeError("a bug in a reader"))
            return load(recipe, name, *rest, **named)

        def hash_(path: Path, *rest: Any) -> str:
            digest = content_hash(path, *rest)
            if self._due("files change", self._loading):
                file = path / "model.safetensors"
                os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
            return digest

        def verify_(loaded: Any) -> None:
            self._raise("verify", self._loading, LoadError("not as it should be"))
            verify(loaded)

        def warm_(*arguments: Any) -> None:
            self._raise("warm", self._loading, MemoryError())
            warm(*arguments)

        def adopt_(*arguments: Any) -> None:
            self._raise("adopt", self._loading, RuntimeError("a bug in adopt"))
            adopt(*arguments)
            self._raise("adopt halfway", self._loading, RuntimeError("a bug in adopt"))

        def make_(recipe: Any, generation: Any) -> None:
            usual = room.policy
            if self._due("room", generation.expert):
                room.policy = replace(usual, limit=1)
            try:
                make(recipe, generation)
            finally:
                room.policy = usual

        def publish_(stored: Any, **named: Any) -> None:
            self._raise("publish", stored.expert, StateError("the disk is full"))
            publish(stored, **named)

        def roll_back_(expert: str) -> Any:
            self._raise("roll back", expert, StateError("the disk is full"))
            return roll_back(expert)

        def delete_(expert: str) -> None:
            self._raise("delete", expert, StateError("the disk is full"))
            delete(expert)

        def record_(action: str, **named: Any) -> None:
            self._raise(f"audit {named['outcome']}", named.get("expert", ""), StateError("the disk is full"))
            record(action, **named)

        content_hash = loading.content_hash
        patch.setattr(loading, "content_hash", hash_)
        for owner, name, replacement in (
            (library, "load", load_),
            (library, "verify", verify_),
            (library, "warm", warm_),
            (engine, "adopt", adopt_),
            (room, "make", make_),
            (store, "publish", publish_),
            (store, "roll_back", roll_back_),
            (store, "delete", delete_),
            (audit, "record", record_),
        ):
            patch.setattr(owner, name, replacement)

    def arm(self, point: str, expert: str) -> None:
        assert point in self.POINTS
        self._armed.add((point, expert))

    def disarm(self, expert: str) -> None:
        self._armed = {(point, armed) for point, armed in self._armed if armed != expert}

    def _due(self, point: str, expert: str) -> bool:
        if (point, expert) not in self._armed:
            return False
        self._armed.discard((point, expert))
        self.happened[point] += 1
        return True

    def _raise(self, point: str, expert: str, error: Exception) -> None:
        if self._due(point, expert):
            raise error


class Gate:
    """Holds the loader thread at the beginning of a load until it is opened."""

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()
        load = server.library.load

        def wait(*arguments: Any, **named: Any) -> Any:
            self.reached.set()
            assert self._open.wait(20)
            return load(*arguments, **named)

        patch.setattr(server.library, "load", wait)

    def open(self) -> None:
        self._open.set()
