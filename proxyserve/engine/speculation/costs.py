"""What a forward costs: a running estimate of its seconds by how many tokens it has.

    log seconds(count) = level + shape(count) + own(count)

The shape is what was found the first time, mostly at start-up. The level follows how fast the machine happens to be,
and what one count shows of it holds for all: counts that are not run for a while stay comparable with those that are,
and whether several tokens are worth it is a matter of ratios. What remains is a count's own. The own parts of the
counts that are run add up to nothing, or the level could be anything.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort

_LEVEL_RATE = 0.15
_OWN_RATE = 0.1
#: A forward further from its estimate than a factor of 1.6 counts as one that is this far: whatever held it up is not
#: what such a forward costs.
_SURPRISE = math.log(1.6)
#: Observations of a count until it is clear which of them were accidents.
_FIRST = 4
#: How many of the last observations say which counts are run now.
_RECENT = 64.0
_EXACT = 16


class ForwardCosts:
    """Of the forwards of one model, or of anything else whose time depends on a count. Fewer tokens never cost more.
    Beyond the largest count seen costs go on as they grew before it; where only one has been seen, the share `growth`
    of its time is taken to grow in proportion, the rest not at all."""

    def __init__(self, growth: float = 1.0) -> None:
        self._growth = growth
        self._level = 0.0
        self._counts: list[int] = []
        self._shape: dict[int, float] = {}
        self._own: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._recent: dict[int, float] = {}
        self._curve: list[float] = []  # seconds by place in `_counts`; empty: to be made

    def copy(self, times: float = 1.0) -> ForwardCosts:
        """Of a model whose forwards take that many times as long."""
        other = ForwardCosts(self._growth)
        other._level = self._level + math.log(times)
        other._counts, other._shape, other._own = [*self._counts], {**self._shape}, {**self._own}
        other._seen, other._recent = {**self._seen}, {**self._recent}
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
        count, found = _bucket(tokens), math.log(seconds) - self._level
        if count in self._shape:
            self._correct(count, found - self._shape[count] - self._own[count])
        else:
            if self._counts:  # it may be held up by accident, but nothing makes it faster
                found = min(found, math.log(self.seconds(count)) - self._level + _SURPRISE)
            insort(self._counts, count)
            self._shape[count], self._own[count], self._seen[count], self._recent[count] = found, 0.0, 1, 0.0
        self._curve = []

    def _correct(self, count: int, error: float) -> None:
        self._seen[count] += 1
        if error < -_SURPRISE and self._seen[count] <= _FIRST:  # what came before was an accident
            self._own[count] += error
        else:
            error = max(-_SURPRISE, min(_SURPRISE, error))
            self._level += _LEVEL_RATE * error
            self._own[count] += max(_OWN_RATE, 1.0 / self._seen[count]) * error
        for other in self._recent:
            self._recent[other] *= 1.0 - 1.0 / _RECENT
        self._recent[count] += 1.0
        mean = sum(weight * self._own[other] for other, weight in self._recent.items())
        mean /= sum(self._recent.values())
        self._level += mean
        for other, weight in self._recent.items():
            # Estimates of counts that are run stay as they are, others go with the level.
            self._own[other] -= mean * weight / (weight + 1.0)

    def seconds(self, tokens: int) -> float:
        """The estimate for `tokens` tokens, 0.0 for none. Infinite as long as nothing has been observed."""
        if tokens < 1:
            return 0.0
        if not self._counts:
            return math.inf
        counts, curve = self._counts, self._curve or self._make_curve()
        place = bisect_left(counts, tokens)
        if place == len(counts):
            return self._beyond(tokens, curve)
        if place == 0 or counts[place] == tokens:
            return curve[place]
        share = (tokens - counts[place - 1]) / (counts[place] - counts[place - 1])
        return curve[place - 1] * (1.0 - share) + curve[place] * share

    def _make_curve(self) -> list[float]:
        least = math.inf
        for count in reversed(self._counts):
            least = min(least, math.exp(self._level + self._shape[count] + self._own[count]))
            self._curve.append(least)
        self._curve.reverse()
        return self._curve

    def _beyond(self, tokens: int, curve: list[float]) -> float:
        last = self._counts[-1]
        # Over a distance of a factor of two, since neighbours differ by noise.
        before = bisect_right(self._counts, last // 2) - 1
        if before < 0:
            return curve[-1] * (1.0 + self._growth * (tokens / last - 1.0))
        slope = (curve[-1] - curve[before]) / (last - self._counts[before])
        return curve[-1] + slope * (tokens - last)


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
