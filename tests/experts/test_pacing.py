"""Loading in portions: how often it rests, and that it leaves no trace. No real time passes."""

from __future__ import annotations

import sys
import threading

import pytest

from proxyserve.experts import pacing
from proxyserve.experts.pacing import eager_switching, paced


class Clock:
    """A tenth of a millisecond per look at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.rests: list[float] = []
        monkeypatch.setattr(pacing, "perf_counter", self.read)
        monkeypatch.setattr(pacing, "sleep", self.rests.append)

    def read(self) -> float:
        self.now += 1e-4
        return self.now


def some_calls(number: int) -> None:
    for _ in range(number):
        len("")  # of C: a call and a return for the profiler


def test_work_rests_after_each_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with paced(lambda: True):
        some_calls(100)
    # 200 calls and returns take 20 ms by this clock, a portion 0.5 ms and two looks more.
    assert 25 <= len(clock.rests) <= 40
    assert set(clock.rests) == {2e-3}


def test_work_does_not_rest_while_there_are_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with paced(lambda: False):
        some_calls(100)
    assert clock.rests == []


def test_only_the_thread_that_is_paced_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    other = threading.Thread(target=some_calls, args=(1000,))
    with paced(lambda: True):
        other.start()
        other.join()
    assert len(clock.rests) < 50  # the other thread alone would have rested ten times as often


def test_the_profiler_that_was_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    before = sys.getprofile()
    with pytest.raises(KeyError), paced(lambda: True):
        assert sys.getprofile() is not before
        raise KeyError
    assert sys.getprofile() is before


def test_switching_is_eager_inside_and_as_usual_afterwards() -> None:
    usual = sys.getswitchinterval()
    with eager_switching():
        assert sys.getswitchinterval() < 1e-3
    assert sys.getswitchinterval() == usual
