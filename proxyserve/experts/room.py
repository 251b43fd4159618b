"""Room for what is to be loaded: how much it needs, and what may go to make way for it."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from proxyserve.engine.engine import Engine
from proxyserve.engine.memory import least_arena_bytes, spelled
from proxyserve.errors import NoRoom
from proxyserve.experts.generation import Phase
from proxyserve.experts.ledger import Generation
from proxyserve.experts.library import Library
from proxyserve.experts.pacing import paced
from proxyserve.experts.recipe import Recipe
from proxyserve.experts.roster import Roster

#: How long requests may take to be prepared that could still begin to use what is being evicted.
_PATIENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """`limit` is in bytes, for all weights and KV of the server. With `evict_idle`, experts that nobody uses are parked
    when another one needs their room."""

    limit: int
    evict_idle: bool = False


class Room:
    """The memory plan as experts come and go."""

    def __init__(self, policy: MemoryPolicy, engine: Engine, library: Library, roster: Roster) -> None:
        self.policy = policy
        self._engine = engine
        self._library = library
        self._roster = roster

    @property
    def left(self) -> int:
        """Bytes."""
        return self.policy.limit - self._engine.residents.bytes

    def needed(self, recipe: Recipe) -> int:
        """Bytes of the weights at most, and of the least KV memory that they need where no arena here fits."""
        size, wanted = self._engine.config.block_size, self._engine.blocks_per_lane
        with paced(lambda: self._engine.has_work):
            kv = {
                layout: least_arena_bytes(layout, context, size, wanted)
                for layout, context in self._library.expected_layouts(recipe)
                if layout not in self._engine.residents.arenas
            }
            return self._library.estimate(recipe) + sum(kv.values())

    def require_possible(self, recipe: Recipe) -> None:
        """Raise NoRoom if a recipe would not fit even after everything has gone that may go."""
        with self._roster.lock:
            loaded = [found.loaded for found in self._evictable() if found.loaded is not None]
            evictable = self._library.shelf.bytes_of([key for each in loaded for key in each.trunks])
            evictable += sum(model.bytes for each in loaded for model in each.over_trunks)
        needed, left = self.needed(recipe), self.left
        if needed > left + evictable:
            raise self._no_room(needed, left)

    def make(self, recipe: Recipe, generation: Generation) -> None:
        """Let go of what may go until the recipe of this generation fits. Must not be called under the roster's lock.
        Raises NoRoom."""
        # What is shared may go with its last user, so that more is needed than before.
        while (left := self.left) < (needed := self.needed(recipe)):
            self._roster.sweep()
            with self._roster.lock:
                victims = (found for found in self._evictable() if found is not generation)
                freed = next((freed for found in victims if (freed := self._evict(found)) is not None), None)
            if freed is None:
                raise self._no_room(needed, left)
            if not self._is_done(freed):  # a request has begun to use it after all
                raise self._no_room(needed, self.left)

    def _is_done(self, freed: Future[None]) -> bool:
        """Wait for it. Whoever ends the last use may have left the sweeping to this thread."""
        until = monotonic() + _PATIENCE_SECONDS
        while monotonic() < until:
            with suppress(TimeoutError):
                freed.result(_PAUSE_SECONDS)
                return True
            self._roster.sweep()
        return False

    def _evictable(self) -> list[Generation]:
        """What memory can be taken from, best first: generations that stand by, then, if that is allowed, experts that
        nobody uses, the least recently used one first."""
        loaded = self._roster.loaded_generations()
        standby = [found for found in loaded if found.phase is Phase.STANDBY]
        if not self.policy.evict_idle:
            return standby
        offers = self._engine.offers
        idle = [
            found
            for found in loaded
            if found.phase is Phase.PUBLISHED and not any(map(offers.held, self._roster.own_keys(found)))
        ]
        return [*standby, *sorted(idle, key=lambda found: (offers.last_held(found.key), found.created))]

    def _evict(self, generation: Generation) -> Future[None] | None:
        """Take its memory; None if a request has begun to use it."""
        standing_by = generation.phase is Phase.STANDBY
        freed = self._roster.retire(generation) if standing_by else self._roster.park(generation)
        self._roster.counters.evictions += freed is not None
        return freed

    def _no_room(self, needed: int, left: int) -> NoRoom:
        need, free, limit = spelled([needed, max(0, left), self.policy.limit])
        remedy = "unload experts, or start the server with a larger --memory"
        if not self.policy.evict_idle:
            remedy += " or with --evict-idle"
        return NoRoom(f"{need} of memory are needed, and {free} of {limit} are left; {remedy}.")
