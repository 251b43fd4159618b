"""The scheduler without any model: random arrivals, cancellations and pools that run dry. Nothing may be lost."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from proxyserve.kv.block_pool import BlockPool
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import RequestState, ScheduledRequest
from proxyserve.scheduler.scheduler import Plan, Scheduler
from proxyserve.types import ModelKey

MODELS = [ModelKey("base"), ModelKey("tuned"), ModelKey("untuned")]


@dataclass
class Simulated:
    """A request and how many tokens it will generate."""

    request: ScheduledRequest
    length: int


class Simulation:
    """Plays the engine's part: counts what is run, appends tokens, finishes and cancels at random."""

    def __init__(self, seed: int, *, blocks: int, block_size: int, max_batch: int, budget: int) -> None:
        self.rng = random.Random(seed)
        self.blocks, self.block_size = blocks, block_size
        self.scheduler = Scheduler(
            {model: BlockPool(blocks) for model in MODELS},
            block_size=block_size,
            max_batch=max_batch,
            max_batch_tokens=budget,
        )
        self.live: dict[str, Simulated] = {}
        self.finished: list[Simulated] = []
        self.preemptions = 0
        self.number = 0

    def arrive(self) -> None:
        """One to three choices of one prompt, on one to four lanes with prompts of unlike lengths."""
        rng = self.rng
        capacity = self.blocks * self.block_size
        lanes = [(MODELS[0], rng.randint(1, capacity // 3))]
        for _ in range(rng.choice((0, 1, 2, 2, 3))):
            lanes.append((rng.choice(MODELS), rng.randint(1, capacity // 3)))
        length = rng.randint(1, 12)
        per_model: dict[ModelKey, int] = {}
        for model, prompt in lanes:
            per_model[model] = per_model.get(model, 0) + -(-(prompt + length) // self.block_size)
        if any(needed > self.blocks for needed in per_model.values()):
            return  # the engine refuses what can never fit
        salt = rng.choice(("", "tenant"))
        prompts = [tuple(rng.randint(0, 1) for _ in range(prompt)) for _, prompt in lanes]
        gated = len(lanes) > 1 and rng.random() < 0.3
        leader: ScheduledRequest | None = None
        for _ in range(rng.choice((1, 1, 3))):
            output: list[int] = []
            request = ScheduledRequest(
                f"r{self.number}",
                tuple(
                    Lane(model, prompt, output, salt)
                    for (model, _), prompt in zip(lanes, prompts, strict=True)
                ),
                output,
                leader=leader,
                gated=gated,
            )
            self.number += 1
            leader = leader or request
            self.live[request.request_id] = Simulated(request, length)
            self.scheduler.add(request)

    def cancel(self) -> None:
        if self.live:
            simulated = self.live.pop(self.rng.choice(sorted(self.live)))
            self.scheduler.finish(simulated.request)

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.preemptions += len(plan.preempted)
        self.check_plan(plan)
        if self.rng.random() < 0.02 and not plan.empty:  # a step that fails ends what was in it
            for request_id in {item.request.request_id for work in plan.work.values() for item in work}:
                self.scheduler.finish(self.live.pop(request_id).request)
        else:
            self.scheduler.commit(plan)
            unsure = [request for request in plan.probing if self.rng.random() < 0.5]
            for request in unsure:
                request.awaiting = True
            for request in (*plan.sampling, *plan.probing):
                if request in unsure:
                    continue
                request.awaiting = False
                request.output.append(self.rng.randint(0, 1))
                simulated = self.live[request.request_id]
                if len(request.output) == simulated.length:
                    self.finished.append(self.live.pop(request.request_id))
                    self.scheduler.finish(request)
        self.scheduler.check()

    def check_plan(self, plan: Plan) -> None:
        for work in plan.work.values():
            assert sum(item.count for item in work) <= self.scheduler.max_batch_tokens
            for item in work:
                assert item.count > 0 and item.start == item.lane.computed
                assert len(item.lane.blocks) * self.block_size >= item.start + item.count
        last = [item for work in plan.work.values() for item in work if item.last]
        assert all(request.gated and not request.awaiting for request in plan.probing)
        for request in (*plan.sampling, *plan.probing):
            own = [item for item in last if item.request is request]
            assert {id(item.lane) for item in own} == {id(lane) for lane in request.turn}
            assert all(item.start + item.count == item.lane.wanted for item in own)
            assert len(own) == len(request.turn)
        assert len(self.scheduler.running) <= self.scheduler.max_batch


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost(seed: int) -> None:
    shape = random.Random(1000 + seed)
    simulation = Simulation(
        seed,
        blocks=shape.choice((6, 12, 40)),
        block_size=shape.choice((1, 4, 16)),
        max_batch=shape.choice((1, 3, 8)),
        budget=shape.choice((8, 9, 33, 100)),
    )
    for _ in range(150):
        if simulation.rng.random() < 0.4:
            simulation.arrive()
        if simulation.rng.random() < 0.05:
            simulation.cancel()
        simulation.step()
    for _ in range(20_000):
        if not simulation.scheduler.has_work:
            break
        simulation.step()
    assert not simulation.scheduler.has_work, "the scheduler came to a standstill"
    assert simulation.finished and not simulation.live
    for pool in simulation.scheduler.pools.values():
        assert pool.in_use == 0
        pool.drop_cache()
        assert pool.available == pool.num_blocks
        pool.check()
    for simulated in simulation.finished:
        assert simulated.request.state is RequestState.FINISHED
        assert len(simulated.request.output) == simulated.length


def test_pools_that_run_dry_preempt() -> None:
    """The simulation above is only worth something if it does reach preemption."""
    simulation = Simulation(1, blocks=12, block_size=2, max_batch=8, budget=64)
    for _ in range(300):
        simulation.arrive()
        simulation.step()
    assert simulation.preemptions > 10


def make_request(
    name: str, prompts: dict[ModelKey, int], leader: ScheduledRequest | None = None
) -> ScheduledRequest:
    output: list[int] = []
    lanes = tuple(Lane(model, tuple(range(length)), output) for model, length in prompts.items())
    return ScheduledRequest(name, lanes, output, leader=leader)


def make_scheduler(*, blocks: int = 32, block_size: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(
        {model: BlockPool(blocks) for model in MODELS},
        block_size=block_size,
        max_batch=8,
        max_batch_tokens=budget,
    )


def test_a_lane_waits_with_its_last_token() -> None:
    """The base is done with its short prompt at once, but its last token runs in the step where tuned catches up."""
    scheduler = make_scheduler(budget=8)
    request = make_request("r", {MODELS[0]: 3, MODELS[1]: 20})
    scheduler.add(request)
    ran = []
    for _ in range(3):
        plan = scheduler.schedule()
        ran.append({model.name: [item.count for item in work] for model, work in plan.work.items()})
        scheduler.commit(plan)
    assert ran == [{"base": [2], "tuned": [8]}, {"tuned": [8]}, {"base": [1], "tuned": [4]}]
    assert plan.sampling == [request]


def test_running_answers_go_before_long_prompts() -> None:
    scheduler = make_scheduler(budget=8)
    short = make_request("short", {MODELS[0]: 2})
    scheduler.add(short)
    scheduler.commit(scheduler.schedule())
    short.output.append(1)
    scheduler.add(make_request("long", {MODELS[0]: 40}))
    for _ in range(4):
        plan = scheduler.schedule()
        assert short in plan.sampling
        scheduler.commit(plan)
        short.output.append(1)


def test_choices_share_the_blocks_of_their_prompt() -> None:
    scheduler = make_scheduler()
    leader = make_request("r/0", {MODELS[0]: 13})
    scheduler.add(leader)
    scheduler.add(make_request("r/1", {MODELS[0]: 13}, leader))
    plan = scheduler.schedule()
    assert [item.request for work in plan.work.values() for item in work] == [leader]
    scheduler.commit(plan)
    leader.output.append(1)
    scheduler.commit(scheduler.schedule())
    first, second = (request.lanes[0] for request in scheduler.running)
    assert first.blocks[:3] == second.blocks[:3] and first.blocks[3] != second.blocks[3]
    assert second.cached == 12 and second.tokens_run == 1
    scheduler.check()


def test_illegal_moves_are_refused() -> None:
    request = make_request("r", {MODELS[0]: 1})
    request.move(RequestState.FINISHED)
    for state in RequestState:
        with pytest.raises(ValueError, match="cannot go"):
            request.move(state)
