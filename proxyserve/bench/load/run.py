"""A whole measurement: warm-up, then every load in turn, as many rounds as wanted."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from proxyserve.bench.load.drive import Load, Round, Target, run_round
from proxyserve.bench.load.statistics import Summary, summarize
from proxyserve.bench.load.workload import Workload


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """`warmup` requests go before each load of the first round and are not counted."""

    target: Target
    workload: Workload
    loads: Sequence[Load]
    rounds: int = 3
    warmup: int = 4


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A summary per load."""

    settings: LoadSettings
    began: str
    summaries: tuple[Summary, ...]

    def as_dict(self) -> dict[str, Any]:
        settings = self.settings
        target = settings.target
        return {
            "url": target.url,
            "route": "chat" if target.chat else "completions",
            "stream": target.stream,
            "extra": target.extra,
            "workload": settings.workload.describe(),
            "rounds": settings.rounds,
            "warmup": settings.warmup,
            "began": self.began,
            "client": {"python": platform.python_version(), "machine": platform.machine()},
            "loads": [summary.as_dict() for summary in self.summaries],
        }


def run_load(settings: LoadSettings, *, progress: Callable[[str], None] = lambda message: None) -> LoadResult:
    """Measure. A server that fails is in the result; raises ProxyserveError only for settings that cannot be."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    rounds: dict[Load, list[Round]] = {load: [] for load in settings.loads}
    # No request is asked twice: the server may remember it, and would not have to read its prompt again.
    asked = 0

    def ask(load: Load) -> Round:
        nonlocal asked
        found = measure(settings.target, settings.workload, load, first=asked)
        asked += load.requests
        return found

    for number in range(settings.rounds):
        for load, found in rounds.items():
            if number == 0 and settings.warmup:
                progress(f"{load}: warm-up")
                ask(warmup_of(load, settings.warmup))
            progress(f"{load}: round {number + 1} of {settings.rounds}")
            found.append(ask(load))
    return LoadResult(
        settings, began, tuple(summarize(load, found) for load, found in rounds.items() if found)
    )


def warmup_of(load: Load, requests: int) -> Load:
    """As many requests by the clients of `load`; before arrivals at a rate, one after the other."""
    return Load(requests, clients=load.clients or 1)


def measure(target: Target, workload: Workload, load: Load, *, first: int = 0) -> Round:
    """One round on an event loop of its own: uvloop's where it is installed, which takes a third of the time of
    asyncio's."""
    try:
        import uvloop
    except ImportError:  # on Windows
        return asyncio.run(run_round(target, workload, load, first=first))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_round(target, workload, load, first=first))
