"""What a server offers at one moment, who still works with an older offer, and which models requests need.

    lease ──▶ offer ──prepare──▶ choice holds its models ──▶ released when the choice ends

Publishing an expert is replacing the offer. A request is made from one offer as a whole, which it leases while it is
being prepared; from then on its choices hold the models of their lanes. A model may leave memory once nobody holds it
and nobody leases an offer that has it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from types import TracebackType

from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.types import ModelKey


@dataclass(frozen=True, eq=False)
class Offer:
    """Models, presets and what may be asked of them. Immutable; equal to itself alone."""

    catalog: Catalog
    policy: FusionPolicy

    @cached_property
    def keys(self) -> frozenset[ModelKey]:
        """All models that a request made from this offer could run."""
        return frozenset(self.catalog.models.models)


class Lease:
    """Keeps the models of an offer in memory while a request is made from it. A context manager."""

    def __init__(self, offers: Offers, offer: Offer) -> None:
        self._offers = offers
        self.offer = offer

    @property
    def catalog(self) -> Catalog:
        return self.offer.catalog

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._offers._end(self.offer)


class Offers:
    """The current offer, and counts of what is in use. Thread-safe. `on_release` is called, on the thread that released
    it, whenever a model or an older offer has lost its last user."""

    def __init__(self, offer: Offer) -> None:
        self._lock = threading.Lock()
        self._current = offer
        self._leased: Counter[Offer] = Counter()
        self._held: Counter[ModelKey] = Counter()
        self._last_held: dict[ModelKey, float] = {}
        self.on_release: Callable[[], None] = lambda: None

    @property
    def current(self) -> Offer:
        return self._current

    def lease(self) -> Lease:
        """Of the current offer; to be used as a context manager at once."""
        with self._lock:
            self._leased[self._current] += 1
            return Lease(self, self._current)

    def _end(self, offer: Offer) -> None:
        with self._lock:
            self._leased[offer] -= 1
            last = self._leased[offer] == 0
            if last:
                del self._leased[offer]
            stale = last and offer is not self._current
        if stale:
            self.on_release()

    def replace(self, offer: Offer, *, unless_held: Collection[ModelKey] = ()) -> bool:
        """Make `offer` the current one. False, and nothing has changed, if a choice needs one of the given models."""
        with self._lock:
            if any(self._held[key] for key in unless_held):
                return False
            self._current = offer
            return True

    def touch(self, keys: Iterable[ModelKey]) -> None:
        """Count these models as used just now: they have come for somebody."""
        with self._lock:
            self._last_held.update(dict.fromkeys(keys, monotonic()))

    def hold(self, keys: Iterable[ModelKey]) -> None:
        """A choice needs these models, all of them in an offer that is leased now. `release` undoes it."""
        with self._lock:
            now = monotonic()
            for key in keys:
                self._held[key] += 1
                self._last_held[key] = now

    def release(self, keys: Iterable[ModelKey]) -> None:
        with self._lock:
            idle = False
            for key in keys:
                self._held[key] -= 1
                if self._held[key] == 0:
                    del self._held[key]
                    idle = True
        if idle:
            self.on_release()

    def held(self, key: ModelKey) -> int:
        """Choices that need the model."""
        return self._held[key]

    def used(self, key: ModelKey) -> bool:
        """Whether a choice needs the model, or one may that is being prepared."""
        with self._lock:
            return self._held[key] > 0 or any(key in offer.keys for offer in self._leased)

    def last_held(self, key: ModelKey) -> float:
        """When a choice last began to need the model, or it came, by `time.monotonic`; 0 if neither is known."""
        return self._last_held.get(key, 0.0)

    def forget(self, keys: Iterable[ModelKey]) -> None:
        """These models have left memory."""
        with self._lock:
            for key in keys:
                self._last_held.pop(key, None)
