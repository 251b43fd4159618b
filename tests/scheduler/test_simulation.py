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
    """A request, how many tokens it will generate, and how many rows of its prompt are wanted and have come."""

    request: ScheduledRequest
    length: int
    unscored: int = 0
    scored: int = 0


class Simulation:
    """Plays the engine's part: counts what is run, appends tokens, finishes and cancels at random."""

    def __init__(
        self, seed: int, *, blocks: int, block_size: int, max_batch: int, budget: int, rows: int = 8
    ) -> None:
        self.rng = random.Random(seed)
        self.blocks, self.block_size = blocks, block_size
        self.scheduler = Scheduler(
            {model: BlockPool(blocks) for model in MODELS},
            block_size=block_size,
            max_batch=max_batch,
            max_batch_tokens=budget,
            max_scored_rows=rows,
        )
        self.live: dict[str, Simulated] = {}
        self.finished: list[Simulated] = []
        self.preemptions = 0
        self.interrupted = 0  # preempted with some of the prompt's rows there and some not
        self.number = 0

    def arrive(self) -> None:
        """One to three choices of one prompt, on one to four lanes with prompts of unlike lengths."""
        rng = self.rng
        capacity = self.blocks * self.block_size
        lanes = [(MODELS[0], rng.randint(1, capacity // 3))]
        for _ in range(rng.choice((0, 1, 2, 2, 3))):
            lanes.append((rng.choice(MODELS), rng.randint(1, capacity // 3)))
        scores = rng.random() < 0.4
        unscored = rng.randint(0, min(prompt for _, prompt in lanes) - 1) if scores else 0
        length = rng.randint(0 if scores else 1, 12)
        per_model: dict[ModelKey, int] = {}
        for model, prompt in lanes:
            per_model[model] = per_model.get(model, 0) + -(-(prompt + length) // self.block_size)
        if any(needed > self.blocks for needed in per_model.values()):
            return  # the engine refuses what can never fit
        salt = rng.choice(("", "tenant"))
        prompts = [tuple(rng.randint(0, 1) for _ in range(prompt)) for _, prompt in lanes]
        gated = len(lanes) > 1 and rng.random() < 0.3
        leader: ScheduledRequest | None = None
        for _ in range(rng.choice((1, 1, 3)) if length else 1):
            output: list[int] = []
            request = ScheduledRequest(
                f"r{self.number}",
                tuple(
                    Lane(model, prompt, output, salt)
                    for (model, _), prompt in zip(lanes, prompts, strict=True)
                ),
                output,
                leader=leader,
                unscored=0 if leader else unscored,
                gated=gated and length > 0,
            )
            self.number += 1
            leader = leader or request
            self.live[request.request_id] = Simulated(request, length, request.unscored)
            self.scheduler.add(request)

    def cancel(self) -> None:
        if self.live:
            simulated = self.live.pop(self.rng.choice(sorted(self.live)))
            self.scheduler.finish(simulated.request)

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.preemptions += len(plan.preempted)
        for request in plan.preempted:
            simulated = self.live[request.request_id]
            self.interrupted += 0 < simulated.scored < simulated.unscored
        self.check_plan(plan)
        if self.rng.random() < 0.02 and not plan.empty:  # a step that fails ends what was in it
            for request_id in {item.request.request_id for work in plan.work.values() for item in work}:
                self.scheduler.finish(self.live.pop(request_id).request)
        else:
            self.scheduler.commit(plan)
            for request, rows in plan.rows.items():
                simulated = self.live[request.request_id]
                simulated.scored = min(simulated.unscored, simulated.scored + rows)
                assert request.unscored == simulated.unscored - simulated.scored
            unsure = [request for request in plan.probing if self.rng.random() < 0.5]
            for request in unsure:
                request.awaiting = True
            for request in (*plan.sampling, *plan.probing):
                if request in unsure:
                    continue
                request.awaiting = False
                simulated = self.live[request.request_id]
                assert simulated.scored == simulated.unscored, "sampled before the prompt was scored"
                if simulated.length:
                    request.output.append(self.rng.randint(0, 1))
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
        items = [item for work in plan.work.values() for item in work]
        assert all(request.gated and not request.awaiting for request in plan.probing)
        last = [*plan.sampling, *plan.probing]
        assert set(last) <= set(plan.rows)
        assert {item.request for item in items if item.rows} == set(plan.rows)
        for request, rows in plan.rows.items():
            own = [item for item in items if item.request is request]
            assert {id(item.lane) for item in own} == {id(lane) for lane in request.turn}
            assert len(own) == len(request.turn)
            assert all(0 < item.rows == rows <= item.count for item in own)
            # Counted from the end all lanes have the same rows, and the next of those that are wanted.
            [left] = {item.lane.wanted - item.start - item.count for item in own}
            assert left == request.rows - rows
            assert (left == 0) == (request in last)
        scored = (min(rows, request.unscored) * len(request.turn) for request, rows in plan.rows.items())
        assert sum(scored) <= self.scheduler.max_scored_rows
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
        rows=shape.choice((4, 7, 100)),
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
    assert simulation.preemptions > 10 and simulation.interrupted > 0


def make_request(
    name: str, prompts: dict[ModelKey, int], leader: ScheduledRequest | None = None, unscored: int = 0
) -> ScheduledRequest:
    output: list[int] = []
    lanes = tuple(Lane(model, tuple(range(length)), output) for model, length in prompts.items())
    return ScheduledRequest(name, lanes, output, leader=leader, unscored=unscored)


def make_scheduler(*, blocks: int = 32, block_size: int = 4, budget: int = 16, rows: int = 16) -> Scheduler:
    return Scheduler(
        {model: BlockPool(blocks) for model in MODELS},
        block_size=block_size,
        max_batch=8,
        max_batch_tokens=budget,
        max_scored_rows=rows,
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


def test_rows_are_of_the_same_places_counted_from_the_end() -> None:
    """Tuned catches up on its longer front; then both run in step, as the budgets of tokens and of rows allow."""
    scheduler = make_scheduler(budget=8, rows=6)
    request = make_request("r", {MODELS[0]: 8, MODELS[1]: 20}, unscored=6)
    scheduler.add(request)
    ran = []
    for _ in range(3):
        plan = scheduler.schedule()
        ran.append(
            {model.name: [(item.count, item.rows) for item in work] for model, work in plan.work.items()}
        )
        scheduler.commit(plan)
    assert ran == [
        {"base": [(1, 0)], "tuned": [(8, 0)]},
        {"base": [(3, 3)], "tuned": [(8, 3)]},
        {"base": [(4, 4)], "tuned": [(4, 4)]},
    ]
    assert plan.sampling == [request] and request.rows == 1


def test_the_cache_ends_where_rows_begin() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("first", {MODELS[0]: 14}))
    scheduler.commit(scheduler.schedule())
    for unscored, cached in ((0, 12), (2, 8), (5, 8), (6, 4), (13, 0)):
        scheduler.add(make_request(f"r{unscored}", {MODELS[0]: 14}, unscored=unscored))
        *_, request = scheduler.waiting
        plan = scheduler.schedule()
        assert request.lanes[0].cached == cached
        assert plan.rows[request] == unscored + 1
        scheduler.finish(request)


def test_rows_do_not_wait_for_answers_nor_answers_for_rows() -> None:
    scheduler = make_scheduler(budget=8, rows=2)
    short, long = make_request("short", {MODELS[0]: 2}), make_request("long", {MODELS[0]: 20}, unscored=12)
    scheduler.add(short)
    scheduler.commit(scheduler.schedule())
    short.output.append(1)
    scheduler.add(long)
    rows = []
    for _ in range(7):
        plan = scheduler.schedule()
        assert short in plan.sampling
        rows.append(plan.rows.get(long, 0))
        scheduler.commit(plan)
        short.output.append(1)
    assert rows == [0, 2, 2, 2, 2, 2, 3] and long in plan.sampling


def test_illegal_moves_are_refused() -> None:
    request = make_request("r", {MODELS[0]: 1})
    request.move(RequestState.FINISHED)
    for state in RequestState:
        with pytest.raises(ValueError, match="cannot go"):
            request.move(state)
