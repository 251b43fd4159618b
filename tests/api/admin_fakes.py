"""A control plane without models: the test says when a generation moves on, is published or fails."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI

from proxyserve.api import admin
from proxyserve.api.auth import AuthMiddleware
from proxyserve.api.documentation import install_openapi
from proxyserve.api.errors import install_error_handlers
from proxyserve.api.key_ring import Keys
from proxyserve.api.limits import BodyLimitMiddleware
from proxyserve.api.metrics import Metrics
from proxyserve.api.request_id import RequestIdMiddleware
from proxyserve.api.server import listen
from proxyserve.config import ServerConfig
from proxyserve.errors import InvalidRequest, SwapConflict, UnknownModel
from proxyserve.experts.generation import Phase, require_legal
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.experts.status import Change, ExpertStatus, GenerationStatus
from tests.api.live import wait_until

USER_KEY, ADMIN_KEY = "sk-user", "sk-admin"


class ExpertControl(Protocol):
    """What the routes need of a manager."""

    def experts(self) -> list[ExpertStatus]: ...
    def expert(self, name: str) -> ExpertStatus: ...
    def put(self, name: str, spec: ExpertSpec, *, actor: str) -> Change: ...
    def rollback(self, name: str, *, actor: str) -> Change: ...
    def delete(self, name: str, *, actor: str) -> Change: ...
    async def settled(self, change: Change) -> ExpertStatus: ...
    def presets(self) -> Mapping[str, Mapping[str, Any]]: ...
    def put_preset(self, name: str, value: Mapping[str, Any], *, actor: str) -> None: ...
    def delete_preset(self, name: str, *, actor: str) -> None: ...
    def drain(self, *, actor: str) -> None: ...


def generation_status(number: int, phase: Phase, spec: ExpertSpec, **more: Any) -> GenerationStatus:
    formats = {"tuned": _format(spec.tuned)}
    if spec.untuned is not None:
        formats["untuned"] = _format(spec.untuned)
    fields: dict[str, Any] = {
        "bytes": 3 * 2**20,
        "requests": 0,
        "progress": None,
        "content_hash": "",
        "created": 1_700_000_000.5,
        "error": None,
        "seconds": {},
    }
    return GenerationStatus(number, phase, spec, formats, **{**fields, **more})


def _format(source: Source) -> str:
    return "merge" if source.merge else source.format or "folder"


class FakeManager:
    """Does what it is told. `advance`, `publish`, `fail` and `retire` say what becomes of a change; with `at_once` all
    changes succeed before they return; with `steps`, each look at an expert that is loading is one of them further on.
    `refusal` is raised by every change. `waiting` counts who waits in `settled`,
    and `waited_for` is set while somebody does."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.refusal: Exception | None = None
        self.steps: list[tuple[Phase, float | None]] = []
        self.actions: list[tuple[Any, ...]] = []
        self.changes: list[Change] = []
        self.drained = False
        self.waiting = 0
        self.waited_for = asyncio.Event()
        self._lock = threading.RLock()
        self._experts: dict[str, ExpertStatus] = {}
        self._presets: dict[str, dict[str, Any]] = {}
        self._settled: dict[Change, Future[ExpertStatus]] = {}

    # What the routes call.

    def experts(self) -> list[ExpertStatus]:
        return [self._experts[name] for name in sorted(self._experts)]

    def expert(self, name: str) -> ExpertStatus:
        with self._lock:
            if self.steps and self._found(name).generations[0].phase.is_loading:
                self._take(name, *self.steps.pop(0))
            return self._found(name)

    def put(self, name: str, spec: ExpertSpec, *, actor: str) -> Change:
        with self._lock:
            self._record("put", name, spec, actor)
            old = self._experts.get(name)
            if old is not None and any(entry.phase.is_loading for entry in old.generations):
                raise SwapConflict(f"Another change of '{name}' is under way; wait for it.")
            number = 1 if old is None else old.generations[0].generation + 1
            entry = generation_status(number, Phase.LOADING, spec, progress=0.0)
            if old is None:
                old = ExpertStatus(name, "loading", None, None, spec.protected, (), None)
            self._experts[name] = dataclasses.replace(old, generations=(entry, *old.generations))
            change = self._begun(name, number)
            if self.at_once:
                self.publish(name)
            return change

    def rollback(self, name: str, *, actor: str) -> Change:
        with self._lock:
            self._record("rollback", name, actor)
            status = self._found(name)
            if status.previous is None:
                raise SwapConflict(f"Expert '{name}' has no earlier generation in memory to go back to.")
            change = self._begun(name, status.previous)
            if self.at_once:
                self.publish(name, status.previous)
            return change

    def delete(self, name: str, *, actor: str) -> Change:
        with self._lock:
            self._record("delete", name, actor)
            number = self._found(name).generations[0].generation
            change = self._begun(name, number)
            if self.at_once:
                self.retire(name)
            return change

    async def settled(self, change: Change) -> ExpertStatus:
        """Raises UnknownModel for an expert that is gone already."""
        self._found(change.expert)
        self.waiting += 1
        self.waited_for.set()
        try:
            # Cancelling a wrapped future would cancel the change for everybody.
            return await asyncio.shield(asyncio.wrap_future(self._settled[change]))
        finally:
            self.waiting -= 1
            self.waited_for.clear()

    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        return dict(self._presets)

    def put_preset(self, name: str, value: Mapping[str, Any], *, actor: str) -> None:
        self._record("put_preset", name, value, actor)
        if name in self._experts:
            raise InvalidRequest(f"'{name}' is an expert; choose another name.", param="name")
        self._presets[name] = dict(value)

    def delete_preset(self, name: str, *, actor: str) -> None:
        self._record("delete_preset", name, actor)
        if name not in self._presets:
            raise UnknownModel(f"There is no preset '{name}' here.")
        del self._presets[name]

    def drain(self, *, actor: str) -> None:
        self._record("drain", actor)
        self.drained = True

    # What tests call.

    def advance(self, name: str, phase: Phase, progress: float | None = None) -> None:
        """Move the newest generation."""
        with self._lock:
            newest = self._found(name).generations[0]
            if phase is not newest.phase:
                require_legal(newest.phase, phase)
            self._change(name, newest.generation, phase=phase, progress=progress)

    def publish(self, name: str, number: int | None = None) -> None:
        """Let the newest generation (or that one) serve; the one before it stands by."""
        with self._lock:
            status = self._found(name)
            number = status.generations[0].generation if number is None else number
            if status.generation not in (None, number):
                self._change(name, status.generation, phase=Phase.STANDBY)
            seconds = {"loading": 0.5, "verifying": 0.25, "warming": 0.125}
            done = {"phase": Phase.PUBLISHED, "progress": None, "content_hash": "ab" * 32, "seconds": seconds}
            self._change(name, number, **done)
            published = next(entry for entry in self._found(name).generations if entry.generation == number)
            self._experts[name] = dataclasses.replace(
                self._found(name),
                state="published",
                generation=number,
                previous=status.generation,
                protected=published.spec.protected,
                last_error=None,
            )
            self.settle(name, number)

    def fail(self, name: str, reason: str) -> None:
        """The newest generation cannot be published."""
        with self._lock:
            status = self._found(name)
            number = status.generations[0].generation
            self._change(name, number, phase=Phase.FAILED, progress=None, error=reason, bytes=0)
            state = "failed" if status.generation is None else status.state
            self._experts[name] = dataclasses.replace(self._found(name), state=state, last_error=reason)
            self.settle(name, number)

    def retire(self, name: str) -> None:
        """The end of a deletion."""
        with self._lock:
            number = self._found(name).generations[0].generation
            self._change(name, number, phase=Phase.RETIRED, bytes=0)
            self.settle(name, number)
            del self._experts[name]

    def settle(self, name: str, number: int | None) -> None:
        """Tell those who wait for a change to that generation that it is over."""
        future = self._settled.get(Change(name, number or 0))
        if future is not None and not future.done():
            future.set_result(self._experts[name])

    def is_settled(self, change: Change) -> bool:
        return self._settled[change].done()

    def show(self, status: ExpertStatus) -> None:
        """Have an expert as it stands."""
        self._experts[status.name] = status

    def _found(self, name: str) -> ExpertStatus:
        if name not in self._experts:
            raise UnknownModel(f"There is no expert '{name}' here. Experts: {', '.join(self._experts)}.")
        return self._experts[name]

    def _take(self, name: str, phase: Phase, progress: float | None) -> None:
        if phase is Phase.PUBLISHED:
            self.publish(name)
        elif phase is Phase.FAILED:
            self.fail(name, "tokenizers differ at id 7")
        else:
            self.advance(name, phase, progress)

    def _record(self, *action: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.actions.append(action)

    def _begun(self, name: str, number: int) -> Change:
        change = Change(name, number)
        self._settled[change] = Future()
        self.changes.append(change)
        return change

    def _change(self, name: str, number: int | None, **fields: Any) -> None:
        status = self._found(name)
        generations = tuple(
            dataclasses.replace(entry, **fields) if entry.generation == number else entry
            for entry in status.generations
        )
        self._experts[name] = dataclasses.replace(status, generations=generations)


def admin_app(manager: ExpertControl | None, *, keys: Path | None = None) -> FastAPI:
    """The control plane alone behind the layers of a server. With `keys`, a folder for key files, it takes USER_KEY and
    ADMIN_KEY."""
    config = ServerConfig() if keys is None else with_keys(keys)
    metrics = Metrics(_no_engine)
    app = FastAPI(redoc_url=None, redirect_slashes=False)
    app.state.proxyserve = SimpleNamespace(
        experts=manager, config=config, metrics=metrics, stopping=asyncio.Event()
    )
    app.include_router(admin.router)
    install_error_handlers(app)
    install_openapi(app, chunks=(), keys=keys is not None)
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=config.limits.max_body_bytes,
        seconds=config.limits.body_seconds,
        metrics=metrics,
    )
    app.add_middleware(
        AuthMiddleware,
        keys=Keys.of(config),
        metrics=metrics,
    )
    app.add_middleware(RequestIdMiddleware)
    return app


def _no_engine() -> Any:
    raise AssertionError("there is no engine to measure")


def with_keys(folder: Path) -> ServerConfig:
    """A configuration with USER_KEY and ADMIN_KEY in files of `folder`."""
    (folder / "keys").write_text(USER_KEY)
    (folder / "admin-keys").write_text(ADMIN_KEY)
    return ServerConfig(api_key_file=folder / "keys", admin_key_file=folder / "admin-keys")


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """The address of `app` on a free port, in a thread."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-admin-server")
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
