"""A stand-in for what a real engine does only when something is wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from proxyserve.engine.admission import RateState
from proxyserve.engine.caller import Caller
from proxyserve.engine.loop import EngineStats
from proxyserve.engine.offer import Lease, Offer, Offers
from proxyserve.engine.submission import Submission
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason, FusionReport, OutputEvent, Usage

Script = Callable[[Sequence[Submission]], AsyncIterator[OutputEvent]]


@dataclass
class FakeEngine:
    """Answers every `submit` with what `script` yields, or raises `refusal`. Counts streams that were not closed."""

    models: ModelSet
    script: Script | None = None
    refusal: Exception | None = None
    state: str = "ready"
    lost: bool = False
    open_streams: int = 0
    submitted: list[Submission] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        offers = Offers(Offer(Catalog(self.models), FusionPolicy()))
        return SimpleNamespace(models=self.models, catalog=offers.current.catalog, offers=offers)

    def submit(self, submissions: Sequence[Submission], lease: Lease, *, more: bool = False) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        assert self.script is not None
        self.submitted.extend(submissions)
        return FakeStream(self, self.script(submissions))

    def check_room(self, caller: Caller) -> None:
        return None

    def rates(self, caller: Caller) -> Mapping[str, RateState]:
        return {}

    def drain(self) -> None:
        self.state = "draining"

    async def drained(self) -> None:
        return None

    def snapshot(self) -> EngineStats:
        return EngineStats()


class FakeStream:
    def __init__(self, engine: FakeEngine, events: AsyncIterator[OutputEvent]) -> None:
        self._engine = engine
        self._events = events
        self._closed = False
        self.generations: dict[str, int] = {}
        engine.open_streams += 1

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> OutputEvent:
        return await self._events.__anext__()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.open_streams -= 1


def token(submission: Submission, text: str, index: int = 0) -> OutputEvent:
    return OutputEvent(submission.request_id, index, (65,), text)


def last(submission: Submission, text: str = "", index: int = 0, tokens: int = 1) -> OutputEvent:
    return OutputEvent(
        submission.request_id,
        index,
        (66,),
        text,
        finish_reason=FinishReason.STOP,
        usage=Usage(10, tokens, 4, {"atlas": 9 + tokens}),
        fusion=FusionReport("proxy", 1.0, {"qa": 3}, mean_kl=float(tokens), flips=tokens),
    )
