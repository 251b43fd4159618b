"""What a step costs, from what its parts cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from proxyserve.engine.speculation.costs import ForwardCosts, Speed
from proxyserve.types import ModelKey

#: Of all that is done beside forwards, as long as it is not known better: it is mostly a price per call.
_PICK_GROWTH = 0.2


class StepCosts:
    """Forwards by model and tokens: `forwards` all models' one of each step, `drafters` those that draft. By rows:
    `picking` all that a step does beside its forwards, `drafting` all that is done beside them at one depth of drafts,
    taken for another pick until it is known."""

    def __init__(self) -> None:
        self._speed = Speed()
        self.forwards: dict[ModelKey, ForwardCosts] = {}
        self.drafters: dict[ModelKey, ForwardCosts] = {}
        self.picking = ForwardCosts(self._speed, _PICK_GROWTH)
        self.drafting = ForwardCosts(self._speed, _PICK_GROWTH)

    def know(self, name: ModelKey, measured: Mapping[int, float]) -> None:
        """A model may be in steps from now on. `measured` are seconds of its forwards by tokens, as they were when the
        first step began."""
        self.forwards[name] = ForwardCosts(self._speed, measured=measured)
        self.drafters[name] = ForwardCosts(self._speed, measured=measured)

    def forget(self, name: ModelKey) -> None:
        del self.forwards[name], self.drafters[name]

    def seconds(self, tokens: Mapping[ModelKey, int], rows: int) -> float:
        """Of a step beside its drafting: with so many tokens of each model, and so many rows to pick from."""
        forwards = sum(self.forwards[name].seconds(count) for name, count in tokens.items())
        return forwards + self.picking.seconds(rows)

    def drafting_seconds(self, depths: Iterable[Mapping[ModelKey, int]]) -> float:
        """Of drafting: at each depth, tokens of each drafting model."""
        picks = self.drafting if self.drafting.known else self.picking
        total = 0.0
        for depth in depths:
            total += picks.seconds(sum(depth.values()))
            total += sum(self.drafters[name].seconds(count) for name, count in depth.items())
        return total

    def took(
        self, seconds: float, tokens: Mapping[ModelKey, int], spent: Mapping[ModelKey, float], rows: int
    ) -> None:
        """A step without prompts took so long, beside its drafting, and of that each model's forward what `spent`
        says."""
        for name, count in tokens.items():
            _observe(self.forwards[name], count, spent[name])
        _observe(self.picking, rows, seconds - sum(spent.values()))

    def drafting_took(
        self, seconds: float, depths: Sequence[Mapping[ModelKey, int]], spent: Mapping[ModelKey, float]
    ) -> None:
        """All depths together took so long, and of that each model's forwards what `spent` says."""
        for name, share in spent.items():
            counts = [depth[name] for depth in depths if name in depth]
            _observe(self.drafters[name], round(sum(counts) / len(counts)), share / len(counts))
        rows = sum(sum(depth.values()) for depth in depths)
        rest = seconds - sum(spent.values())
        _observe(self.drafting, round(rows / len(depths)), rest / len(depths))


def _observe(costs: ForwardCosts, count: int, seconds: float) -> None:
    """Clocks may say that no time has passed."""
    if seconds > 0.0:
        costs.observe(count, seconds)
