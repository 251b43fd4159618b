"""Experts as the control plane takes and shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

Format = Literal["folder", "lora", "diff", "compressed"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's weights come from: exactly one of a `path` (a folder or file as the server sees it, or a hub id),
    a `merge` (weights and sources of several), or `of` alone, a small model that the server has loaded already.

    Adapters and diffs change the loaded model `of`, or without it the expert's untuned model. `scale` multiplies the
    change, and `layers` as well: the factors of a diff's first and last layer, linear between them. `format` is told
    from the files where it is left out. Raises ValueError for what cannot be meant.
    """

    path: str | None = None
    format: Format | None = None
    of: str | None = None
    scale: float | None = None
    layers: tuple[float, float] | None = None
    merge: tuple[tuple[float, Source], ...] = ()

    def __post_init__(self) -> None:
        if self.path is not None and self.merge:
            raise ValueError("a source has a path or a merge, not both")
        if self.path is None and not self.merge and self.of is None:
            raise ValueError("a source needs a path, a merge, or `of` to name a loaded model")
        numbers = (self.scale or 0.0, *(self.layers or ()), *(weight for weight, _ in self.merge))
        if not all(map(math.isfinite, numbers)):
            raise ValueError("scales, layers and weights of a source must be finite")

    @classmethod
    def merged(cls, weights: Mapping[str, float], *, of: str | None = None) -> Source:
        """`of` + sum of weight * (model - `of`), by path: task arithmetic; a soup where the weights sum to 1."""
        return cls(of=of, merge=tuple((weight, Source(path)) for path, weight in weights.items()))

    def to_json(self) -> dict[str, Any]:
        """As it stands in a request."""
        value: dict[str, Any] = {
            name: given
            for name in ("path", "format", "of", "scale")
            if (given := getattr(self, name)) is not None
        }
        if self.layers is not None:
            value["layers"] = {"first": self.layers[0], "last": self.layers[1]}
        if self.merge:
            value["merge"] = [{"weight": weight, **source.to_json()} for weight, source in self.merge]
        return value


@dataclass(frozen=True, slots=True)
class ExpertGeneration:
    """One version of an expert. `phase` is `loading`, `verifying`, `warming`, `published`, `draining`, `standby`,
    `parked`, `retired` or `failed`, and `error` says why. `progress` goes from 0 to 1 within the phase, None where it
    does not move. `bytes` are those of the weights that it alone holds in memory, `requests` the choices in flight on
    it, `seconds` how long its phases took, `created` seconds since the epoch."""

    generation: int
    phase: str
    formats: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    requests: int = 0
    progress: float | None = None
    content_hash: str = ""
    created: float = 0.0
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        return cls(**_known(cls, body))


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert of a server. `state` is `published`, `parked` (loaded when the next request comes), `loading` (the
    first generation is on its way), `failed` (none ever served) or `draining` (deleted; what runs finishes).
    `generation` is the one that serves, `previous` the one that a rollback would bring back; `generations` has the
    newest first."""

    name: str
    state: str
    generation: int | None = None
    previous: int | None = None
    protected: bool = False
    last_error: str | None = None
    generations: tuple[ExpertGeneration, ...] = ()

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        known = _known(cls, body)
        return cls(**{**known, "generations": tuple(map(ExpertGeneration.of, body["generations"]))})

    @property
    def newest(self) -> ExpertGeneration:
        """The one that a change which has just begun is about."""
        return self.generations[0]


class GenerationFailed(Exception):
    """A generation that was followed could not be published; `reason` says why."""

    def __init__(self, name: str, generation: int, reason: str) -> None:
        super().__init__(f"generation {generation} of expert '{name}' failed: {reason}")
        self.name = name
        self.generation = generation
        self.reason = reason


#: Phases of a generation that is on its way.
_ON_ITS_WAY = ("loading", "verifying", "warming")


class Followed:
    """The generation of an expert that was the newest at the first look."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._number: int | None = None
        self.settled = False

    def look(self, expert: Expert) -> ExpertGeneration:
        """Its generation now. Raises GenerationFailed."""
        if self._number is None:
            on_their_way = (entry for entry in expert.generations if entry.phase in _ON_ITS_WAY)
            self._number = next(on_their_way, expert.newest).generation
        found = next((entry for entry in expert.generations if entry.generation == self._number), None)
        if found is None:
            raise GenerationFailed(self._name, self._number, "the server does not list it any more")
        if found.error is not None or found.phase == "failed":
            raise GenerationFailed(self._name, self._number, found.error or "no reason is known")
        self.settled = found.phase not in _ON_ITS_WAY
        return found


def _known(kind: type[Expert] | type[ExpertGeneration], body: Mapping[str, Any]) -> dict[str, Any]:
    """Servers may say more than this version knows of."""
    return {entry.name: body[entry.name] for entry in fields(kind) if entry.name in body}
