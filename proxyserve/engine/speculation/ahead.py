"""How one request runs ahead of its text."""

from __future__ import annotations

from dataclasses import dataclass

from proxyserve.engine.speculation.lookup import Lookup
from proxyserve.scheduler.lane import Lane


@dataclass(slots=True)
class Ahead:
    """`drafter` is the lane that drafts the next tokens, `steady` says that it always is; without one, drafts are
    looked up in the text."""

    drafter: Lane | None
    steady: bool
    lookup: Lookup
