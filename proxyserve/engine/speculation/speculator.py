"""Which requests run ahead of their text in the next step, how far, and by whose drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxyserve.config import EngineConfig
from proxyserve.engine.choice import Choice
from proxyserve.engine.speculation.ahead import Ahead
from proxyserve.engine.speculation.drafter import drafter_of, is_steady
from proxyserve.engine.speculation.lookup import Lookup
from proxyserve.models.remote import RemoteModel
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import Wish
from proxyserve.types import ModelKey


class Speculator:
    """`base` is the trunk whose lanes never draft. `proposed` has the drafts of this step's wishes that were looked
    up."""

    def __init__(self, config: EngineConfig, base: ModelKey) -> None:
        self._base = base
        self._fixed = config.speculate if isinstance(config.speculate, int) else 0
        self.proposed: Mapping[ScheduledRequest, list[int]] = {}

    def begin(self, choice: Choice) -> None:
        """A new choice. Those that a gate or a remote model makes wait between tokens never run ahead."""
        if not self._fixed or choice.is_gated or choice.max_output < 2:
            return
        if any(isinstance(spec.model, RemoteModel) for spec in choice.program.lanes):
            return
        drafter = drafter_of(choice, self._base)
        choice.ahead = Ahead(drafter, is_steady(choice), Lookup(choice.scheduled.lanes[0].prompt))

    def wishes(self, running: Iterable[Choice]) -> Mapping[ScheduledRequest, Wish]:
        """How far each of them would go if it only needs its next token, which is not looked at. A draft is never the
        last token of an answer: the row before it draws that."""
        wishes: dict[ScheduledRequest, Wish] = {}
        proposed: dict[ScheduledRequest, list[int]] = {}
        for choice in running:
            ahead, request = choice.ahead, choice.scheduled
            if ahead is None:
                continue
            drafts = min(self._fixed, choice.max_output - len(choice.output) - 1)
            if drafts < 1:
                continue
            if not ahead.steady:
                ahead.drafter = drafter_of(choice, self._base)
            if ahead.drafter is None:
                proposed[request] = ahead.lookup.propose(choice.output, drafts)
                drafts = len(proposed[request])
            if drafts:
                wishes[request] = Wish(drafts, ahead.drafter)
        self.proposed = proposed
        return wishes
