"""What a forward costs: a running estimate of its seconds by how many tokens it has.

Time is split in two: a curve over token counts, which belongs to the model and changes slowly, and a level, which is
how fast the machine happens to be. What one count shows about the level holds for all of them, so counts that are not
run for a while stay comparable with those that are: whether several tokens are worth it is a matter of ratios.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort

_LEVEL_RATE = 0.15
_CURVE_RATE = 0.1
#: A forward further from its estimate than a factor of 1.6 counts as one that is this far: whatever held it up is not
#: what such a forward costs.
_SURPRISE = math.log(1.6)
_FIRST = 4
_EXACT = 16


class ForwardCosts:
    """Of the forwards of one model, or of anything else whose time depends on a count. Estimates grow with the count;
    beyond the largest count seen they go on as they grew before it. Where only one has been seen, the share `growth` of
    its time is taken to grow in proportion, the rest not at all."""

    def __init__(self, growth: float = 1.0) -> None:
        self._growth = growth
        self._level = 0.0
        self._counts: list[int] = []
        self._curve: dict[int, float] = {}  # by count, log seconds at level 0
        self._seen: dict[int, int] = {}

    def copy(self, times: float = 1.0) -> ForwardCosts:
        """Of a model whose forwards take that many times as long."""
        other = ForwardCosts(self._growth)
        other._level = self._level + math.log(times)
        other._counts, other._curve, other._seen = [*self._counts], {**self._curve}, {**self._seen}
        return other

    @property
    def known(self) -> bool:
        """Whether there has been any observation."""
        return bool(self._counts)

    def observe(self, tokens: int, seconds: float) -> None:
        """A forward of `tokens` tokens, all of whose logits were wanted, took so many seconds. Raises ValueError unless
        both are positive."""
        if tokens < 1 or not 0.0 < seconds < math.inf:
            raise ValueError(f"a forward of {tokens} tokens cannot have taken {seconds} seconds")
        count, found = _bucket(tokens), math.log(seconds)
        if count not in self._curve:
            self._add(count, found)
            return
        error = found - self._level - self._curve[count]
        if error < -_SURPRISE and self._seen[count] < _FIRST:  # what came before was an accident
            self._curve[count], error = found - self._level, 0.0
        error = max(-_SURPRISE, min(_SURPRISE, error))
        self._level += _LEVEL_RATE * error
        self._seen[count] += 1
        # The first times say what the curve is here, later ones whether it changes.
        self._curve[count] += max(_CURVE_RATE, 1.0 / self._seen[count]) * error
        self._straighten(count)

    def seconds(self, tokens: int) -> float:
        """The estimate for `tokens` tokens, 0.0 for none. Infinite as long as nothing has been observed."""
        if tokens < 1:
            return 0.0
        if not self._counts:
            return math.inf
        counts = self._counts
        place = bisect_left(counts, tokens)
        if place == len(counts):
            return self._beyond(tokens)
        upper = counts[place]
        if place == 0 or upper == tokens:
            return self._at(upper)
        lower = counts[place - 1]
        share = (tokens - lower) / (upper - lower)
        return self._at(lower) * (1.0 - share) + self._at(upper) * share

    def _beyond(self, tokens: int) -> float:
        last = self._counts[-1]
        # Over a distance of a factor of two, since neighbours differ by noise.
        before = bisect_right(self._counts, last // 2)
        if not before:
            return self._at(last) * (1.0 + self._growth * (tokens / last - 1.0))
        first = self._counts[before - 1]
        slope = (self._at(last) - self._at(first)) / (last - first)
        return self._at(last) + slope * (tokens - last)

    def _at(self, count: int) -> float:
        return math.exp(self._level + self._curve[count])

    def _add(self, count: int, found: float) -> None:
        """The first observation of a count: much slower than expected it may be by accident, but never faster."""
        if self._counts:
            found = min(found, math.log(self.seconds(count)) + _SURPRISE)
        insort(self._counts, count)
        self._curve[count] = found - self._level
        self._seen[count] = 1
        self._straighten(count)

    def _straighten(self, count: int) -> None:
        """Fewer tokens cost no more and more tokens no less; where older estimates disagree, the newest is right."""
        value = self._curve[count]
        for other in self._counts:
            known = self._curve[other]
            self._curve[other] = min(known, value) if other < count else max(known, value)


def _bucket(tokens: int) -> int:
    """Small counts by themselves, larger ones rounded to four binary digits."""
    if tokens <= _EXACT:
        return tokens
    step = 1 << (tokens.bit_length() - 4)
    return (tokens + step // 2) // step * step


def start_up_sizes(most: int) -> list[int]:
    """Token counts up to at least `most` to measure before any request comes: what costs little more than a single one
    must be known before it is tried. Each by itself where kernels change most, then steps of about a half."""
    sizes = [1]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(last + 1 if last < 6 else -(-last * 4 // 3) if last < 9 else -(-last * 3 // 2))
    return sizes
