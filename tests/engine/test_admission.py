"""What is let in, by a clock that the test sets: caps, rates, and how long those that are refused are told to wait."""

from __future__ import annotations

import random

import pytest

from proxyserve.config import Limits
from proxyserve.engine.admission import Admission
from proxyserve.engine.caller import Caller, CallerLimits
from proxyserve.errors import InvalidRequest, QueueFull


class Door:
    """An admission and its clock."""

    def __init__(self, **limits: int) -> None:
        self.now = 1000.0
        self.admission = Admission(Limits(**limits), clock=lambda: self.now)
        self._numbers = 0

    def send(self, caller: Caller, choices: int = 1, tokens: int = 10) -> list[str]:
        keys = []
        for _ in range(choices):
            self._numbers += 1
            keys.append(f"r{self._numbers}/0")
        self.admission.admit(caller, dict.fromkeys(keys, tokens), prompt_tokens=tokens)
        return keys

    def refusal(self, caller: Caller, choices: int = 1, tokens: int = 10) -> QueueFull:
        """That of a request which changes nothing by being refused."""
        before = self.admission.waiting_tokens, self.admission.rates(caller)
        with pytest.raises(QueueFull) as refused:
            self.send(caller, choices, tokens)
        assert (self.admission.waiting_tokens, self.admission.rates(caller)) == before
        return refused.value


def key(name: str, **limits: int) -> Caller:
    return Caller(name, admin=False, limits=CallerLimits(**limits))


@pytest.mark.parametrize(
    ("limits", "own", "code"),
    [
        ({"max_waiting_requests": 3}, {}, "queue_full"),
        ({"max_waiting_tokens": 30}, {}, "queue_full"),
        ({}, {"waiting_requests": 3}, "key_limit"),
        ({}, {"waiting_tokens": 30}, "key_limit"),
    ],
)
def test_caps(limits: dict[str, int], own: dict[str, int], code: str) -> None:
    door, ann, bob = Door(**limits), key("ann", **own), key("bob")
    first, *_ = door.send(ann, choices=3)
    assert door.refusal(ann).code == code
    with pytest.raises(QueueFull):
        door.admission.check(ann)  # which is known before anything of the request is
    if code == "key_limit":
        door.send(bob)  # others are not concerned
    else:
        assert door.refusal(bob).code == code
    door.admission.begun(first)
    door.admission.begun(first)  # only its first event counts
    door.admission.check(ann)
    door.send(ann)
    assert door.refusal(ann).code == code
    with pytest.raises(InvalidRequest, match="never more than 3"):
        door.send(key("carl", **own), choices=4)


def test_a_request_counts_with_all_its_choices() -> None:
    door, ann = Door(max_waiting_tokens=100), key("ann")
    door.send(ann, choices=4, tokens=20)
    assert door.admission.waiting_tokens == 80
    assert door.refusal(ann, choices=2, tokens=20).code == "queue_full"
    door.send(ann, choices=1, tokens=20)


def test_retry_after_follows_the_drain_rate() -> None:
    """Five choices leave per second, whatever the time before in which nothing waited; then one in two seconds."""
    door, ann = Door(max_waiting_requests=100), key("ann")
    door.now += 3600
    queue = door.send(ann, choices=100)

    def drain(seconds: float, per_second: float) -> None:
        for _ in range(round(seconds * per_second)):
            door.now += 1 / per_second
            door.admission.begun(queue.pop(0))
            queue.extend(door.send(ann))

    assert door.refusal(ann).retry_after == 60.0  # nothing is known yet: the longest
    drain(20, 5)
    assert door.refusal(ann, choices=10).retry_after == pytest.approx(10 / 5, rel=0.05)
    assert door.refusal(ann, choices=50).retry_after == pytest.approx(50 / 5, rel=0.05)
    drain(120, 0.5)
    assert door.refusal(ann, choices=10).retry_after == pytest.approx(10 / 0.5, rel=0.15)
    assert door.refusal(ann, choices=100).retry_after == 60.0


def test_requests_per_minute() -> None:
    door, ann = Door(), key("ann", requests_per_minute=3)
    for left in (2, 1, 0):
        door.send(ann, choices=2)  # a request, not its choices
        assert door.admission.rates(ann)["requests"].remaining == left
    refused = door.refusal(ann)
    assert (refused.code, refused.retry_after) == ("rate_limit", pytest.approx(20.0))
    door.now += 20.1
    door.send(ann)
    assert door.refusal(ann).code == "rate_limit"
    door.send(key("bob"))
    state = door.admission.rates(ann)["requests"]
    assert (state.limit, state.remaining, state.reset) == (3, 0, pytest.approx(59.9))
    assert set(door.admission.rates(ann)) == {"requests"} and door.admission.rates(key("bob")) == {}


def test_tokens_per_minute_hold_over_time() -> None:
    """A client that sends whenever it may: in an hour it gets its rate and what it had at the beginning, though each
    request ends far below zero."""
    door, ann, rng = Door(), key("ann", tokens_per_minute=600), random.Random(1)
    used, end = 0, door.now + 3600
    while door.now < end:
        try:
            door.send(ann, tokens=rng.randint(1, 50))
        except QueueFull as refused:
            assert refused.code == "rate_limit" and refused.retry_after > 0
            door.now += refused.retry_after + 1e-6
            continue
        generated = rng.randint(0, 2000)
        door.admission.generated(ann, generated)
        used += generated
        assert door.admission.rates(ann)["tokens"].remaining >= 0
    assert 600 * 58 < used < 600 * 61 + 2000


def test_new_limits_count_at_once() -> None:
    door = Door()
    door.send(key("ann", requests_per_minute=1))
    door.refusal(key("ann", requests_per_minute=1))
    door.send(key("ann", requests_per_minute=5))
    door.send(key("ann"))
