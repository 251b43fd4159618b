"""Loading in small portions, so that steps on another thread hardly notice.

Loading a model is mostly Python: tens of thousands of calls. While another thread runs Python, a step has to ask for
the interpreter after each of its thousand operations, and takes two to three times as long. So the loader works for
half a millisecond at a time and then sleeps for two. The one place from which it can be stopped, wherever in the code
of others it is, is the interpreter itself, which calls a profiler at every call and return.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Any

_WORK_SECONDS = 0.5e-3
_REST_SECONDS = 2e-3
_SWITCH_SECONDS = 50e-6


@contextmanager
def paced(busy: Callable[[], bool]) -> Iterator[None]:
    """What this thread does inside goes on in portions for as long as `busy` says so. A call into C is one portion,
    however long it takes. Inside, hold no lock that a step may want. `busy` must not raise: the error would come out of
    wherever the thread is, and skip the `finally` that it is about to enter."""
    until = perf_counter() + _WORK_SECONDS

    def pause(frame: Any, event: str, argument: Any) -> None:
        nonlocal until
        if perf_counter() >= until:
            if busy():
                sleep(_REST_SECONDS)
            until = perf_counter() + _WORK_SECONDS

    profiler = sys.getprofile()
    sys.setprofile(pause)
    try:
        yield
    finally:
        sys.setprofile(profiler)


@contextmanager
def eager_switching() -> Iterator[None]:
    """Inside, threads ask for the interpreter more often than each 5 ms: a step would wait that long for each of its
    operations. It holds for all threads, so only one may do this."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, _SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
