"""What a step costs, from what its parts cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from proxyserve.engine.speculation.costs import ForwardCosts, Speed
from proxyserve.types import ModelKey

#: Of all that is done beside forwards, as long as it is not known better: it is mostly a price per call.
_PICK_GROWTH = 0.2
#: What it is at most taken to cost before it is known, as a share of the largest model's forward of as many tokens.
_PICK_SHARE = 0.1


class StepCosts:
    """Forwards by model and tokens: `forwards` all models' one of each step, `drafters` those that draft. By rows:
    `picking` all that a step does beside its forwards, `drafting` all that is done beside them at one depth of drafts,
    taken for another pick until it is known. Both are a small share of a forward at first: trying tells more.

    Where no clock says what a part took, as on a GPU that is still busy when a forward has returned, parts have the
    shares of the whole that they had at start-up, when each was waited for."""

    def __init__(self) -> None:
        self._speed = Speed()
        self.forwards: dict[ModelKey, ForwardCosts] = {}
        self.drafters: dict[ModelKey, ForwardCosts] = {}
        self.picking = ForwardCosts(self._speed, _PICK_GROWTH)
        self.drafting = ForwardCosts(self._speed, _PICK_GROWTH)
        self._measured: dict[ModelKey, ForwardCosts] = {}

    def know(self, name: ModelKey, measured: Mapping[int, float]) -> None:
        """A model may be in steps from now on. `measured` are seconds of its forwards by tokens, as they were when the
        first step began."""
        self.forwards[name] = ForwardCosts(self._speed, measured=measured)
        self.drafters[name] = ForwardCosts(self._speed, measured=measured)
        self._measured[name] = ForwardCosts(Speed(), measured=measured)  # as they stay

    def forget(self, name: ModelKey) -> None:
        del self.forwards[name], self.drafters[name], self._measured[name]

    def seconds(self, tokens: Mapping[ModelKey, int], rows: int) -> float:
        """Of a step beside its drafting: with so many tokens of each model, and so many rows to pick from."""
        forwards = sum(self.forwards[name].seconds(count) for name, count in tokens.items())
        picking = self.picking.seconds(rows) if self.picking.known else _pick_at_first(self.forwards, rows)
        return forwards + picking

    def drafting_seconds(self, depths: Iterable[Mapping[ModelKey, int]]) -> float:
        """Of drafting: at each depth, tokens of each drafting model."""
        return sum(
            self._drafting_pick(sum(depth.values()))
            + sum(self.drafters[name].seconds(count) for name, count in depth.items())
            for depth in depths
        )

    def _drafting_pick(self, rows: int) -> float:
        if self.drafting.known:
            return self.drafting.seconds(rows)
        # What seems to be the pick may be waiting for something that drafting has nothing to do with.
        return min(self.picking.seconds(rows), _pick_at_first(self.forwards, rows))

    def took(
        self,
        seconds: float,
        tokens: Mapping[ModelKey, int],
        spent: Mapping[ModelKey, float] | None,
        rows: int,
    ) -> None:
        """A step without prompts took so long, beside its drafting, and of that each model's forward what `spent`
        says; None: no clock says that."""
        if spent is None:
            spent = self._shares(seconds, [tokens], rows)
        for name, count in tokens.items():
            _observe(self.forwards[name], count, spent[name])
        _observe(self.picking, rows, seconds - sum(spent.values()))

    def drafting_took(
        self, seconds: float, depths: Sequence[Mapping[ModelKey, int]], spent: Mapping[ModelKey, float] | None
    ) -> None:
        """All depths together took so long, and of that each model's forwards what `spent` says; None: no clock says
        that, and what forwards were not expected to take is beside them."""
        if spent is None:
            rows = sum(sum(depth.values()) for depth in depths)
            spent = {
                name: min(
                    share, sum(self.drafters[name].seconds(depth[name]) for depth in depths if name in depth)
                )
                for name, share in self._shares(seconds, depths, round(rows / len(depths))).items()
            }
        for name, share in spent.items():
            counts = [depth[name] for depth in depths if name in depth]
            _observe(self.drafters[name], round(sum(counts) / len(counts)), share / len(counts))
        rows = sum(sum(depth.values()) for depth in depths)
        rest = seconds - sum(spent.values())
        _observe(self.drafting, round(rows / len(depths)), rest / len(depths))

    def _shares(
        self, seconds: float, forwards: Sequence[Mapping[ModelKey, int]], rows: int
    ) -> dict[ModelKey, float]:
        """What each model has of the seconds of these forwards, each with a pick of so many rows."""
        parts: dict[ModelKey, float] = {}
        for tokens in forwards:
            for name, count in tokens.items():
                parts[name] = parts.get(name, 0.0) + self._measured[name].seconds(count)
        whole = sum(parts.values()) + len(forwards) * _pick_at_first(self._measured, rows)
        return {name: seconds * part / whole for name, part in parts.items()}


def _pick_at_first(forwards: Mapping[ModelKey, ForwardCosts], rows: int) -> float:
    return _PICK_SHARE * max((costs.seconds(rows) for costs in forwards.values()), default=math.inf)


def _observe(costs: ForwardCosts, count: int, seconds: float) -> None:
    """Clocks may say that no time has passed."""
    if seconds > 0.0:
        costs.observe(count, seconds)
