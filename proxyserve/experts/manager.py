"""Changes experts while the server runs.

    put ──▶ loader thread: LOADING ▶ VERIFYING ▶ WARMING ──▶ state folder ──▶ offer replaced (PUBLISHED)
                                                                    └─▶ the old one: DRAINING ▶ STANDBY / RETIRED

One thread loads, one expert after the other. What steps can run changes between steps (`AsyncEngine.between_steps`),
what requests can have by replacing the offer, which is one assignment. Every change is on the disk before anybody can
see it: a server that is killed comes back with what its last requests could have.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.preparation import check_presets
from proxyserve.errors import InvalidRequest, NotReady, ProxyserveError, QueueFull, SwapConflict
from proxyserve.experts.audit import AuditLog, Outcome
from proxyserve.experts.generation import Phase
from proxyserve.experts.ledger import Entry, Generation
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.pacing import eager_switching, paced
from proxyserve.experts.presets import PresetBook, PresetValues
from proxyserve.experts.recipe import make_recipe, needs_hub, pinned
from proxyserve.experts.room import MemoryPolicy, Room
from proxyserve.experts.roots import Roots
from proxyserve.experts.roster import Roster, SwapCounters
from proxyserve.experts.source import ExpertSpec
from proxyserve.experts.status import Change, ExpertStatus
from proxyserve.experts.store import StateStore, StoredGeneration
from proxyserve.fusion.fusion import Fusion
from proxyserve.models.loaded_model import ParkedExpert
from proxyserve.types import NAME

logger = logging.getLogger(__name__)

#: How long a load may hold up the end of the server.
_FAREWELL_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Begun:
    """An expert that the server has from its start: what is stored of it, its weights, or, where there was no room for
    them, what is known without them, its formats, and what a rollback goes back to."""

    stored: StoredGeneration
    loaded: LoadedExpert | ParkedExpert
    formats: Mapping[str, str]
    previous: StoredGeneration | None = None


class ExpertManager:
    """Thread-safe. `start` it after the engine has the models that it begins with, `close` it before the engine.
    `parse_preset` makes a fusion of a preset's JSON value, or raises InvalidRequest."""

    def __init__(
        self,
        engine: AsyncEngine,
        library: Library,
        store: StateStore,
        audit: AuditLog,
        roots: Roots,
        memory: MemoryPolicy,
        *,
        parse_preset: Callable[[Mapping[str, Any]], Fusion],
    ) -> None:
        self._engine = engine
        self._library = library
        self._store = store
        self._audit = audit
        self._roots = roots
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._roster = Roster(engine, library, self._jobs.put)
        self._lock = self._roster.lock
        self._room = Room(memory, engine.engine, library, self._roster)
        self._presets = PresetBook(engine.engine, self._roster, store, audit, parse_preset)
        self._closing = False
        self._waiting = 0  # requests, for parked experts; counted on the event loop
        self._thread = threading.Thread(target=self._work, name="proxyserve-loader", daemon=True)

    # Starting and stopping -------------------------------------------------------------------------------------

    def install(
        self,
        begun: Sequence[Begun],
        presets: PresetValues,
        *,
        fixed_presets: PresetValues | None = None,
        dropped: Sequence[tuple[StoredGeneration, str]] = (),
        last_errors: Mapping[str, str] | None = None,
    ) -> None:
        """Take over what the engine began with: its experts, and the presets as JSON values, those of the command line
        apart. `dropped` are generations that could not be loaded, and why: they are shown as failed, and can be
        replaced or deleted. `last_errors` says by expert why its last load had failed. Before `start`."""
        for stored, reason in dropped:
            generation = Generation.again(stored)
            generation.error = reason
            generation.move(Phase.FAILED)
            entry = self._roster.entries[stored.expert] = Entry(stored.expert)
            entry.add(generation)
        for expert in begun:
            stored = expert.stored
            generation = Generation(
                stored.expert,
                stored.generation,
                stored.spec,
                created=stored.created,
                formats=dict(expert.formats),
                digest=stored.content_hash,
            )
            entry = self._roster.entries[stored.expert] = Entry(stored.expert, previous=expert.previous)
            entry.add(generation)
            if isinstance(expert.loaded, ParkedExpert):
                generation.move(Phase.PARKED)
                entry.published, entry.parked = generation, expert.loaded
            else:
                generation.loaded = expert.loaded
                for phase in (Phase.VERIFYING, Phase.WARMING, Phase.PUBLISHED):
                    generation.move(phase)
                self._roster.install(entry, generation)
            generation.seconds.clear()  # they were spent before anybody looked
            entry.error = (last_errors or {}).get(stored.expert)
        self._presets.install(fixed_presets or {}, presets)
        self._engine.engine.offers.replace(self._roster.offer())

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the load that is under way, if that ends soon; else the next start reports it as dropped. What has
        not begun never does."""
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(_FAREWELL_SECONDS)
        self._audit.close()
        self._store.close()

    # Looking ---------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> SwapCounters:
        return self._roster.counters

    def experts(self) -> list[ExpertStatus]:
        with self._lock:
            return [self._status(entry) for _, entry in sorted(self._roster.entries.items())]

    def expert(self, name: str) -> ExpertStatus:
        """Raises UnknownModel."""
        with self._lock:
            return self._status(self._roster.entry(name))

    def presets(self) -> PresetValues:
        return self._presets.values

    async def settled(self, change: Change) -> ExpertStatus:
        """Wait until the change is over, one way or the other. The state of an expert that was deleted is "deleted"."""
        # Whoever writes to the disk holds the lock, which the event loop must not wait for.
        settled = await asyncio.to_thread(self._unsettled, change)
        await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(future)) for future in settled))
        return await asyncio.to_thread(self._last_status, change.expert)

    def _unsettled(self, change: Change) -> list[Future[None]]:
        """What a change waits for."""
        with self._lock:
            entry = self._roster.entries.get(change.expert)
            wanted = {} if entry is None else entry.generations
            if entry is not None and not entry.withdrawn:
                wanted = {number: found for number, found in wanted.items() if number == change.generation}
            return [generation.settled for generation in wanted.values()]

    def _last_status(self, name: str) -> ExpertStatus:
        """Also of an expert that is gone."""
        with self._lock:
            entry = self._roster.entries.get(name)
            if entry is None:
                return ExpertStatus(name, "deleted", None, None, False, (), None)
            return self._status(entry)

    def _status(self, entry: Entry) -> ExpertStatus:
        held = self._engine.engine.offers.held
        return entry.status({number: held(found.key) for number, found in entry.generations.items()})

    # Experts ---------------------------------------------------------------------------------------------------

    def put(self, name: str, spec: ExpertSpec, *, actor: str) -> Change:
        """Begin to load a generation that will replace the one that serves. Reads headers of files, so call it where
        nobody waits. Raises InvalidRequest, Forbidden, LoadError, SwapConflict and NoRoom; then nothing has begun."""
        if not NAME.fullmatch(name) or name in ("base", self._library.base.name):
            raise InvalidRequest(
                f"'{name[:100]}' cannot name an expert; use letters, digits, '_' and '-', at most 64, and no name of "
                "the base.",
                param="name",
            )
        formats: Mapping[str, str] = {}
        if not needs_hub(spec, self._roots):  # else the loader thread finds out
            recipe = make_recipe(spec, self._roots)
            self._room.require_possible(recipe)
            formats = recipe.formats
        with self._lock:
            if name in self._engine.engine.catalog.presets:
                raise SwapConflict(f"'{name}' is the name of a preset; delete that first.", code="name_taken")
            entry = self._roster.unchanging(self._roster.entries.get(name) or Entry(name))
            number = self._store.next_generation(name)
            generation = Generation(name, number, spec, formats=dict(formats))
            self._record("put", actor, generation, "begun", json.dumps(spec.as_json()))
            self._store.begin(name, number, spec)
            self._roster.entries[name] = entry
            entry.add(generation)
        self._jobs.put(lambda: self._bring(entry, generation, actor))
        return Change(name, number)

    def rollback(self, name: str, *, actor: str) -> Change:
        """Back to the previous generation: at once where it is still in memory, else by loading it again. Raises
        UnknownModel and SwapConflict."""
        with self._lock:
            entry = self._roster.unchanging(self._roster.entry(name))
            stored = entry.previous
            if stored is None:
                raise SwapConflict(
                    f"Expert '{name}' has no earlier generation to go back to.", code="no_previous_generation"
                )
            held = entry.generations.get(stored.generation)
            if held is not None and held.loaded is not None:
                if held.phase.is_over:  # it was parked, and a request that is being prepared may still run it
                    raise SwapConflict(
                        f"Generation {held.number} of expert '{name}' is leaving memory; try again in a moment."
                    )
                self._require_presets(name, held.loaded)
                self._record("rollback", actor, held, "begun")
                self._publish(entry, held, rollback=True)
                self._record("rollback", actor, held, "done")
            else:
                generation = Generation.again(stored)
                self._record("rollback", actor, generation, "begun")
                entry.add(generation)
                self._jobs.put(lambda: self._bring(entry, generation, actor, rollback=True))
        self._roster.sweep()
        return Change(name, stored.generation)

    def delete(self, name: str, *, actor: str) -> Change:
        """No new requests; the weights go when the last one that runs has ended. Raises UnknownModel, and SwapConflict
        if a preset needs the expert."""
        with self._lock:
            entry = self._roster.unchanging(self._roster.entry(name))
            generation = entry.published
            self._require_presets(name, None)
            if generation is None:  # none ever served, or could be loaded when the server started
                self._record("delete", actor, entry.generations[max(entry.generations)], "begun")
                self._store.delete(name)
            else:
                self._record("delete", actor, generation, "begun")
                self._store.delete(name)
                for found in entry.generations.values():
                    if not found.phase.is_over:  # it will be
                        found.begin_again()
            self._roster.withdraw(entry)
            if generation is not None:
                self._record("delete", actor, generation, "done")
        self._roster.sweep()
        return Change(name, max(entry.generations) if generation is None else generation.number)

    def _require_presets(self, name: str, instead: LoadedExpert | None) -> None:
        """Raise SwapConflict if a preset cannot work with this in the place of what serves."""
        try:
            check_presets(self._roster.offer({name: instead}))
        except InvalidRequest as error:
            raise SwapConflict(
                f"A preset needs expert '{name}' as it is: {error.message} Delete the preset first.",
                code="in_use",
            ) from None

    async def wake(self, name: str, patience: float) -> None:
        """Have a parked expert loaded, within `patience` seconds. Raises NotReady if it takes longer or fails, and
        QueueFull if too many requests wait for experts; a load that has begun goes on."""
        if self._waiting >= self._engine.limits.max_waiting_requests:
            raise QueueFull(
                "Too many requests wait for experts to be loaded; try again later.", retry_after=1.0
            )
        self._waiting += 1
        try:
            await self._woken(name, patience)
        finally:
            self._waiting -= 1

    async def _woken(self, name: str, patience: float) -> None:
        generation = await asyncio.to_thread(self._waking, name)
        if generation is None:
            return
        try:
            await asyncio.wait_for(
                asyncio.shield(asyncio.wrap_future(generation.settled)), max(0.0, patience)
            )
        except TimeoutError:
            raise NotReady(f"Expert '{name}' is still being loaded; try again soon.") from None
        if await asyncio.to_thread(self._failure, generation) is not None:
            # Why is for administrators: it may name the server's files.
            raise NotReady(f"Expert '{name}' cannot be loaded now; the server's operator can see why.")

    def _waking(self, name: str) -> Generation | None:
        """The generation that is being loaded again, from now on if it was not. None if nothing is to be waited for."""
        with self._lock:
            entry = self._roster.entries.get(name)
            generation = None if entry is None else entry.published
            if generation is None or generation.phase is Phase.PUBLISHED:
                return None  # meanwhile it was loaded, or deleted; the request will see
            if generation.phase is Phase.PARKED:
                generation.begin_again()
                self._roster.move(generation, Phase.LOADING)
                self._roster.counters.wakes += 1
                self._jobs.put(lambda: self._wake(generation))
            return generation

    def _failure(self, generation: Generation) -> str | None:
        with self._lock:  # held until what was loaded is offered
            return generation.error

    # Presets and the server --------------------------------------------------------------------------------------

    def put_preset(self, name: str, value: Mapping[str, Any], *, actor: str) -> None:
        """Raises InvalidRequest and SwapConflict."""
        self._presets.put(name, value, actor=actor)

    def delete_preset(self, name: str, *, actor: str) -> None:
        """Raises UnknownModel and SwapConflict."""
        self._presets.delete(name, actor=actor)

    def drain(self, *, actor: str) -> None:
        """Refuse new requests; what runs goes on."""
        self._audit.record("drain", actor=actor, outcome="done")
        self._engine.drain()

    # The loader thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closing:
            try:
                with eager_switching():
                    job()
            except Exception:  # such as a full disk when a failure was to be written down
                logger.exception("a change of an expert did not end as it should")

    def _bring(self, entry: Entry, generation: Generation, actor: str, *, rollback: bool = False) -> None:
        """All the way from LOADING to PUBLISHED or FAILED."""
        action = "rollback" if rollback else "put"
        try:
            loaded = self._load(generation)
            try:
                with self._lock:
                    check_presets(self._roster.offer({entry.name: loaded}))
                    generation.loaded = loaded
                    self._publish(entry, generation, rollback=rollback)
            except BaseException:
                generation.loaded = None
                self._roster.discard(loaded)
                raise
            self._record(action, actor, generation, "done")
        except Exception as error:
            self._fail(generation, error, Phase.FAILED)
            if not rollback:
                self._store.fail(entry.name, generation.number, generation.error or "")
            self._record(action, actor, generation, "failed", generation.error)
        finally:
            self._roster.sweep()

    def _wake(self, generation: Generation) -> None:
        """From LOADING to PUBLISHED, or back to PARKED."""
        with self._lock:
            if generation.phase is not Phase.LOADING:  # meanwhile another generation took its place
                return
            if generation.loaded is not None:  # its weights had not gone yet
                for phase in (Phase.VERIFYING, Phase.WARMING):
                    self._roster.move(generation, phase)
                self._roster.unpark(generation)
                return
        try:
            generation.loaded = self._load(generation)
            with self._lock:
                self._roster.unpark(generation)
        except Exception as error:
            self._fail(generation, error, Phase.PARKED)

    def _publish(self, entry: Entry, generation: Generation, *, rollback: bool) -> None:
        """On the disk, then for everybody to see."""
        if rollback:
            self._store.roll_back(entry.name)
        else:
            self._store.publish(generation.stored)
        self._roster.publish(entry, generation, rollback=rollback)

    def _load(self, generation: Generation) -> LoadedExpert:
        """Until steps can run it. Raises LoadError, NoRoom and others; then nothing is kept."""
        engine, library = self._engine.engine, self._library
        recipe = make_recipe(generation.spec, self._roots)
        generation.formats = recipe.formats
        kept = library.keep(recipe)
        try:
            self._room.make(recipe, generation)
            with self._paced():
                loaded = library.load(
                    recipe,
                    generation.expert,
                    generation.number,
                    progress=generation.progressed,
                    expected=generation.digest or None,
                )
        finally:
            library.let_go(kept)
        try:
            generation.digest = loaded.digest
            generation.spec = replace(pinned(recipe), origins=loaded.origins)
            with self._lock:
                self._roster.move(generation, Phase.VERIFYING)
            with self._paced():
                library.verify(loaded)
            with self._lock:
                self._roster.move(generation, Phase.WARMING)
            with self._paced():
                library.warm(loaded, engine.config.max_batch)
            alike = [*loaded.fresh, *engine.residents.local]
            engine.residents.groups.learn(alike, busy=lambda: engine.has_work)
            left = self._room.left - sum(runner.bytes for runner in loaded.fresh)
            arenas = dict(engine.residents.arenas)
            for runner in loaded.fresh:
                if runner.layout not in arenas:
                    arenas[runner.layout] = engine.new_arena(runner, left)
                    left -= arenas[runner.layout].bytes
            fresh = [(runner, arenas[runner.layout]) for runner in loaded.fresh]
            with self._paced():
                engine.record(fresh)
                engine.record_together(loaded.expert, engine.models.base)
            self._engine.between_steps(lambda: engine.adopt(fresh, loaded.over_trunks)).result()
        except BaseException:
            engine.forget_recorded(loaded.fresh)
            self._roster.discard(loaded)
            raise
        return loaded

    def _paced(self) -> AbstractContextManager[None]:
        """Slowly, as long as there are requests."""
        return paced(lambda: self._engine.engine.has_work)

    def _fail(self, generation: Generation, error: Exception, phase: Phase) -> None:
        if isinstance(error, ProxyserveError):
            generation.error = error.message
        else:
            logger.error("expert %s@%s", generation.expert, generation.number, exc_info=error)
            generation.error = f"{type(error).__name__} while {generation.phase}; the server's log says more."
        with self._lock:
            self._roster.counters.failures[generation.phase] += 1
            self._roster.move(generation, phase)

    def _record(
        self, action: str, actor: str, generation: Generation, outcome: Outcome, detail: str | None = None
    ) -> None:
        """What cannot be written down does not begin."""
        write = self._audit.record if outcome == "begun" else self._audit.conclude
        write(
            action,
            actor=actor,
            expert=generation.expert,
            generation=generation.number,
            content_hash=generation.digest or None,
            outcome=outcome,
            detail=detail,
        )
