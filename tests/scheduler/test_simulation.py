"""The scheduler without any model: random arrivals, drafts, cancellations; pools run dry. Nothing may be lost."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from proxyserve.kv.block_pool import BlockPool
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import RequestState, ScheduledRequest
from proxyserve.scheduler.scheduler import Plan, Scheduler, Wish
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
    """Plays the engine's part: counts what is run, drafts, appends tokens, finishes and cancels at random."""

    def __init__(
        self,
        seed: int,
        *,
        blocks: int,
        block_size: int,
        max_batch: int,
        budget: int,
        rows: int = 8,
        prefill: int | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.blocks, self.block_size = blocks, block_size
        self.scheduler = Scheduler(
            {model: BlockPool(blocks) for model in MODELS},
            block_size=block_size,
            max_batch=max_batch,
            max_batch_tokens=budget,
            max_scored_rows=rows,
            prefill_tokens=prefill,
        )
        self.live: dict[str, Simulated] = {}
        self.finished: list[Simulated] = []
        self.preemptions = 0
        self.interrupted = 0  # preempted with some of the prompt's rows there and some not
        self.drafted = self.accepted = self.cut = 0
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
        wishes = self.wishes()
        plan = self.scheduler.schedule(wishes)
        self.preemptions += len(plan.preempted)
        for request in plan.preempted:
            simulated = self.live[request.request_id]
            self.interrupted += 0 < simulated.scored < simulated.unscored
        self.check_plan(plan)
        accepted = self.draft(plan, wishes)
        if self.rng.random() < 0.02 and not plan.empty:  # a step that fails ends what was in it
            for request_id in {item.request.request_id for work in plan.work.values() for item in work}:
                self.scheduler.finish(self.live.pop(request_id).request)
        else:
            self.scheduler.commit(plan, accepted)
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
                stood = accepted.get(request, 0)
                request.output.extend(request.drafts[: max(0, stood)])
                if simulated.length and stood >= 0:
                    request.output.append(self.rng.randint(0, 1))
                if len(request.output) == simulated.length:
                    self.finished.append(self.live.pop(request.request_id))
                    self.scheduler.finish(request)
        for request in plan.granted:
            request.drafts.clear()
        self.scheduler.check()

    def wishes(self) -> dict[ScheduledRequest, Wish]:
        """Of some running requests, whether they can run ahead or not."""
        wishes = {}
        for request in self.scheduler.running:
            most = self.live[request.request_id].length - len(request.output) - 1
            if most > 0 and self.rng.random() < 0.7:
                drafter = self.rng.choice((None, *request.lanes))
                wishes[request] = Wish(self.rng.randint(1, min(most, 6)), drafter)
        return wishes

    def draft(self, plan: Plan, wishes: dict[ScheduledRequest, Wish]) -> dict[ScheduledRequest, int]:
        """Write drafts, some fewer than granted, and check the work that comes of it. Returns how many stand."""
        accepted, passes = {}, {}
        for request, wish in plan.granted.items():
            assert 0 < wish.drafts <= wishes[request].drafts and wish.drafter is wishes[request].drafter
            assert request in plan.sampling and not request.gated and not request.unscored
            assert all(lane.missing == 1 for lane in request.lanes)
            drafts = wish.drafts if self.rng.random() < 0.7 else self.rng.randint(0, wish.drafts)
            request.drafts.extend(self.rng.randint(0, 1) for _ in range(drafts))
            if wish.drafter is not None:
                passes[request] = min(drafts + 1, wish.drafts)
            accepted[request] = self.rng.randint(-1, drafts)
            self.drafted += drafts
            self.accepted += max(0, accepted[request])
            self.cut += drafts < wish.drafts
        plan.run_ahead(passes)
        ahead = 0
        for work in plan.work.values():
            assert sum(item.count for item in work) <= self.scheduler.max_batch_tokens
            for item in work:
                if item.request in plan.granted:
                    wish, request, lane = plan.granted[item.request], item.request, item.lane
                    drafts = len(request.drafts)
                    ahead += drafts
                    assert (
                        item.start + item.count == lane.wanted + drafts <= len(lane.blocks) * self.block_size
                    )
                    assert item.count == item.rows == (1 if lane is wish.drafter else plan.rows[request])
                    assert item.drafted == (passes[request] if lane is wish.drafter else 0)
                    text = [*lane.prompt, *request.output, *request.drafts]
                    assert list(lane.tokens(item.start, item.start + item.count)) == text[item.start :]
        scored = sum(min(rows, request.unscored) * len(request.turn) for request, rows in plan.rows.items())
        assert scored + ahead <= self.scheduler.max_scored_rows
        return accepted

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
        prefill=shape.choice((None, 4, 7)),
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
    """The simulation above is only worth something if it does reach preemption, and drafts of all fates."""
    simulation = Simulation(1, blocks=12, block_size=2, max_batch=8, budget=12, rows=4)
    for _ in range(300):
        simulation.arrive()
        simulation.step()
    assert simulation.preemptions > 10 and simulation.interrupted > 0
    assert simulation.drafted > simulation.accepted > 0 and simulation.cut > 0


def make_request(
    name: str, prompts: dict[ModelKey, int], leader: ScheduledRequest | None = None, unscored: int = 0
) -> ScheduledRequest:
    output: list[int] = []
    lanes = tuple(Lane(model, tuple(range(length)), output) for model, length in prompts.items())
    return ScheduledRequest(name, lanes, output, leader=leader, unscored=unscored)


def make_scheduler(
    *, blocks: int = 32, block_size: int = 4, budget: int = 16, rows: int = 16, prefill: int | None = None
) -> Scheduler:
    return Scheduler(
        {model: BlockPool(blocks) for model in MODELS},
        block_size=block_size,
        max_batch=8,
        max_batch_tokens=budget,
        max_scored_rows=rows,
        prefill_tokens=prefill,
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


def test_long_prompts_run_in_small_portions_beside_those_who_decode() -> None:
    """No step has more of them than the limit and two for each request that decodes; alone they take all there is."""
    scheduler = make_scheduler(blocks=64, budget=40, prefill=5)
    decoding = [make_request(f"short{number}", {MODELS[0]: 2, MODELS[1]: 2}) for number in range(3)]
    for request in decoding:
        scheduler.add(request)
    scheduler.commit(scheduler.schedule())
    scheduler.add(make_request("long", {MODELS[0]: 60, MODELS[1]: 70}))
    scheduler.add(make_request("other", {MODELS[0]: 30}))
    portions = []
    for step in range(5):
        for request in decoding:
            request.output.append(step)
        plan = scheduler.schedule()
        assert set(decoding) <= set(plan.sampling)
        prompts = {
            model: sum(item.count for item in work if item.request not in decoding)
            for model, work in plan.work.items()
        }
        assert max(prompts.values()) <= 5 + 2 * len(decoding)
        portions.append(prompts[MODELS[0]])
        scheduler.commit(plan)
        if step == 3:
            scheduler.finish(decoding.pop())
    assert portions == [11, 11, 11, 11, 9]
    for request in decoding:
        scheduler.finish(request)
    assert sum(item.count for item in scheduler.schedule().work[MODELS[0]]) == 37  # all that is left


def test_short_prompts_do_not_wait_for_long_ones() -> None:
    """While one request decodes, a step runs 34 tokens of prompts. Each prompt gets on: the oldest by half of them in
    every step, and all that are left."""
    scheduler = make_scheduler(blocks=2048, budget=512, prefill=32)
    decoding = make_request("decoding", {MODELS[0]: 2})
    scheduler.add(decoding)
    scheduler.commit(scheduler.schedule())
    lengths = {"first": 2000, "second": 2000, "short": 20}
    prompts = {name: Lane(MODELS[0], tuple(range(length)), [], name) for name, length in lengths.items()}
    first, second, short = (ScheduledRequest(name, (lane,), lane.output) for name, lane in prompts.items())
    ran: list[dict[str, int]] = []

    def step() -> Plan:
        decoding.output.append(0)
        plan = scheduler.schedule()
        assert decoding in plan.sampling
        ran.append({item.request.request_id: item.count for item in plan.work[MODELS[0]]})
        scheduler.commit(plan)
        scheduler.check()
        return plan

    for request in (first, second):
        scheduler.add(request)
        step()
    scheduler.add(short)
    while short not in step().sampling:
        assert len(ran) < 6
    scheduler.finish(short)
    step()
    for counts in ran:
        del counts["decoding"]
        assert sum(counts.values()) == 34
    assert ran == [
        {"first": 34},
        {"first": 17, "second": 17},
        {"first": 17, "second": 9, "short": 8},
        {"first": 21, "second": 4, "short": 9},
        {"first": 24, "second": 7, "short": 3},
        {"first": 25, "second": 9},
    ]


def test_the_last_tokens_of_many_lanes_find_room_beside_other_prompts() -> None:
    """Half of the tokens would be fewer than its lanes, whose last ones run in one step."""
    scheduler = make_scheduler(blocks=512, budget=64, prefill=5)
    decoding = make_request("decoding", {MODELS[0]: 2})
    scheduler.add(decoding)
    scheduler.commit(scheduler.schedule())
    output: list[int] = []
    wide = ScheduledRequest(
        "wide", tuple(Lane(MODELS[0], (number, 7), output) for number in range(5)), output
    )
    scheduler.add(wide)
    for number in range(4):
        scheduler.add(make_request(f"long{number}", {MODELS[0]: 300}))
    for _ in range(4):
        decoding.output.append(0)
        plan = scheduler.schedule()
        scheduler.commit(plan)
        if wide in plan.sampling:
            return
    raise AssertionError("starved")


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


def decoding(scheduler: Scheduler, *requests: ScheduledRequest, count: int = 1) -> None:
    """Have the requests where they only need their next token, after `count` others."""
    for request in requests:
        scheduler.add(request)
    for _ in range(50):
        if all(len(request.output) >= count for request in requests):
            return
        plan = scheduler.schedule()
        scheduler.commit(plan)
        for request in (*plan.sampling, *plan.probing):
            request.output.append(7)
    raise AssertionError("no room for them all")


def work_of(plan: Plan) -> dict[str, list[tuple[int, int, int]]]:
    return {
        model.name: [(item.start, item.count, item.rows) for item in work]
        for model, work in plan.work.items()
    }


def test_drafts_are_run_with_the_last_token() -> None:
    """The drafter has run all but its last token by then. What stands counts, what was run is charged."""
    scheduler = make_scheduler(block_size=4)
    request = make_request("r", dict.fromkeys(MODELS, 5))
    decoding(scheduler, request)
    tuned = request.lanes[1]
    plan = scheduler.schedule({request: Wish(3, tuned)})
    assert plan.granted == {request: Wish(3, tuned)}
    assert work_of(plan) == {model.name: [(5, 1, 1)] for model in MODELS}, "before there are drafts"
    request.drafts.extend([1, 2, 3])
    plan.run_ahead({request: 3})
    assert work_of(plan) == {"base": [(5, 4, 4)], "tuned": [(8, 1, 1)], "untuned": [(5, 4, 4)]}
    served = scheduler.waiting.service(0, "")
    scheduler.commit(plan, {request: 2})
    assert scheduler.waiting.service(0, "") - served == 3 * 4 + 3
    assert [lane.computed for lane in request.lanes] == [8, 8, 8]
    assert [lane.tokens_run for lane in request.lanes] == [9, 9, 9]
    request.output.extend([1, 2, 9])
    request.drafts.clear()
    scheduler.check()
    assert work_of(scheduler.schedule()) == {model.name: [(8, 1, 1)] for model in MODELS}


def test_others_find_no_block_with_a_draft_that_fell() -> None:
    scheduler = make_scheduler(block_size=4)
    request = make_request("r", {MODELS[0]: 5})
    decoding(scheduler, request)
    plan = scheduler.schedule({request: Wish(6)})
    request.drafts.extend([1, 2, 3, 4, 5, 6])
    plan.run_ahead({})
    scheduler.commit(plan, {request: 2})
    pool = scheduler.pools[MODELS[0]]
    request.output.extend([1, 2, 9])
    request.drafts.clear()
    scheduler.finish(request)
    assert pool.cached == 2, "the prompt's block, and the one that the text filled"
    output: list[int] = []
    again = Lane(MODELS[0], (0, 1, 2, 3, 4, 7, 1, 2, 9, 9), output)
    assert len(again.match_prefix(pool, 4, 1)) == 2
    fallen = Lane(MODELS[0], (0, 1, 2, 3, 4, 7, 1, 2, 3, 4, 5, 6, 7), output)
    assert len(fallen.match_prefix(pool, 4, 1)) == 2


def test_drafts_have_what_is_left_over() -> None:
    """Rows after scores, tokens after prompts, blocks without taking anybody's."""
    scheduler = make_scheduler(block_size=4, budget=8, rows=4)
    request = make_request("r", {MODELS[0]: 3})
    decoding(scheduler, request)
    wishes = {request: Wish(6)}
    assert scheduler.schedule(wishes).granted == {request: Wish(4)}, "rows"
    scheduler.max_scored_rows = 100
    assert scheduler.schedule(wishes).granted == {request: Wish(6)}
    assert scheduler.schedule({request: Wish(9)}).granted == {request: Wish(7)}, "tokens"
    long = make_request("long", {MODELS[0]: 5})
    scheduler.add(long)
    plan = scheduler.schedule(wishes)
    assert plan.admitted == [long] and plan.granted == {request: Wish(2)}, "tokens after the prompt"
    scheduler = make_scheduler(block_size=4, blocks=4)
    one, other = make_request("one", {MODELS[0]: 4}), make_request("other", {MODELS[0]: 3})
    decoding(scheduler, one, other)
    plan = scheduler.schedule({one: Wish(12)})
    assert plan.granted == {one: Wish(7)} and not plan.preempted, "blocks"


def test_all_have_a_draft_before_any_has_its_second() -> None:
    scheduler = make_scheduler(block_size=16, blocks=200, budget=512, rows=100)
    requests = [make_request(str(number), {MODELS[0]: 4}) for number in range(64)]
    scheduler.max_batch = 64
    decoding(scheduler, *requests)
    plan = scheduler.schedule({request: Wish(8) for request in requests})
    assert sorted(wish.drafts for wish in plan.granted.values()) == [1] * 28 + [2] * 36
    assert len(plan.granted) == 64
    plan = scheduler.schedule({request: Wish(3) for request in requests[32:]})
    assert plan.granted == dict.fromkeys(requests[32:], Wish(3))


def test_only_who_needs_nothing_but_its_next_token_runs_ahead() -> None:
    scheduler = make_scheduler(block_size=4)
    gated = make_request("gated", {MODELS[0]: 5, MODELS[1]: 5})
    gated.gated = True
    starting = make_request("starting", {MODELS[0]: 5, MODELS[1]: 9})
    decoding(scheduler, gated)
    scheduler.add(starting)
    plan = scheduler.schedule({request: Wish(2) for request in (gated, starting)})
    assert starting in plan.sampling and not plan.granted


def test_illegal_moves_are_refused() -> None:
    request = make_request("r", {MODELS[0]: 1})
    request.move(RequestState.FINISHED)
    for state in RequestState:
        with pytest.raises(ValueError, match="cannot go"):
            request.move(state)
