"""Who waits, and whose turn it is. Its law:

    1. A request of a lower `priority` number starts before one of a higher.
    2. Within a priority, the caller that has been served least comes first: after virtual token counters
       (Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv 2401.00588).
    3. Within a caller, requests start as they arrived. One that was preempted keeps its arrival, and so comes before
       whatever of its caller arrived after it.

Each priority has counters of its own, one per caller, of the service that the caller's requests there have had: the
tokens that their lanes computed, each times the lane's cost, and the tokens that they generated. A prompt is charged as
a whole when its request starts, so that one caller's requests do not all start before the first of them has computed
anything; what a preempted request did not get to compute is given back.

A caller that comes to wait while nobody of its own waits is lifted to the least counter of those who wait (or of the
last one who did): time away earns nothing, and neither does time in which a caller had as many requests running as it
may have. So while two callers both wait all the time, what they are given differs by no more than a bound that depends
on the largest request and the batch, however many requests either of them sends.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from proxyserve.scheduler.request import ScheduledRequest


@dataclass(slots=True)
class _Class:
    """The requests of one priority. `waiting` has those of each caller that has any, by arrival."""

    waiting: dict[str, dict[int, ScheduledRequest]] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    last: str | None = None  # the caller that was the last to have nobody waiting any more
    running: int = 0

    def put(self, request: ScheduledRequest) -> None:
        self.waiting.setdefault(request.caller, {})[request.arrival] = request

    def take(self, request: ScheduledRequest) -> None:
        line = self.waiting[request.caller]
        del line[request.arrival]
        if not line:
            del self.waiting[request.caller]
            self.last = request.caller


class FairQueue:
    """The requests that wait, as a collection in no special order; `turns` has the order. Also keeps count of those
    that run, by caller, and of the service that each caller has had."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}
        self._running: Counter[str] = Counter()
        self._paid: dict[ScheduledRequest, float] = {}  # of running requests: charged and not yet computed
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(line) for each in self._classes.values() for line in each.waiting.values())

    def __bool__(self) -> bool:
        """Any thread may ask."""
        # Going through the dict itself would raise an error if the engine's thread changed it meanwhile.
        return any(each.waiting for each in tuple(self._classes.values()))

    def __iter__(self) -> Iterator[ScheduledRequest]:
        for each in self._classes.values():
            for line in each.waiting.values():
                yield from line.values()

    def add(self, request: ScheduledRequest) -> None:
        """A request arrives."""
        request.arrival = self._arrivals
        self._arrivals += 1
        each = self._classes.setdefault(request.priority, _Class())
        if request.caller not in each.waiting:
            self._lift(each, request.caller)
        each.put(request)

    def _lift(self, each: _Class, caller: str) -> None:
        """`caller` waits from now on, and could have been started before only by others' leave."""
        competing = [
            each.served[other] for other in each.waiting if other != caller and not self._held(each, other)
        ]
        level = min(competing) if competing else each.served.get(each.last or "", 0.0)
        each.served[caller] = max(each.served.get(caller, 0.0), level)

    def _held(self, each: _Class, caller: str) -> bool:
        """Whether a caller that waits has as many running requests as it may have."""
        most = next(iter(each.waiting[caller].values())).max_running
        return most is not None and self._running[caller] >= most

    def turns(self) -> Iterator[ScheduledRequest]:
        """Those that wait, in the order in which they should start; callers with as many running requests as they may
        have are left out. The one that was given last may be started before the next is asked for, which the order then
        heeds; nothing else may change meanwhile."""
        heap: list[tuple[int, float, int, str, list[ScheduledRequest]]] = []
        for priority, each in self._classes.items():
            for caller, line in each.waiting.items():
                # Its own, latest first, to be taken from the end.
                requests = [line[arrival] for arrival in sorted(line, reverse=True)]
                heap.append((priority, each.served[caller], requests[-1].arrival, caller, requests))
        heapq.heapify(heap)
        while heap:
            priority, _, _, caller, requests = heapq.heappop(heap)
            each = self._classes[priority]
            if self._held(each, caller):
                continue
            yield requests.pop()
            if requests:
                heapq.heappush(heap, (priority, each.served[caller], requests[-1].arrival, caller, requests))

    def start(self, request: ScheduledRequest) -> None:
        """A waiting request begins to run; its lanes hold what they found in the prefix cache."""
        each = self._classes[request.priority]
        each.take(request)
        each.running += 1
        self._running[request.caller] += 1
        self._paid[request] = sum(lane.missing * lane.cost for lane in request.lanes)
        each.served[request.caller] += self._paid[request]

    def put_back(self, request: ScheduledRequest) -> None:
        """A running request has been preempted."""
        self._stop(request)
        self._classes[request.priority].put(request)

    def end(self, request: ScheduledRequest) -> None:
        """A request ends, from wherever it is."""
        each = self._classes[request.priority]
        if request in self._paid:
            self._stop(request)
        else:
            each.take(request)
        if not each.running and not each.waiting:
            del self._classes[request.priority]  # nobody is left to be fair to

    def _stop(self, request: ScheduledRequest) -> None:
        caller, each = request.caller, self._classes[request.priority]
        each.running -= 1
        each.served[caller] -= self._paid.pop(request)
        held = [
            other for other in self._classes.values() if caller in other.waiting and self._held(other, caller)
        ]
        self._running[caller] -= 1
        if not self._running[caller]:
            del self._running[caller]
        for other in held:
            self._lift(other, caller)

    def charge(self, request: ScheduledRequest, service: float) -> None:
        """A running request has been served."""
        paid = self._paid[request]
        self._paid[request] = max(0.0, paid - service)
        self._classes[request.priority].served[request.caller] += max(0.0, service - paid)

    def service(self, priority: int, caller: str) -> float:
        """The caller's counter."""
        return self._classes[priority].served.get(caller, 0.0)

    def check(self) -> None:
        """Raise AssertionError if the counts are wrong. For tests."""
        running = Counter(request.caller for request in self._paid)
        assert running == self._running, "callers' running requests are miscounted"
        for priority, each in self._classes.items():
            assert each.running == sum(request.priority == priority for request in self._paid)
            assert each.running or each.waiting, "a priority outlived its requests"
            for caller, line in each.waiting.items():
                assert line, "an empty line was kept"
                assert all(r.caller == caller and r.priority == priority for r in line.values())
            assert all(served > -1e-6 for served in each.served.values()), "negative service"
