"""Why each token was chosen: what `explain` in a fusion asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ListedToken:
    """A token and its log-prob in nats."""

    token: str
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class LawOfToken:
    """One law's log-prob of the token that was chosen, and the law's likeliest tokens."""

    logprob: float
    top: tuple[ListedToken, ...]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        top = (ListedToken(entry["token"], entry["token_id"], entry["logprob"]) for entry in body["top"])
        return cls(body["logprob"], tuple(top))


@dataclass(frozen=True, slots=True)
class Contribution:
    """How far an expert moved a token: `push` is `weight` times its delta of that token, in nats."""

    expert: str
    weight: float
    push: float


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A token and what every lane thought of it. `lanes` has `base`, `EXPERT.tuned`, `EXPERT.untuned` and other lanes
    that ran. `kl` is KL(fused || base) in nats and `flip` whether the fused argmax differs from the base's, both None
    where the base did not run; `gated` whether the base was sure enough and decided alone."""

    token: str
    token_id: int
    fused: LawOfToken
    lanes: Mapping[str, LawOfToken]
    weights: Mapping[str, float]
    push: Mapping[str, float]
    kl: float | None
    flip: bool | None
    gated: bool

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        return cls(
            body["token"],
            body["token_id"],
            LawOfToken.of(body["fused"]),
            {name: LawOfToken.of(law) for name, law in body["lanes"].items()},
            body["weights"],
            body["push"],
            body["kl"],
            body["flip"],
            body["gated"],
        )

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """What each expert did to the token, the strongest first."""
        found = (Contribution(name, self.weights.get(name, 0.0), push) for name, push in self.push.items())
        return tuple(sorted(found, key=lambda entry: -abs(entry.push)))
