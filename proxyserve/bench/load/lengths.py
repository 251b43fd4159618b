"""How many tokens prompts and answers have: always as many, or drawn from a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from proxyserve.errors import ProxyserveError

_FORMS = (
    "write 64, a range like 16-256 (each length as likely), mix:16=3,512=1 (lengths and shares), or "
    "lognormal:128:0.8:1024 (median, sigma of the logarithm, most)"
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens. `text` is what it was parsed from, `most` the longest that it draws."""

    text: str
    most: int
    _draw: Callable[[Random], int]

    def draw(self, random: Random) -> int:
        """One length, from 1 to `most`."""
        return self._draw(random)

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises ProxyserveError where `text` is no distribution, with the forms that are."""
        try:
            most, draw = _parse(text.strip())
        except ValueError:
            raise ProxyserveError(f"'{text}' is no distribution of lengths; {_FORMS}.") from None
        return cls(text.strip(), most, draw)


def _parse(text: str) -> tuple[int, Callable[[Random], int]]:
    if text.startswith("mix:"):
        pairs = [entry.split("=") for entry in text.removeprefix("mix:").split(",")]
        lengths = [_length(length) for length, _ in pairs]
        shares = [_positive(share) for _, share in pairs]
        return max(lengths), lambda random: random.choices(lengths, shares)[0]
    if text.startswith("lognormal:"):
        median, sigma, most = text.removeprefix("lognormal:").split(":")
        location, spread, limit = math.log(_positive(median)), _positive(sigma), _length(most)
        return limit, lambda random: min(limit, max(1, round(random.lognormvariate(location, spread))))
    if "-" in text:
        low, high = (_length(end) for end in text.split("-"))
        if low > high:
            raise ValueError(text)
        return high, lambda random: random.randint(low, high)
    always = _length(text)
    return always, lambda random: always


def _length(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0.0 < number < math.inf:
        raise ValueError(text)
    return number
