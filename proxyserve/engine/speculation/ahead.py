"""How one request runs ahead of its text."""

from __future__ import annotations

from dataclasses import dataclass

from proxyserve.engine.speculation.acceptance import Drafting
from proxyserve.engine.speculation.lookup import Lookup
from proxyserve.scheduler.lane import Lane


@dataclass(slots=True)
class Ahead:
    """`drafter` is the lane that drafts the next tokens, `steady` says that it always is; without one, drafts are
    looked up in the text. `drafting` is how that goes, None where nobody goes by it.

    Of a step without drafts: `shadow` says whether the drafter's token is to be drawn as well, to be compared with the
    row's, and `guess` is what was looked up to come next, None if nothing was."""

    drafter: Lane | None
    steady: bool
    lookup: Lookup
    drafting: Drafting | None = None
    shadow: bool = False
    guess: int | None = None
