"""Fair shares: who starts when, and what floods, priorities and caps do to it. Real scheduler, no models."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from proxyserve.kv.block_pool import BlockPool
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.queue import FairQueue
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import Scheduler
from proxyserve.types import ModelKey

BASE, TUNED = ModelKey("base"), ModelKey("tuned")
PROMPT, LENGTH = 6, 10


class Server:
    """Requests of `LENGTH` tokens each, on one or two lanes. Counts the service that callers had, by another road than
    the queue: from the lanes."""

    def __init__(self, *, max_batch: int = 4, blocks: int = 64, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(
            {BASE: BlockPool(blocks), TUNED: BlockPool(blocks)},
            block_size=4,
            max_batch=max_batch,
            max_batch_tokens=16,
            max_scored_rows=8,
        )
        self.live: set[ScheduledRequest] = set()
        self.done: list[ScheduledRequest] = []
        self.preempted = 0
        self.served: Counter[str] = Counter()
        self._numbers = 0

    def send(
        self,
        caller: str = "",
        *,
        priority: int = 0,
        most: int | None = None,
        prompt: int = PROMPT,
        fused: bool = False,
    ) -> ScheduledRequest:
        output: list[int] = []
        self._numbers += 1
        ids = tuple(self.rng.randrange(1000) for _ in range(prompt))
        lanes = [Lane(BASE, ids, output), Lane(TUNED, ids, output, cost=0.5)]
        request = ScheduledRequest(
            f"r{self._numbers}",
            tuple(lanes if fused else lanes[:1]),
            output,
            caller=caller,
            priority=priority,
            max_running=most,
        )
        self.scheduler.add(request)
        self.live.add(request)
        return request

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.preempted += len(plan.preempted)
        self.scheduler.commit(plan)
        for work in plan.work.values():
            for item in work:
                self.served[item.request.caller] += item.count * item.lane.cost  # type: ignore[assignment]
        for request in plan.sampling:
            self.served[request.caller] += 1
            request.output.append(self.rng.randrange(1000))
            if len(request.output) == LENGTH:
                self.end(request)
        self.scheduler.check()

    def end(self, request: ScheduledRequest) -> None:
        self.scheduler.finish(request)
        self.live.discard(request)
        self.done.append(request)

    def waiting(self, caller: str) -> int:
        return sum(request.caller == caller for request in self.scheduler.waiting)

    def keep_waiting(self, caller: str, count: int, **how: int) -> None:
        """As a client does that always has more to ask."""
        for _ in range(count - self.waiting(caller)):
            self.send(caller, **how)

    def started(self, callers: Callable[[], None], steps: int) -> list[str]:
        """The callers of requests, as they start during `steps` steps; `callers` sends before each."""
        seen: set[ScheduledRequest] = set()
        order = []
        for _ in range(steps):
            callers()
            self.step()
            for request in self.scheduler.running:
                if request not in seen:
                    seen.add(request)
                    order.append(request.caller)
        return order


#: The most by which two callers that always wait may differ: what runs at once, as whole requests.
BOUND = 4 * (PROMPT + 2 * LENGTH) * 1.5


def test_one_caller_is_served_as_it_comes() -> None:
    server = Server(max_batch=2)
    sent = [server.send() for _ in range(8)]
    while server.scheduler.has_work:
        server.step()
    assert server.done == sent


def test_a_flood_takes_no_more_than_its_share() -> None:
    server = Server()

    def send() -> None:
        server.keep_waiting("flood", 200)
        server.keep_waiting("calm", 2)

    server.started(send, 400)
    assert min(server.served.values()) > 1000
    assert abs(server.served["flood"] - server.served["calm"]) <= BOUND


def test_shares_are_of_work_not_of_requests() -> None:
    """One asks for long prompts on two lanes, the other for short ones on one: the same service, not the same count."""
    server = Server(blocks=200)

    def send() -> None:
        for _ in range(20 - server.waiting("large")):
            server.send("large", prompt=30, fused=True)
        server.keep_waiting("small", 20)

    order = Counter(server.started(send, 600))
    assert abs(server.served["large"] - server.served["small"]) <= 4 * (30 + 2 * LENGTH) * 1.5
    assert order["small"] > 2 * order["large"] > 0


def test_the_counter_is_what_was_computed_and_generated() -> None:
    server = Server(blocks=16, max_batch=6)  # so few that some are preempted and compute twice
    for caller in "abab":
        server.send(caller, prompt=20, fused=True)
    while len(server.live) > 2:
        server.step()
        for caller in "ab":
            waiting = sum(
                lane.missing * lane.cost
                for request in server.scheduler.running
                if request.caller == caller
                for lane in request.lanes
                if lane.missing > 1
            )
            counter = server.scheduler.waiting.service(0, caller)
            assert server.served[caller] <= counter <= server.served[caller] + waiting + 4
    assert server.preempted


def test_who_comes_back_has_saved_nothing() -> None:
    server = Server()
    server.started(lambda: server.keep_waiting("steady", 8), 200)
    before = dict(server.served)

    def both() -> None:
        server.keep_waiting("steady", 8)
        server.keep_waiting("late", 8)

    server.started(both, 200)
    assert abs((server.served["steady"] - before["steady"]) - server.served["late"]) <= BOUND


def test_nobody_starves() -> None:
    """Others that come and go, one request at a time, do not keep anybody from their turn."""
    server = Server(max_batch=1)

    def others() -> None:
        for number in range(5):
            server.keep_waiting(f"other-{number}", 1)

    server.started(others, 100)
    server.send("patient")
    server.started(others, 20)
    waits = server.send("patient")
    before = len(server.done)
    while waits in server.live:
        others()
        server.step()
    assert len(server.done) - before <= 3 * 6


def test_lower_numbers_go_first() -> None:
    server = Server(max_batch=1)
    for priority in (3, 0, 3, -1, 0):
        server.send(f"{priority}", priority=priority)
    server.step()
    server.send("-2", priority=-2)  # too late to be the first
    while server.scheduler.has_work:
        server.step()
    assert [request.priority for request in server.done] == [-1, -2, 0, 0, 3, 3]


def test_the_last_by_priority_is_preempted() -> None:
    server = Server(blocks=12, max_batch=4)
    late, early = server.send("a", priority=1, prompt=20), server.send("a", priority=0, prompt=20)
    while server.live:
        server.step()
    assert server.preempted and late.preemptions > 0 and early.preemptions == 0
    assert server.done == [early, late]


def test_a_cap_on_running_requests_holds_back_its_own_caller_only() -> None:
    server = Server(max_batch=4)
    most = 0

    def send() -> None:
        nonlocal most
        running = Counter(request.caller for request in server.scheduler.running)
        most = max(most, running["capped"])
        server.keep_waiting("capped", 20, most=1)
        server.keep_waiting("free", 20)

    server.started(send, 300)
    assert most == 1 and server.served["capped"] > 200
    alone = server.served["capped"]
    assert server.served["free"] > 2 * alone, "the rest of the batch is the other's"


def test_time_held_back_by_a_cap_earns_nothing() -> None:
    server = Server(max_batch=4)

    def send() -> None:
        server.keep_waiting("capped", 20, most=1)
        server.keep_waiting("free", 20)

    server.started(send, 200)
    before = dict(server.served)

    def with_third() -> None:
        send()
        server.keep_waiting("third", 20)

    server.started(with_third, 200)
    assert abs((server.served["free"] - before["free"]) - server.served["third"]) <= BOUND


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_nothing_is_lost(seed: int) -> None:
    server = Server(blocks=12, max_batch=5, seed=seed)
    rng = random.Random(seed)
    for _ in range(150):
        if rng.random() < 0.5:
            server.send(
                rng.choice("abc"),
                priority=rng.choice((-1, 0, 0, 2)),
                most=rng.choice((None, 1, 2)),
                prompt=rng.randint(1, 30),
                fused=rng.random() < 0.5,
            )
        if server.live and rng.random() < 0.1:
            server.end(rng.choice(sorted(server.live, key=lambda request: request.arrival)))
        server.step()
    while server.scheduler.has_work:
        server.step()
    assert not server.live and not len(server.scheduler.waiting)
    with pytest.raises(KeyError):
        server.scheduler.waiting.service(0, "a")  # counters go with the last request


def test_a_queue_that_is_empty_says_so() -> None:
    queue = FairQueue()
    assert not queue and not list(queue) and not list(queue.turns())


def test_newcomers_begin_at_the_level_of_those_who_may_start() -> None:
    """And not at that of a caller whom its cap holds back while others are served."""
    server = Server()
    queue = server.scheduler.waiting
    for caller, most in (("capped", 1), ("free", None)):
        running = server.send(caller, most=most)
        server.send(caller, most=most)
        queue.start(running)
    queue.charge(running, 500.0)
    server.send("newcomer")
    assert queue.service(0, "newcomer") == queue.service(0, "free") > 400 > queue.service(0, "capped")


def test_another_thread_may_ask_for_work() -> None:
    """As the loader's does in the middle of what it is at, while the engine's adds requests and takes them away."""
    server, over = Server(), threading.Event()
    failed: list[RuntimeError] = []

    def ask() -> None:
        try:
            while not over.is_set():
                _ = server.scheduler.has_work
        except RuntimeError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asking.start()
        for number in range(8000):
            request = server.send(priority=number % 7)
            server.end(request)
            if failed:
                break
    finally:
        over.set()
        asking.join()
        sys.setswitchinterval(interval)
    assert not failed
