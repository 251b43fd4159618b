"""What the control plane shows of experts."""

from __future__ import annotations

from dataclasses import dataclass

from proxyserve.experts.generation import Phase
from proxyserve.experts.source import ExpertSpec


@dataclass(frozen=True, slots=True)
class GenerationStatus:
    """One generation of an expert.

    `formats` maps "tuned" and "untuned" to the formats of their sources ("merge" for a merge). `bytes` are those of the
    weights that this generation alone holds in memory (shared ones count with their first holder), 0 where it
    holds none. `requests` is the number of choices in flight on it. `progress` goes from 0 to 1 within the phase, None
    where it does not move. `content_hash` is the SHA-256 of all its files, "" until they have been read. `created` is
    in seconds since the epoch. `error` says why it failed. `seconds` maps phases that it has gone through to how
    long they took.
    """

    generation: int
    phase: Phase
    spec: ExpertSpec
    formats: dict[str, str]
    bytes: int
    requests: int
    progress: float | None
    content_hash: str
    created: float
    error: str | None
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class ExpertStatus:
    """`state` is "published" (requests are served), "parked" (loaded when the next request comes), "loading" (the
    first generation is on its way), "failed" (no generation ever served), "draining" (deleted, and requests still run
    on it) or "deleted". `generation` is the one that serves, None if none does; `previous` the one that a rollback
    would bring back, None if there is none. `generations` has the newest first; failed and retired ones are kept for a
    while. `last_error` is that of the newest generation that failed, None once a newer one has been published."""

    name: str
    state: str
    generation: int | None
    previous: int | None
    protected: bool
    generations: tuple[GenerationStatus, ...]
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of an expert that has begun: poll the expert's status for what becomes of `generation`."""

    expert: str
    generation: int
