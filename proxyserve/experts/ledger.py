"""What the manager knows of each expert and each of its generations. Not thread-safe: the manager's lock guards it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic, time

from proxyserve.experts.generation import Phase, require_legal
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.source import ExpertSpec
from proxyserve.experts.status import ExpertStatus, GenerationStatus
from proxyserve.experts.store import StoredGeneration
from proxyserve.models.loaded_model import ParkedExpert
from proxyserve.types import ModelKey

#: What a load comes to, and a delete.
_SETTLED = frozenset({Phase.PUBLISHED, Phase.FAILED, Phase.PARKED, Phase.RETIRED})
#: Generations that are over are shown until so many newer ones of them are there.
_KEPT_WHEN_OVER = 5


@dataclass(eq=False)
class Generation:
    """One generation. `loaded` is set while its weights are in memory; `digest` is that of its files, once they have
    been read. `settled` is done when it has been published, parked or retired, or has failed."""

    expert: str
    number: int
    spec: ExpertSpec
    created: float = field(default_factory=time)
    formats: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    phase: Phase = Phase.LOADING
    progress: float | None = None
    error: str | None = None
    loaded: LoadedExpert | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    settled: Future[None] = field(default_factory=Future)
    _since: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self.settled.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it for the others

    @classmethod
    def again(cls, stored: StoredGeneration) -> Generation:
        """One that has been here before and is to be loaded again, from files of the same content."""
        return cls(
            stored.expert,
            stored.generation,
            stored.spec,
            created=stored.created,
            digest=stored.content_hash,
        )

    def progressed(self, share: float) -> None:
        self.progress = share

    def move(self, phase: Phase) -> float:
        """Returns how long it was in the phase before, in seconds. Raises IllegalMove."""
        require_legal(self.phase, phase)
        now = monotonic()
        spent = now - self._since
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + spent
        self.phase, self._since, self.progress = phase, now, None
        if phase in _SETTLED and not self.settled.done():
            self.settled.set_result(None)
        return spent

    def begin_again(self) -> None:
        """Somebody will wait for it once more."""
        self.settled = Future()
        self.settled.set_running_or_notify_cancel()
        self.error = None

    @property
    def key(self) -> ModelKey:
        """Of its tuned model; no other generation has it."""
        return ModelKey(f"{self.expert}.tuned", self.number)

    @property
    def stored(self) -> StoredGeneration:
        return StoredGeneration(self.expert, self.number, self.spec, self.digest, self.created)

    def status(self, requests: int) -> GenerationStatus:
        return GenerationStatus(
            generation=self.number,
            phase=self.phase,
            spec=self.spec,
            formats=dict(self.formats),
            bytes=0 if self.loaded is None else self.loaded.bytes,
            requests=requests,
            progress=self.progress,
            content_hash=self.digest,
            created=self.created,
            error=self.error,
            seconds=dict(self.seconds),
        )


@dataclass(eq=False)
class Entry:
    """One expert. `published` is the generation that serves (it may be parked), `previous` the one that a rollback
    brings back. `parked` is what is known of the published one without its weights. `withdrawn`: it was deleted, and is
    forgotten with its last generation. `error` is why a load failed before the server was started, until another one
    is published."""

    name: str
    generations: dict[int, Generation] = field(default_factory=dict)
    published: Generation | None = None
    previous: StoredGeneration | None = None
    parked: ParkedExpert | None = None
    withdrawn: bool = False
    error: str | None = None

    @property
    def changing(self) -> Generation | None:
        """The generation that is on its way to being published, if any."""
        return next((found for found in self.generations.values() if found.phase.is_loading), None)

    def add(self, generation: Generation) -> None:
        self.withdrawn = False
        self.generations[generation.number] = generation
        over = [number for number, found in self.generations.items() if found.phase.is_over]
        for number in sorted(over)[:-_KEPT_WHEN_OVER]:
            del self.generations[number]

    @property
    def state(self) -> str:
        if self.published is not None:
            # One that is loaded again is parked until it is there.
            return "published" if self.published.phase is Phase.PUBLISHED else "parked"
        if self.changing is not None:
            return "loading"
        draining = any(found.phase is Phase.DRAINING for found in self.generations.values())
        return "draining" if draining else "failed"

    def status(self, requests: dict[int, int]) -> ExpertStatus:
        """`requests` are those in flight, by generation."""
        newest_first = sorted(self.generations.values(), key=lambda found: -found.number)
        failed = next((found for found in newest_first if found.error is not None), None)
        served = [
            found.number
            for found in newest_first
            if not found.phase.is_loading and found.phase is not Phase.FAILED
        ]
        spec = None if self.published is None else self.published.spec
        return ExpertStatus(
            name=self.name,
            state=self.state,
            generation=None if self.published is None else self.published.number,
            previous=None if self.previous is None else self.previous.generation,
            protected=spec is not None and spec.protected,
            generations=tuple(found.status(requests.get(found.number, 0)) for found in newest_first),
            last_error=failed.error
            if failed is not None and failed.number >= max(served, default=0)
            else self.error,
        )
