"""What a caller asks of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxyserve.engine.caller import Caller
from proxyserve.engine.constraint import Constrains
from proxyserve.fusion.fusion import Fusion
from proxyserve.types import SamplingParams


@dataclass(frozen=True, slots=True)
class LanePrompts:
    """Prompt ids per lane, by name (`base`, `qa.tuned`, `base@negative`); a lane that is not in `by_lane` gets
    `default`."""

    default: tuple[int, ...]
    by_lane: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, lane: str) -> tuple[int, ...]:
        return self.by_lane.get(lane, self.default)


@dataclass(frozen=True, slots=True)
class Submission:
    """One prompt and how to continue it, `n` times. `salt` keeps prefix-cache entries of different tenants
    apart: entries are shared only between submissions of equal salt. `vetted`: the fusion's weights are the operator's
    own (a preset), whoever asks. Of waiting requests those with the lowest `priority` go first. `constraints` say which
    tokens may come, beside what `sampling` says."""

    request_id: str
    prompts: LanePrompts
    sampling: SamplingParams
    fusion: Fusion = field(default_factory=Fusion)
    n: int = 1
    salt: str = ""
    caller: Caller = field(default_factory=Caller)
    vetted: bool = False
    priority: int = 0
    constraints: tuple[Constrains, ...] = ()
