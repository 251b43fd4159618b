"""The scheduler. Its one law:

    Each lane has tokens computed and tokens wanted; a step hands out work so that computed catches up with
    wanted; a request may sample when all its lanes have caught up.

Prompt processing, chunked prefill, prefix-cache hits, decoding and lanes of different prompt length are all cases
of it. Because sampling needs the logits of every lane's last token at once, a lane that is ahead keeps its last
token back until the other lanes of its request can run theirs in the same step. The same holds for the tokens before
it whose logits are wanted too (to score a prompt): counted from the end, all lanes run these in the same step.

    lane 0   ······|▂▂▂▂▂▂▂▂      · on its own, as fast as it can     ▂ in step with the other lanes, as many
    lane 1   ··|▂▂▂▂▂▂▂▂            at once as the budgets allow; the last one is sampled from

A request whose lanes miss nothing but their last token may run ahead of its text, into drafts, with what the step has
left once everybody else has been given theirs. One lane may write the drafts, a token at a time, before the step's
forwards; the others run them all in one. As many as turn out to be right count as computed.

    verifying lane   ··········|▂▁▁▁     ▂ its last token     ▁ drafts
    drafter          ··········|░░░▁     ░ run before the forwards, each to draft the next
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

from proxyserve.kv.block_pool import BlockPool
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.queue import FairQueue
from proxyserve.scheduler.request import RequestState, ScheduledRequest
from proxyserve.types import ModelKey

PlaceT = TypeVar("PlaceT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Wish:
    """Up to `drafts` tokens that a request would run ahead of its text. `drafter` is the lane that writes them; None:
    they come from elsewhere, and all lanes verify."""

    drafts: int
    drafter: Lane | None = None


@dataclass(slots=True)
class LaneWork:
    """Run the lane's tokens `start` to `start + count`. The logits of the last `rows` of them are wanted. A drafter has
    run `drafted` tokens before that in the same step."""

    request: ScheduledRequest
    lane: Lane
    start: int
    count: int
    rows: int
    drafted: int = 0


#: Tokens of prompts that a step may run more for each request that decodes in it. On a CPU each of these makes the step
#: longer by about as much as one token of a prompt does, so prompts stay in proportion.
_PROMPT_PER_DECODING = 2

_NO_WISHES: Mapping[ScheduledRequest, Wish] = MappingProxyType({})
_NONE_ACCEPTED: Mapping[ScheduledRequest, int] = MappingProxyType({})


@dataclass(slots=True)
class Plan:
    """One step: per trunk the work of its packed forward, the requests that sample afterwards, and the gated ones that
    have the logits of lane 0 and must learn whether that is enough. `rows` has the requests of which logits are wanted,
    and of how many tokens: so many `rows` has the one work of each lane whose turn it is. Where the request is in
    `sampling` or `probing`, the last of them are of the lanes' last wanted tokens. `admitted` are those that came out
    of the queue. `granted` are those of `sampling` that may run ahead, each with its wish, cut to what there is room
    for; the work is that without drafts until `run_ahead`."""

    work: dict[ModelKey, list[LaneWork]] = field(default_factory=dict)
    rows: dict[ScheduledRequest, int] = field(default_factory=dict)
    sampling: list[ScheduledRequest] = field(default_factory=list)
    probing: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[ScheduledRequest] = field(default_factory=list)
    admitted: list[ScheduledRequest] = field(default_factory=list)
    granted: dict[ScheduledRequest, Wish] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not self.work

    def run_ahead(self, drafted: Mapping[ScheduledRequest, int]) -> None:
        """The granted requests have their drafts, maybe fewer than granted: verify them. `drafted` says how many tokens
        the drafters ran. Each lane has a row after its last token and after each draft; those of a drafter but the last
        came while it drafted."""
        for request in self.granted:
            self.rows[request] = 1 + len(request.drafts)
        for work in self.work.values():
            for item in work:
                wish = self.granted.get(item.request)
                if wish is None:
                    continue
                if item.lane is wish.drafter:
                    item.start += len(item.request.drafts)
                    item.drafted = drafted.get(item.request, 0)
                else:
                    item.count = item.rows = 1 + len(item.request.drafts)


@dataclass(slots=True)
class _Budget:
    """What is left of a step: tokens of each trunk's forward, and rows of logits beside those to sample from."""

    tokens: dict[ModelKey, int]
    scored_rows: int

    def half(self, request: ScheduledRequest) -> dict[ModelKey, int]:
        """Half of the tokens, but no fewer than the request's lanes need for their last ones, which run together."""
        lanes = Counter(lane.trunk for lane in request.turn)
        return {trunk: max((tokens + 1) // 2, lanes[trunk]) for trunk, tokens in self.tokens.items()}

    def set_aside(self, tokens: Mapping[ModelKey, int]) -> dict[ModelKey, int]:
        """Take so many out, or as many as there are. Returns what was taken."""
        taken = {trunk: max(0, min(count, self.tokens[trunk])) for trunk, count in tokens.items()}
        for trunk, count in taken.items():
            self.tokens[trunk] -= count
        return taken

    def give_back(self, taken: Mapping[ModelKey, int]) -> None:
        for trunk, count in taken.items():
            self.tokens[trunk] += count


class Scheduler:
    """Owns the queue, the running requests and who holds which blocks of `pools`. That has the pool of each trunk;
    trunks whose layers store alike share one. It may be replaced between steps by one with other trunks, as long as
    those of queued and running requests stay. A step has at most `max_scored_rows` rows of logits, over all lanes of
    all requests, beside one for each lane to sample from; no request may have more lanes than that.

    While requests decode, a step runs at most `prefill_tokens` tokens of prompts per trunk, and two more for each of
    these requests, so that a long prompt does not hold them up for long; None sets no such limit. It must be at least
    the number of lanes of one request on one trunk, whose last tokens run in one step. The first prompt, by priority
    and arrival, is sure of half of these tokens; the other half is for short prompts first, so that they need not wait
    until a long one is through."""

    def __init__(
        self,
        pools: Mapping[ModelKey, BlockPool],
        *,
        block_size: int,
        max_batch: int,
        max_batch_tokens: int,
        max_scored_rows: int,
        prefill_tokens: int | None = None,
    ) -> None:
        if max_batch_tokens < max_batch:
            raise ValueError("max_batch_tokens below max_batch: some running request could never advance")
        self.pools = pools
        self.block_size = block_size
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_scored_rows = max_scored_rows
        self.prefill_tokens = prefill_tokens
        self.running: list[ScheduledRequest] = []
        self.waiting = FairQueue()

    @property
    def has_work(self) -> bool:
        """Any thread may ask."""
        return bool(self.running or self.waiting)

    def add(self, request: ScheduledRequest) -> None:
        """Queue a request. The caller has checked that its lanes at their longest fit into the pools when nothing else
        is there: this is what guarantees that the oldest request of the first priority always gets on, whatever is
        preempted."""
        self.waiting.add(request)

    def finish(self, request: ScheduledRequest) -> None:
        """Take a request out, from whatever state, and return its blocks."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self._release(request)
        request.drafts.clear()
        request.move(RequestState.FINISHED)
        self.waiting.end(request)

    # One step ---------------------------------------------------------------------------------------------

    def schedule(self, wishes: Mapping[ScheduledRequest, Wish] = _NO_WISHES) -> Plan:
        """Hand out the work of the next step. `commit` must follow once the work has been done; if it has failed,
        `finish` the plan's requests instead. `wishes` are granted where they cost nobody anything but time."""
        plan = Plan()
        budget = _Budget(dict.fromkeys(self.pools, self.max_batch_tokens), self.max_scored_rows)
        # Requests that only need their next token come first: a long prompt never delays a running answer.
        granted: set[int] = set()
        decoding = [request for request in self.running if not _needs_prefill(request)]
        prefilling = [request for request in self.running if _needs_prefill(request)]
        self._grant_in_turn(decoding, budget, plan, granted)
        kept = self._keep_from_prompts(len(decoding), budget)
        prefilling = [request for request in prefilling if request.state is RequestState.RUNNING]
        if kept and prefilling:
            self._grant_portions(prefilling, budget, plan, granted)
        else:
            self._grant_in_turn(prefilling, budget, plan, granted)
            if not plan.preempted:
                self._admit(budget, plan, granted)
        if wishes and not plan.preempted:
            budget.give_back(kept)
            self._grant_drafts(wishes, budget, plan)
        return plan

    def commit(self, plan: Plan, accepted: Mapping[ScheduledRequest, int] = _NONE_ACCEPTED) -> None:
        """The plan's work has been done: its tokens are computed, full blocks are published, and whoever wanted rows of
        logits has them. `accepted` says how many of a request's drafts, which are still there, will be output and have
        another token after them; at -1 there is no token at all, and the last one must be run again."""
        for trunk, work in plan.work.items():
            pool = self.pools[trunk]
            for item in work:
                ran = item.drafted + item.count
                computed = 1 + accepted.get(item.request, 0) if item.request in plan.granted else item.count
                item.lane.advance(computed, ran, pool, self.block_size)
                self.waiting.charge(item.request, ran * item.lane.cost)
        for request in plan.sampling:
            self.waiting.charge(request, 1.0 + accepted.get(request, 0))
        for request, rows in plan.rows.items():
            request.unscored = max(0, request.unscored - rows)

    def _grant_in_turn(
        self, requests: Sequence[ScheduledRequest], budget: _Budget, plan: Plan, granted: set[int]
    ) -> None:
        for request in sorted(requests, key=_rank):
            if request.state is RequestState.RUNNING:  # else preempted a moment ago
                self._grant(request, budget, plan, granted)

    def _keep_from_prompts(self, decoding: int, budget: _Budget) -> dict[ModelKey, int]:
        """Leave in the budget what prompts may take beside so many requests that decode. Returns the rest."""
        if self.prefill_tokens is None or not decoding:
            return {}
        most = self.prefill_tokens + _PROMPT_PER_DECODING * decoding
        return budget.set_aside({trunk: tokens - most for trunk, tokens in budget.tokens.items()})

    def _grant_portions(
        self, requests: Sequence[ScheduledRequest], budget: _Budget, plan: Plan, granted: set[int]
    ) -> None:
        """Share what prompts may take, tokens and rows: half is for the first request by priority and arrival, so that
        it always gets on. Of the rest each of the others takes at most half of the tokens left, by priority and then by
        how little it misses, and requests that come out of the queue the remainder. What they leave is the first one's
        as well."""
        first, *others = sorted(requests, key=_rank)
        # Its blocks come before those of the others, though its work comes after theirs.
        trunks, missing = [lane.trunk for lane in first.turn], [lane.missing for lane in first.turn]
        if self._make_room(first, _fit(trunks, missing, budget.tokens), plan, granted):
            granted.add(id(first))
        aside = budget.set_aside(budget.half(first))
        rows = min(budget.scored_rows, max(budget.scored_rows // 2, len(first.turn)))
        budget.scored_rows -= rows
        for request in sorted(others, key=_rank_in_portions):
            if request.state is RequestState.RUNNING:
                half = budget.half(request)
                rest = budget.set_aside({trunk: budget.tokens[trunk] - half[trunk] for trunk in half})
                self._grant(request, budget, plan, granted)
                budget.give_back(rest)
        if not plan.preempted:
            self._admit(budget, plan, granted)
        budget.give_back(aside)
        budget.scored_rows += rows
        if first.state is RequestState.RUNNING:
            self._grant(first, budget, plan, granted)

    def _grant(self, request: ScheduledRequest, budget: _Budget, plan: Plan, granted: set[int]) -> None:
        """Give each lane whose turn it is as much of what it misses as its trunk's budget allows."""
        lanes = request.turn
        missing = [lane.missing - request.rows for lane in lanes]
        counts = _fit([lane.trunk for lane in lanes], missing, budget.tokens)
        rows = _rows_in_step(request, counts, budget) if counts == missing else 0
        counts = [count + rows for count in counts]
        if not self._make_room(request, counts, plan, granted):
            return
        granted.add(id(request))
        for lane, count in zip(lanes, counts, strict=True):
            if count:
                budget.tokens[lane.trunk] -= count
                work = LaneWork(request, lane, lane.computed, count, rows)
                plan.work.setdefault(lane.trunk, []).append(work)
        if rows:
            plan.rows[request] = rows
            budget.scored_rows -= min(rows, request.unscored) * len(lanes)
        if rows > request.unscored:
            probe = request.gated and not request.awaiting
            (plan.probing if probe else plan.sampling).append(request)

    def _make_room(self, request: ScheduledRequest, counts: list[int], plan: Plan, granted: set[int]) -> bool:
        """Give the lanes whose turn it is blocks for `counts` more tokens, preempting the last requests by
        priority and arrival that have no work in this step yet. False if the request itself was the one to go."""
        lanes = request.turn
        while not self._reserve(lanes, [lane.computed + c for lane, c in zip(lanes, counts, strict=True)]):
            victim = max((r for r in self.running if id(r) not in granted), key=_rank)
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _reserve(self, lanes: tuple[Lane, ...], tokens: list[int]) -> bool:
        """Blocks for `tokens[i]` tokens in lane i: in every pool that the lanes need, or in none."""
        needs = [
            lane.blocks_needed(count, self.block_size) for lane, count in zip(lanes, tokens, strict=True)
        ]
        if not any(needs):
            return True
        pools = [self.pools[lane.trunk] for lane in lanes]
        if not _fits(pools, needs, {pool: pool.available for pool in pools}):
            return False
        for lane, pool, needed in zip(lanes, pools, needs, strict=True):
            if needed:
                lane.blocks.extend(pool.allocate(needed))
        return True

    def _grant_drafts(self, wishes: Mapping[ScheduledRequest, Wish], budget: _Budget, plan: Plan) -> None:
        """Let requests that only need their next token run ahead, as far as tokens, rows and blocks are left over. All
        have a draft before any has its second, which stands more rarely."""
        going: list[tuple[ScheduledRequest, Wish, Counter[ModelKey]]] = []
        for request in plan.sampling:
            wish = wishes.get(request)
            if wish is None or request.gated or any(lane.missing > 1 for lane in request.lanes):
                continue
            verifying = Counter(lane.trunk for lane in request.lanes if lane is not wish.drafter)
            going.append((request, wish, verifying))
        drafts = 0
        while going:
            drafts += 1
            going = [
                (request, wish, verifying)
                for request, wish, verifying in going
                if drafts <= wish.drafts and self._grant_draft(request, drafts, verifying, budget)
            ]
            for request, wish, _ in going:
                plan.granted[request] = replace(wish, drafts=drafts)

    def _grant_draft(
        self, request: ScheduledRequest, drafts: int, verifying: Mapping[ModelKey, int], budget: _Budget
    ) -> bool:
        """Room for the request's draft number `drafts`, from 1: a row for each lane, a token for each that verifies.
        False, and nothing is taken, if there is not enough."""
        lanes = request.lanes
        if budget.scored_rows < len(lanes):
            return False
        if any(budget.tokens[trunk] < count for trunk, count in verifying.items()):
            return False
        if not self._reserve(lanes, [lane.wanted + drafts for lane in lanes]):
            return False
        budget.scored_rows -= len(lanes)
        for trunk, count in verifying.items():
            budget.tokens[trunk] -= count
        return True

    def _preempt(self, request: ScheduledRequest) -> None:
        """Free all lanes of the request; it goes back to its place in the queue and recomputes."""
        self.running.remove(request)
        self._release(request)
        request.move(RequestState.WAITING)
        request.preemptions += 1
        request.awaiting = False  # the held logits go with the blocks
        self.waiting.put_back(request)

    def _admit(self, budget: _Budget, plan: Plan, granted: set[int]) -> None:
        """Start waiting requests by their turns while blocks and places last. A request whose leader is still computing
        their common prompt is passed over, it is not yet its turn."""
        if len(self.running) >= self.max_batch:
            return
        for request in self.waiting.turns():
            if len(self.running) >= self.max_batch or not any(budget.tokens.values()):
                return
            leader = request.leader
            if (
                leader is not None
                and leader.state is not RequestState.FINISHED
                and not leader.prompt_computed
            ):
                continue
            if not self._start(request):
                return
            self.waiting.start(request)
            request.move(RequestState.RUNNING)
            self.running.append(request)
            plan.admitted.append(request)
            self._grant(request, budget, plan, granted)

    def _start(self, request: ScheduledRequest) -> bool:
        """Take matched prefix blocks and reserve the rest of every lane's wanted tokens, or take nothing."""
        for lane in request.lanes:
            pool = self.pools[lane.trunk]
            matched = lane.match_prefix(pool, self.block_size, request.rows)
            pool.reuse(matched)
            lane.start_from(matched, self.block_size)
        if self._reserve(request.lanes, [lane.wanted for lane in request.lanes]):
            return True
        self._release(request)
        return False

    def _release(self, request: ScheduledRequest) -> None:
        for lane in request.lanes:
            lane.release(self.pools[lane.trunk])

    def check(self) -> None:
        """Raise AssertionError if blocks, lanes and states disagree. For tests, after every step."""
        pools = set(self.pools.values())
        for pool in pools:
            pool.check()
        holders: dict[tuple[BlockPool, int], int] = {}
        for request in self.running:
            assert request.state is RequestState.RUNNING, (
                f"{request.request_id} runs in state {request.state}"
            )
            assert not request.drafts, "drafts outlived their step"
            for lane in request.lanes:
                lane.check(self.block_size)
                assert lane.drafts is request.drafts, "a lane has drafts of its own"
                assert not request.unscored or lane.missing >= request.rows, "a row of logits was passed over"
                pool = self.pools[lane.trunk]
                for block in lane.blocks:
                    holders[pool, block] = holders.get((pool, block), 0) + 1
        self.waiting.check()
        for request in self.waiting:
            assert request.state is RequestState.WAITING, (
                f"{request.request_id} waits in state {request.state}"
            )
            assert not any(lane.blocks for lane in request.lanes), "a waiting request holds blocks"
        for pool in pools:
            for block in range(pool.num_blocks):
                assert pool.references(block) == holders.get((pool, block), 0), f"block {block} leaked"


def _rows_in_step(request: ScheduledRequest, counts: Sequence[int], budget: _Budget) -> int:
    """How many of the tokens whose logits are wanted each lane can run after `counts` others, the same for all lanes. A
    gated request samples in a step of its own, since that begins with lane 0 alone."""
    lanes = request.turn
    left = {lane.trunk: budget.tokens[lane.trunk] for lane in lanes}
    for lane, count in zip(lanes, counts, strict=True):
        left[lane.trunk] -= count
    trunks = [lane.trunk for lane in lanes]
    most = min(left[trunk] // trunks.count(trunk) for trunk in trunks)
    scored = min(most, request.unscored, budget.scored_rows // len(lanes))
    if scored < request.unscored or (scored and request.gated):
        return scored
    return min(most, scored + 1)


def _rank(request: ScheduledRequest) -> tuple[int, int]:
    """Who gets on when not all can: the first by priority, then by arrival."""
    return request.priority, request.arrival


def _rank_in_portions(request: ScheduledRequest) -> tuple[int, int, int]:
    """Who gets on of those whose prompts share a step: a short prompt does not wait for the long ones before it."""
    return request.priority, sum(lane.missing for lane in request.turn), request.arrival


def _needs_prefill(request: ScheduledRequest) -> bool:
    return any(lane.missing > 1 for lane in request.turn)


def _fit(places: Sequence[PlaceT], counts: list[int], room: Mapping[PlaceT, int]) -> list[int]:
    """Cut `counts` so that all that go to one place (a trunk's forward, a pool) stay within its room; earlier ones
    first."""
    left = {place: room[place] for place in places}
    fitted = []
    for place, count in zip(places, counts, strict=True):
        fitted.append(min(count, left[place]))
        left[place] -= fitted[-1]
    return fitted


def _fits(places: Sequence[PlaceT], counts: list[int], room: Mapping[PlaceT, int]) -> bool:
    return _fit(places, counts, room) == counts
