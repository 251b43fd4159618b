"""The experts that a server has from its start: those of the command line, and those that were published before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import time

from proxyserve.engine.memory import spelled
from proxyserve.errors import InvalidRequest, LoadError, NoRoom, ProxyserveError
from proxyserve.experts.audit import AuditLog
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.manager import Begun
from proxyserve.experts.recipe import Recipe, make_recipe
from proxyserve.experts.room import MemoryPolicy
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.experts.store import Restored, StateStore, StoredExpert, StoredGeneration
from proxyserve.models.family import ExpertSource


@dataclass(frozen=True, slots=True)
class Wanted:
    """An expert of the command line. `origin` is its text there: as long as that stays the same, what was published
    under the name since then, or that it was deleted, counts more."""

    name: str
    spec: ExpertSpec
    origin: str

    @classmethod
    def of(cls, source: ExpertSource) -> Wanted:
        untuned = None if source.untuned is None else Source(path=str(source.untuned.expanduser().resolve()))
        tuned = Source(path=str(source.tuned.expanduser().resolve()))
        origin = f"{source.name}={source.tuned}" + (f",{source.untuned}" if source.untuned else "")
        return cls(source.name, ExpertSpec(tuned, untuned, trusted=True), origin)


def folders_of(wanted: Sequence[Wanted], restored: Restored, roots: Roots) -> list[Path]:
    """What `Starter.begin` is going to read for experts of the command line and for those published before, as far as
    it can be found."""
    names = {expert.name for expert in wanted}
    specs = [expert.spec for expert in wanted]
    for stored in restored.experts:
        if stored.name in names or not stored.published.spec.trusted:
            specs.append(stored.published.spec)
    folders: list[Path] = []
    for spec in specs:
        try:
            folders += make_recipe(spec, roots).paths()
        except ProxyserveError:  # it is said, with the reason, where it is loaded
            continue
    return folders


class Starter:
    """Loads one expert after the other, before there is an engine. `messages` says what was dropped and why, `dropped`
    has the generations that are stored and could not be loaded, with the reasons."""

    def __init__(
        self,
        library: Library,
        store: StateStore,
        audit: AuditLog,
        roots: Roots,
        memory: MemoryPolicy,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`memory` is what weights may take; experts that were published before and do not fit are parked, if it says
        so, or dropped."""
        self._library = library
        self._store = store
        self._audit = audit
        self._roots = roots
        self._memory = memory
        self._progress = progress
        self.messages: list[str] = []
        self.dropped: list[tuple[StoredGeneration, str]] = []

    def begin(self, wanted: Sequence[Wanted], restored: Restored) -> list[Begun]:
        """Everything that can be loaded. Raises LoadError for an expert of the command line that cannot; one that was
        published while an earlier server ran is dropped and stays in the state folder."""
        self.messages.extend(restored.dropped)
        begun: list[Begun] = []
        by_name = {expert.name: expert for expert in restored.experts}
        for expert in wanted:
            stored = by_name.pop(expert.name, None)
            if restored.deleted.get(expert.name) == expert.origin:
                self.messages.append(
                    f"expert '{expert.name}' was deleted while the server ran and stays so; change its --expert to "
                    "bring it back"
                )
            elif stored is None or stored.origin != expert.origin:
                begun.append(self._begin_wanted(expert, stored))
            else:
                begun.append(self._begin_again(expert, stored))
        for stored in by_name.values():
            if stored.published.spec.trusted:
                self._store.delete(stored.name, with_origin=True)
                self._record("delete", stored.published)
                self.messages.append(f"expert '{stored.name}' is no longer on the command line")
            elif stored.name == self._library.base.name:
                self.messages.append(f"expert '{stored.name}' is left out: the base is called so now")
            else:
                begun += self._begin_stored(stored)
        return begun

    def _begin_wanted(self, expert: Wanted, before: StoredExpert | None) -> Begun:
        """As a new generation, after the one that was published `before`."""
        number = self._store.next_generation(expert.name)
        loaded, recipe = self._load(expert.name, number, expert.spec, None)
        spec = replace(expert.spec, origins=loaded.origins)
        stored = StoredGeneration(expert.name, number, spec, loaded.digest, time())
        self._store.publish(stored, origin=expert.origin)
        self._record("put", stored)
        return Begun(stored, loaded, recipe.formats, None if before is None else before.published)

    def _begin_again(self, expert: Wanted, stored: StoredExpert) -> Begun:
        """What was published last under a name of the command line; if that cannot be had, or is the command line's own
        and its files have changed, the command line's anew."""
        restored = self._begin_stored(stored)
        if restored:
            return restored[0]
        self.dropped.pop()
        return self._begin_wanted(expert, stored)

    def _begin_stored(self, stored: StoredExpert) -> list[Begun]:
        published = stored.published
        try:
            parked = self._parked(stored)
            if parked is not None:
                return [parked]
            loaded, recipe = self._load(
                stored.name, published.generation, published.spec, published.content_hash
            )
        except Exception as error:  # whatever it is, the others can be served
            reason = (
                error.message if isinstance(error, ProxyserveError) else f"{type(error).__name__}: {error}"
            )
            self.dropped.append((published, reason))
            self.messages.append(
                f"generation {published.generation} of expert '{stored.name}' cannot be loaded: {reason}"
            )
            return []
        return [Begun(published, loaded, recipe.formats, stored.previous)]

    def _parked(self, stored: StoredExpert) -> Begun | None:
        """The expert without its weights, if there is no room for them. Raises NoRoom if it may not be parked."""
        published = stored.published
        recipe = make_recipe(published.spec, self._roots)
        needed = self._library.estimate(recipe)
        left = self._memory.limit - sum(runner.bytes for runner in self._library.runners())
        if needed <= left:
            return None
        if not self._memory.evict_idle:
            need, free = spelled([needed, max(0, left)])
            raise NoRoom(
                f"{need} of memory are needed beside the KV caches, and {free} are left; start with a larger --memory "
                "or with --evict-idle"
            )
        self.messages.append(f"expert '{stored.name}' is parked: it is loaded when a request names it")
        known = self._library.as_parked(recipe, published.created)
        return Begun(published, known, recipe.formats, stored.previous)

    def _record(self, action: str, stored: StoredGeneration) -> None:
        self._audit.record(
            action,
            actor="start-up",
            expert=stored.expert,
            generation=stored.generation,
            content_hash=stored.content_hash,
            outcome="done",
        )

    def _load(
        self, name: str, generation: int, spec: ExpertSpec, expected: str | None
    ) -> tuple[LoadedExpert, Recipe]:
        self._progress(f"loading expert {name}")
        try:
            recipe = make_recipe(spec, self._roots)
            loaded = self._library.load(recipe, name, generation, expected=expected)
        except (LoadError, InvalidRequest) as error:
            raise LoadError(f"expert '{name}': {error.message}") from error
        try:
            self._library.verify(loaded)
        except BaseException:
            self._library.release(loaded)
            raise
        return loaded, recipe
