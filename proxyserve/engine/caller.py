"""On whose behalf a request is made, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is what the work is accounted to (the name of a key): callers share the engine fairly, and limits are per
    caller. `admin`: may do what the policy keeps for administrators. `experts` are those that the caller may use, None
    for all. `explain`: may ask what each model thought of a token."""

    name: str = ""
    admin: bool = True
    experts: frozenset[str] | None = None
    explain: bool = True
