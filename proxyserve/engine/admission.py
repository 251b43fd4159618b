"""What is let in: caps on what waits, of all callers together and of each, and rates per caller.

A choice waits from its submission to its first event. Refusing is cheap and comes early; what is refused has cost
nothing and is counted nowhere.

Rates are token buckets that hold a minute's worth. A request takes one of the requests, its prompts' tokens when it is
let in, and each generated token when it comes; nothing is reserved for tokens that may never come. So a caller may end
below zero, by what it has running at once, and is let in again once that has been paid back: over time the rate holds
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from proxyserve.config import Limits
from proxyserve.engine.caller import Caller
from proxyserve.errors import InvalidRequest, QueueFull

#: Seconds over which drain rates are averaged, and the longest that anybody is told to wait.
_WINDOW = 30.0
_LONGEST = 60.0


@dataclass(frozen=True, slots=True)
class RateState:
    """Of one bucket: what it holds when full, what it holds now (not below 0), and the seconds until it is full."""

    limit: int
    remaining: int
    reset: float


class Bucket:
    """`per_minute` units flow in each minute, up to that many. More than it holds may be taken, which leaves a debt."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def take(self, amount: int, now: float) -> None:
        self._level = self._at_time(now) - amount
        self._at = now

    def seconds_until(self, level: float, now: float) -> float:
        """Until it holds that much, 0 if it does."""
        return max(0.0, level - self._at_time(now)) * 60.0 / self.per_minute

    def state(self, now: float) -> RateState:
        level = self._at_time(now)
        return RateState(self.per_minute, max(0, math.floor(level)), self.seconds_until(self.per_minute, now))

    def _at_time(self, now: float) -> float:
        return min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60.0)


class Line:
    """What waits, of one caller or of all: choices and their prompts' tokens, and how fast they leave. The rate is
    measured while anything waits, and recent seconds count most."""

    def __init__(self, now: float) -> None:
        self.requests = 0
        self.tokens = 0
        self._at = now
        self._busy = 0.0  # seconds in which something waited, and what left in them; older ones fade
        self._left_requests = 0.0
        self._left_tokens = 0.0

    def join(self, requests: int, tokens: int, now: float) -> None:
        self._advance(now)
        self.requests += requests
        self.tokens += tokens

    def leave(self, tokens: int, now: float) -> None:
        """One choice has begun, or has ended before it could."""
        self._advance(now)
        self.requests -= 1
        self.tokens -= tokens
        self._left_requests += 1.0
        self._left_tokens += tokens

    def seconds_until_left(self, requests: int, tokens: int, now: float) -> float:
        """Until that many, if positive, will have left at the present rate."""
        self._advance(now)
        waits = [
            amount * self._busy / left if left else math.inf
            for amount, left in ((requests, self._left_requests), (tokens, self._left_tokens))
            if amount > 0
        ]
        return max(waits, default=0.0)

    def _advance(self, now: float) -> None:
        if self.requests:
            fade = math.exp((self._at - now) / _WINDOW)
            self._busy = self._busy * fade + _WINDOW * (1.0 - fade)
            self._left_requests *= fade
            self._left_tokens *= fade
        self._at = now


class _Account:
    """What is known of one caller."""

    def __init__(self, now: float) -> None:
        self.line = Line(now)
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None

    def follow(self, caller: Caller, now: float) -> None:
        """Have the buckets that the caller's limits say now; key files change while the server runs."""
        limits = caller.limits
        self.requests = _bucket(self.requests, limits.requests_per_minute, now)
        self.tokens = _bucket(self.tokens, limits.tokens_per_minute, now)


def _bucket(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    return bucket if bucket is not None and bucket.per_minute == per_minute else Bucket(per_minute, now)


class Admission:
    """Counts what waits and what was taken. Not thread-safe: `AsyncEngine` calls it under its lock."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._everyone = Line(clock())
        self._accounts: dict[str, _Account] = {}
        self._waiting: dict[str, tuple[str, int]] = {}  # choices -> caller, prompt tokens

    @property
    def waiting_tokens(self) -> int:
        return self._everyone.tokens

    def check(self, caller: Caller) -> None:
        """Raise QueueFull if not even the smallest request of the caller would be let in now."""
        self._check(caller, requests=1, tokens=1, rates=True)

    def admit(
        self, caller: Caller, choices: Mapping[str, int], *, prompt_tokens: int, more: bool = False
    ) -> None:
        """Let a request in: its choices, which wait from now on, with the tokens of their prompts, and the tokens of
        all its prompts, each counted once. `more`: it is part of a request that was let in already, and
        rates refuse it no more. Raises QueueFull if it must wait, InvalidRequest if it can never come in."""
        tokens = sum(choices.values())
        self._check_size(caller, len(choices), tokens)
        account = self._check(caller, requests=len(choices), tokens=tokens, rates=not more)
        now = self._clock()
        for line in (self._everyone, account.line):
            line.join(len(choices), tokens, now)
        for key, prompt in choices.items():
            self._waiting[key] = caller.name, prompt
        if account.requests is not None and not more:
            account.requests.take(1, now)
        if account.tokens is not None:
            account.tokens.take(prompt_tokens, now)

    def begun(self, key: str) -> None:
        """The choice has had an event; only the first one counts."""
        if key in self._waiting:
            name, tokens = self._waiting.pop(key)
            now = self._clock()
            for line in (self._everyone, self._accounts[name].line):
                line.leave(tokens, now)

    def generated(self, caller: Caller, tokens: int) -> None:
        bucket = self._accounts[caller.name].tokens
        if bucket is not None:
            bucket.take(tokens, self._clock())

    def rates(self, caller: Caller) -> Mapping[str, RateState]:
        """What the caller's buckets hold: of "requests" and "tokens", those that are limited."""
        account, now = self._account(caller), self._clock()
        buckets = {"requests": account.requests, "tokens": account.tokens}
        return {name: bucket.state(now) for name, bucket in buckets.items() if bucket is not None}

    def _account(self, caller: Caller) -> _Account:
        now = self._clock()
        account = self._accounts.get(caller.name)
        if account is None:
            account = self._accounts[caller.name] = _Account(now)
        account.follow(caller, now)
        return account

    def _check_size(self, caller: Caller, requests: int, tokens: int) -> None:
        own = caller.limits
        for number, most, what in (
            (requests, _least(self._limits.max_waiting_requests, own.waiting_requests), "choices"),
            (tokens, _least(self._limits.max_waiting_tokens, own.waiting_tokens), "prompt tokens"),
        ):
            if number > most:
                raise InvalidRequest(
                    f"The request has {number} {what} over all its prompts and choices, and never more than {most} "
                    "may wait; split it, or lower n.",
                    param="n" if requests > 1 else "prompt",
                )

    def _check(self, caller: Caller, *, requests: int, tokens: int, rates: bool) -> _Account:
        """Raises QueueFull. The caller's account otherwise."""
        account, now, own = self._account(caller), self._clock(), caller.limits
        _check_line(
            self._everyone,
            requests,
            tokens,
            (self._limits.max_waiting_requests, self._limits.max_waiting_tokens),
            ("the server takes", "queue_full"),
            now,
        )
        _check_line(
            account.line,
            requests,
            tokens,
            (own.waiting_requests, own.waiting_tokens),
            ("this key may have", "key_limit"),
            now,
        )
        buckets = ((account.requests, "requests"), (account.tokens, "tokens")) if rates else ()
        for bucket, what in buckets:
            wait = 0.0 if bucket is None else bucket.seconds_until(1.0, now)
            if bucket is not None and wait:
                raise QueueFull(
                    f"This key may use {bucket.per_minute} {what} per minute, and has. Try again later.",
                    retry_after=wait,
                    code="rate_limit",
                )
        return account


def _check_line(
    line: Line,
    requests: int,
    tokens: int,
    most: tuple[int | None, int | None],
    words: tuple[str, str],
    now: float,
) -> None:
    """Raises QueueFull if the line would have more than `most` choices or tokens."""
    over_requests = 0 if most[0] is None else line.requests + requests - most[0]
    over_tokens = 0 if most[1] is None else line.tokens + tokens - most[1]
    if over_requests <= 0 and over_tokens <= 0:
        return
    waits, limit = (
        (f"{line.requests} requests wait", most[0])
        if over_requests > 0
        else (f"Requests with {line.tokens} prompt tokens wait", most[1])
    )
    subject, code = words
    raise QueueFull(
        f"{waits}; {subject} {limit}. Try again later.",
        retry_after=min(_LONGEST, line.seconds_until_left(over_requests, over_tokens, now)),
        code=code,
    )


def _least(first: int, second: int | None) -> int:
    return first if second is None else min(first, second)
