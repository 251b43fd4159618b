"""One answer of a server, as it streams: its text, what was told beside it, and how long it took."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from proxyserve.cli.connection import Connection
from proxyserve.cli.exits import Unreachable


@dataclass(frozen=True, slots=True)
class Piece:
    """What came at once. `explained` are the entries of `fusion.explain` for its tokens."""

    text: str
    reasoning: str = ""
    explained: Sequence[dict[str, Any]] = ()


@dataclass(slots=True)
class Answer:
    """Grows while `pieces` is read. Times are in seconds by a monotonic clock."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    fusion: dict[str, Any] = field(default_factory=dict)
    explained: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=perf_counter)
    first: float | None = None
    last: float | None = None

    def pieces(
        self, server: Connection, body: dict[str, Any], *, timeout: float
    ) -> Generator[Piece, None, None]:
        """Ask, and give the answer as it comes. Raises Refused and Unreachable; closing the iterator ends the request
        on the server."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self.begun = perf_counter()
        with server.stream("/v1/chat/completions", asked, timeout=timeout) as events:
            for event in events:
                try:
                    yield from self._read(event)
                except (KeyError, TypeError, AttributeError) as error:
                    raise Unreachable(
                        f"{server.url} streams what is no chat; it must be a proxyserve server."
                    ) from error

    def _read(self, event: dict[str, Any]) -> Iterator[Piece]:
        self.usage = event.get("usage") or self.usage
        self.fusion = event.get("fusion") or self.fusion
        for choice in event["choices"]:
            delta = choice["delta"]
            piece = Piece(
                delta.get("content") or "", delta.get("reasoning") or "", choice.get("explain") or ()
            )
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if piece.text or piece.reasoning or piece.explained:
                self.last = perf_counter()
                self.first = self.first or self.last
                self.text += piece.text
                self.reasoning += piece.reasoning
                self.explained += piece.explained
                yield piece

    def timings(self) -> dict[str, float | None]:
        """Seconds to the first text and to the last, and the tokens per second between the two."""
        if self.first is None or self.last is None:
            return {"first_token_seconds": None, "seconds": None, "tokens_per_second": None}
        between, tokens = self.last - self.first, self.usage.get("completion_tokens") or 0
        return {
            "first_token_seconds": self.first - self.begun,
            "seconds": self.last - self.begun,
            "tokens_per_second": (tokens - 1) / between if tokens > 1 and between > 0 else None,
        }

    def summary(self) -> str:
        """One line: times, tokens of each lane, what fusion did."""
        times, parts = self.timings(), []
        if times["first_token_seconds"] is not None:
            parts.append(f"first token {times['first_token_seconds']:.2f} s")
        if tokens := self.usage.get("completion_tokens"):
            parts.append(f"{tokens} token{'s' * (tokens > 1)} in {times['seconds'] or 0.0:.2f} s")
        if times["tokens_per_second"] is not None:
            parts.append(f"{times['tokens_per_second']:.1f} tok/s")
        lanes = self.usage.get("lane_tokens") or {}
        if lanes:
            parts.append("lanes " + ", ".join(f"{name} {count}" for name, count in lanes.items()))
        if self.fusion.get("flips") is not None:
            parts.append(f"{self.fusion['flips']} flip{'s' * (self.fusion['flips'] != 1)}")
        if self.fusion.get("mean_kl") is not None:
            parts.append(f"mean KL {self.fusion['mean_kl']:.3f}")
        if self.fusion.get("drafted"):
            parts.append(f"drafted {self.fusion['drafted']}, accepted {self.fusion.get('accepted', 0)}")
        if self.finish_reason == "length":
            parts.append("cut off at the most tokens")
        return " · ".join(parts)

    def as_json(self, model: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        return {
            "model": model,
            "message": message,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "fusion": self.fusion,
            "timings": self.timings(),
        }
