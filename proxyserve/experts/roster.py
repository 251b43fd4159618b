"""All experts of a server, and what requests can have of them.

A generation's weights are in memory as long as its `loaded` is set. What new requests get is replaced as a whole (the
offer); what runs on an older generation goes on, and when the last of it has ended the generation stands by or retires.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.offer import Offer
from proxyserve.errors import SwapConflict, UnknownModel
from proxyserve.experts.generation import Phase
from proxyserve.experts.ledger import Entry, Generation
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.fusion.catalog import Catalog
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.model_set import ModelSet
from proxyserve.types import ModelKey


@dataclass(slots=True)
class SwapCounters:
    """Since start. `phases` counts generations that went through a phase, `failures` those that failed in it, and
    `seconds` adds up the time spent in each."""

    phases: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    rollbacks: int = 0
    evictions: int = 0
    wakes: int = 0


class Roster:
    """Entries by name, and how they change together with the offer. Everything but `sweep` needs `lock` to be held,
    which nobody may hold while waiting for the engine. `defer` has something done soon on another thread."""

    def __init__(
        self, engine: AsyncEngine, library: Library, defer: Callable[[Callable[[], None]], None]
    ) -> None:
        self.lock = threading.RLock()
        self.entries: dict[str, Entry] = {}
        self.counters = SwapCounters()
        self._engine = engine
        self._library = library
        self._policy = engine.engine.policy
        self._calibrations = engine.engine.catalog.calibrations
        self._calibrated: dict[str, int] = {}  # the generation of each expert when the server started
        self._draining: set[Generation] = set()
        self._freed: dict[Generation, Future[None]] = {}  # of parked ones whose weights have not gone yet
        self._defer = defer
        engine.engine.offers.on_release = self._released
        library.on_unneeded = lambda trunks: self._drop((), trunks)

    def entry(self, name: str) -> Entry:
        """Raises UnknownModel."""
        entry = self.entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self.entries)) or "none"
            raise UnknownModel(f"There is no expert '{name}' here. Experts: {known}.", param="name")
        return entry

    def unchanging(self, entry: Entry) -> Entry:
        """Raises SwapConflict while a generation is on its way."""
        changing = entry.changing
        if changing is not None:
            raise SwapConflict(
                f"Generation {changing.number} of expert '{entry.name}' is {changing.phase}; wait until it is done."
            )
        return entry

    # What requests can have ------------------------------------------------------------------------------------

    def offer(
        self,
        instead: Mapping[str, LoadedExpert | None] | None = None,
        *,
        parking: Collection[str] = (),
    ) -> Offer:
        """Everything that is published. `instead` has other weights for some experts, None for those to be left out;
        those in `parking` are offered as parked."""
        experts: dict[str, LoadedExpert | None] = {}
        for name, entry in self.entries.items():
            if entry.published is not None and entry.published.phase is Phase.PUBLISHED:
                experts[name] = entry.published.loaded
        experts.update(instead or {})
        for name in parking:
            del experts[name]
        parked = {
            name: entry.parked
            for name, entry in self.entries.items()
            if entry.published is not None and entry.parked is not None and name not in experts
        }
        pairs = [loaded.expert for loaded in experts.values() if loaded is not None]
        protected = {expert.name for expert in pairs if expert.protected} | {
            name
            for name in parked
            if (published := self.entries[name].published) is not None and published.spec.protected
        }
        current = self._engine.engine.offers.current.catalog
        # A calibration says nothing of another generation than the one that it was made for.
        calibrations = {
            expert.name: self._calibrations[expert.name]
            for expert in pairs
            if expert.name in self._calibrations
            and self._calibrated.get(expert.name, expert.generation) == expert.generation
        }
        return Offer(
            Catalog(ModelSet(current.models.base, pairs, parked=parked), current.presets, calibrations),
            replace(self._policy, protected=self._policy.protected | protected),
        )

    def publish(self, entry: Entry, generation: Generation, *, rollback: bool = False) -> None:
        """Let new requests have this generation, which is loaded. The one before it drains."""
        old = entry.published
        self.move(generation, Phase.PUBLISHED)
        self._draining.discard(generation)
        self._engine.engine.offers.touch(self.own_keys(generation))
        self.counters.rollbacks += rollback
        self.install(entry, generation)
        entry.previous = None if rollback or old is None else old.stored
        entry.error = None
        for other in list(entry.generations.values()):
            if other.phase is Phase.STANDBY:  # it was the previous one
                self.retire(other)
        if old is not None:
            self._leave(old)
        self._engine.engine.offers.replace(self.offer())

    def install(self, entry: Entry, generation: Generation) -> None:
        """Make it the published one of its entry."""
        assert generation.loaded is not None
        self._calibrated.setdefault(entry.name, generation.number)
        entry.published = generation
        entry.parked = generation.loaded.expert.as_parked

    def withdraw(self, entry: Entry) -> None:
        """No new request can have the expert; it is forgotten when the last one has ended."""
        generation = entry.published
        entry.published = entry.previous = None
        entry.withdrawn = True
        if generation is not None:
            self._leave(generation)
        for other in list(entry.generations.values()):
            if other.phase is Phase.STANDBY:
                self.retire(other)
        self._forget_if_over(entry.name)
        self._engine.engine.offers.replace(self.offer())

    def park(self, generation: Generation) -> Future[None] | None:
        """Take a published generation out of the offer, to be kept on disk only. None if a request runs on it. Else the
        future is done when its memory is free: requests that are being prepared may still begin to use it."""
        keys = self.own_keys(generation)
        offer = self.offer(parking=[generation.expert])
        if not self._engine.engine.offers.replace(offer, unless_held=keys):
            return None
        self.move(generation, Phase.PARKED)
        self._draining.add(generation)
        freed = self._freed[generation] = Future()
        self.sweep()
        return freed

    def unpark(self, generation: Generation) -> None:
        """A parked generation is loaded again, or its weights had not gone yet."""
        self._draining.discard(generation)
        self._freed.pop(generation, None)
        self.move(generation, Phase.PUBLISHED)
        self._engine.engine.offers.touch(self.own_keys(generation))
        self._engine.engine.offers.replace(self.offer())

    # Leaving ---------------------------------------------------------------------------------------------------

    def _leave(self, generation: Generation) -> None:
        if generation.phase is Phase.LOADING:  # a request was about to wake it
            self.move(generation, Phase.PARKED)
        self.move(generation, Phase.RETIRED if generation.phase is Phase.PARKED else Phase.DRAINING)
        if generation.loaded is not None:
            self._draining.add(generation)

    def _released(self) -> None:
        """Requests end on the step thread, which must not wait for whoever writes to the disk under the lock."""
        if not self._draining:  # the usual case
            return
        if self.lock.acquire(blocking=False):
            try:
                self.sweep()
            finally:
                self.lock.release()
        else:
            self._defer(self.sweep)

    def sweep(self) -> None:
        """Generations that have drained stand by or retire, parked ones leave memory."""
        with self.lock:
            for generation in list(self._draining):
                if self.in_use(generation):
                    continue
                self._draining.discard(generation)
                if generation.phase is not Phase.DRAINING:  # parked, and perhaps replaced since
                    gone = self._freed.pop(generation)
                    self.unload(generation).add_done_callback(partial(_pass_on, gone))
                    continue
                previous = self.entries[generation.expert].previous
                if previous is not None and previous.generation == generation.number:
                    self.move(generation, Phase.STANDBY)
                else:
                    self.retire(generation)

    def retire(self, generation: Generation) -> Future[None]:
        """Nobody can have it any more. The future is done when its memory is free."""
        self.move(generation, Phase.RETIRED)
        freed = self.unload(generation)
        self._forget_if_over(generation.expert)
        return freed

    def unload(self, generation: Generation) -> Future[None]:
        loaded = generation.loaded
        assert loaded is not None
        generation.loaded = None
        return self.discard(loaded)

    def discard(self, loaded: LoadedExpert) -> Future[None]:
        """Give back weights, of which the engine may have none yet. The future is done when their memory is free."""
        return self._drop(loaded.over_trunks, self._library.release(loaded))

    def _drop(self, models: Sequence[LoadedModel], trunks: Sequence[ModelKey]) -> Future[None]:
        engine, left, freed = self._engine.engine, list[object](), Future[None]()

        def drop() -> None:
            left.extend([engine.residents.runners, engine.residents.arenas])
            engine.drop(models, trunks)

        def free(dropped: Future[None]) -> None:
            left.clear()
            error = dropped.exception()
            freed.set_result(None) if error is None else freed.set_exception(error)

        # To give a GiB back takes a tenth of a second and more, which steps must not wait for.
        self._engine.between_steps(drop).add_done_callback(
            lambda dropped: threading.Thread(target=free, args=[dropped], name="proxyserve-free").start()
        )
        return freed

    def _forget_if_over(self, name: str) -> None:
        """An expert that was deleted is forgotten with its last generation."""
        entry = self.entries.get(name)
        if (
            entry is not None
            and entry.withdrawn
            and all(found.phase.is_over for found in entry.generations.values())
        ):
            del self.entries[name]

    # Looking ---------------------------------------------------------------------------------------------------

    def loaded_generations(self) -> list[Generation]:
        return [
            found
            for entry in self.entries.values()
            for found in entry.generations.values()
            if found.loaded is not None
        ]

    def in_use(self, generation: Generation) -> bool:
        """Whether a request runs on it, or one may that is being prepared."""
        return any(map(self._engine.engine.offers.used, self.own_keys(generation)))

    def own_keys(self, generation: Generation) -> list[ModelKey]:
        """Models that requests have through this generation only."""
        assert generation.loaded is not None
        untuned = generation.loaded.expert.untuned
        others = (
            found.loaded.expert.untuned
            for found in self.loaded_generations()
            if found is not generation and found.loaded is not None
        )
        if untuned is None or untuned is self._library.base or any(other is untuned for other in others):
            return [generation.key]
        return [generation.key, untuned.key]

    def move(self, generation: Generation, phase: Phase) -> None:
        """Raises IllegalMove."""
        before = generation.phase
        seconds = generation.move(phase)
        self.counters.phases[before] += 1
        self.counters.seconds[before] = self.counters.seconds.get(before, 0.0) + seconds


def _pass_on(later: Future[None], done: Future[None]) -> None:
    later.set_result(None)
