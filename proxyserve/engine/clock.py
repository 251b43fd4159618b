"""When things happened to one choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

from proxyserve.types import Timing


@dataclass(slots=True)
class Clock:
    """Times by `time.perf_counter`, written on the engine's thread. A choice is prepared just before it is queued, so
    its clock begins when it is made. `admitted` is the first time: what preemption costs belongs to what it delays."""

    queued: float = field(default_factory=perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    barrier: float = 0.0

    def token(self, now: float) -> float | None:
        """A token has been chosen. Returns the seconds since the one before it, None for the first."""
        previous, self.last_token = self.last_token, now
        if previous is None:
            self.first_token = now
            return None
        return now - previous

    def timing(self, now: float) -> Timing:
        """Of a choice that ends now."""
        return Timing(self.queued, self.admitted, self.first_token, now, self.barrier)
