"""What a forward costs: a running estimate of its seconds by how many tokens it has.

    log seconds(count) = level + shape(count) + own(count)

The shape is what was found the first time, mostly at start-up. The level follows how fast the machine happens to be. It
is the same for all costs, and what any of them shows of it holds for all: those that nobody pays for a while stay
comparable with those that are, and whether several tokens are worth it is a matter of ratios. What remains is a count's
own. Of what is run, the own parts add up to nothing, or the level could be anything.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from types import MappingProxyType

_LEVEL_RATE = 0.15
_OWN_RATE = 0.1
#: A forward further from its estimate than a factor of 1.6 counts as one that is this far: whatever held it up is not
#: what such a forward costs.
_SURPRISE = math.log(1.6)
#: Observations of a count until it is clear which of them were accidents.
_FIRST = 4
#: How many of the last observations say what is run now.
_RECENT = 128.0
_FORGOTTEN = 0.01
_EXACT = 16


class Speed:
    """Of the machine, as the logarithm of how many times as long everything takes as at first."""

    def __init__(self) -> None:
        self.level = 0.0
        #: Goes up with each change of anybody's estimates.
        self.version = 0
        self._recent: dict[tuple[ForwardCosts, int], float] = {}

    def ran(self, costs: ForwardCosts, count: int) -> None:
        """Move what the own parts of what is run now have in common to the level: their estimates stay, others follow
        the level."""
        self.version += 1
        recent = {
            key: weight * (1.0 - 1.0 / _RECENT) for key, weight in self._recent.items() if weight > _FORGOTTEN
        }
        recent[costs, count] = recent.get((costs, count), 0.0) + 1.0
        self._recent = recent
        mean = sum(weight * curve.own[place] for (curve, place), weight in recent.items())
        mean /= sum(recent.values())
        self.level += mean
        for (curve, place), weight in recent.items():
            curve.own[place] -= mean * weight / (weight + 1.0)


class ForwardCosts:
    """Of the forwards of one model, or of anything else whose time depends on a count. Fewer tokens never cost more.
    Beyond the largest count seen costs go on as they grew before it; where only one has been seen, the share `growth`
    of its time is taken to grow in proportion, the rest not at all."""

    def __init__(
        self, speed: Speed, growth: float = 1.0, measured: Mapping[int, float] = MappingProxyType({})
    ) -> None:
        """`measured` are seconds by count, found when the level was 0."""
        self._speed = speed
        self._growth = growth
        self._counts = sorted(measured)
        self._shape = {count: math.log(seconds) for count, seconds in measured.items()}
        self.own = dict.fromkeys(measured, 0.0)
        self._seen = dict.fromkeys(measured, 1)
        self._estimates: dict[int, float] = {}  # by tokens, of one version
        self._version = -1

    @property
    def known(self) -> bool:
        """Whether there has been any observation."""
        return bool(self._counts)

    def observe(self, tokens: int, seconds: float) -> None:
        """A forward of `tokens` tokens, all of whose logits were wanted, took so many seconds. Raises ValueError unless
        both are positive."""
        if tokens < 1 or not 0.0 < seconds < math.inf:
            raise ValueError(f"a forward of {tokens} tokens cannot have taken {seconds} seconds")
        count, found = _bucket(tokens), math.log(seconds) - self._speed.level
        if count in self._shape:
            self._correct(count, found - self._shape[count] - self.own[count])
            self._speed.ran(self, count)
            return
        if self._counts:  # it may be held up by accident, but nothing makes it faster
            found = min(found, math.log(self.seconds(count)) - self._speed.level + _SURPRISE)
        insort(self._counts, count)
        self._shape[count], self.own[count], self._seen[count] = found, 0.0, 1
        self._version = -1

    def _correct(self, count: int, error: float) -> None:
        self._seen[count] += 1
        if error < -_SURPRISE and self._seen[count] <= _FIRST:  # what came before was an accident
            self.own[count] += error
        else:
            error = max(-_SURPRISE, min(_SURPRISE, error))
            self._speed.level += _LEVEL_RATE * error
            self.own[count] += max(_OWN_RATE, 1.0 / self._seen[count]) * error

    def seconds(self, tokens: int) -> float:
        """The estimate for `tokens` tokens, 0.0 for none. Infinite as long as nothing has been observed."""
        if tokens < 1:
            return 0.0
        if not self._counts:
            return math.inf
        if self._version != self._speed.version:
            self._version, self._estimates = self._speed.version, {}
        found = self._estimates.get(tokens)
        if found is None:
            found = self._estimates[tokens] = self._estimate(tokens)
        return found

    def _estimate(self, tokens: int) -> float:
        counts = self._counts
        place = bisect_left(counts, tokens)
        if place == len(counts):
            return self._beyond(tokens)
        if place == 0 or counts[place] == tokens:
            return self._at(place)
        lower, upper = self._at(place - 1), self._at(place)
        share = (tokens - counts[place - 1]) / (counts[place] - counts[place - 1])
        return lower * (1.0 - share) + upper * share

    def _at(self, place: int) -> float:
        """At the count in this place."""
        least = min(self._shape[count] + self.own[count] for count in self._counts[place:])
        return math.exp(self._speed.level + least)

    def _beyond(self, tokens: int) -> float:
        last, at_last = self._counts[-1], self._at(-1)
        # Over a distance of a factor of two, since neighbours differ by noise.
        before = bisect_right(self._counts, last // 2) - 1
        if before < 0:
            return at_last * (1.0 + self._growth * (tokens / last - 1.0))
        return at_last + (at_last - self._at(before)) / (last - self._counts[before]) * (tokens - last)


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
