"""How many tokens are drafted: simulated machines, whose steps take the seconds that a formula says."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from proxyserve.engine.speculation.acceptance import SPARSEST, Acceptance, Drafting, Kinds
from proxyserve.engine.speculation.costs import ForwardCosts, Speed, start_up_sizes
from proxyserve.engine.speculation.pace import PAYS, Candidate, choose
from proxyserve.engine.speculation.step_costs import StepCosts
from proxyserve.types import ModelKey

MOST = 8
TUNED, UNTUNED, BASE = MODELS = ModelKey("tuned"), ModelKey("untuned"), ModelKey("base")
VERIFIERS = (BASE, UNTUNED)


def flat(seconds: float, per_token: float = 0.0) -> Callable[[int], float]:
    """Weights are read once, then each token costs something."""
    return lambda tokens: seconds + per_token * tokens


def knee(seconds: float, free: int, per_token: float) -> Callable[[int], float]:
    """Tokens are free up to a number, as on a GPU."""
    return lambda tokens: seconds + per_token * max(0, tokens - free)


@dataclass
class Machine:
    """What really takes how long, with noise: a factor, and now and then a step that waits for something."""

    base: Callable[[int], float] = field(default_factory=lambda: flat(25e-3, 1e-3))
    small: Callable[[int], float] = field(default_factory=lambda: flat(4e-3, 0.2e-3))
    pick: Callable[[int], float] = field(default_factory=lambda: flat(1e-3, 0.2e-3))
    noise: float = 0.0
    hiccups: float = 0.0
    busy: float = 1.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def takes(self, law: Callable[[int], float], count: int) -> float:
        seconds = law(count) * self.busy * math.exp(self.random.gauss(0.0, self.noise))
        return seconds * 10 if self.random.random() < self.hiccups else seconds


def unknown_costs() -> StepCosts:
    costs = StepCosts()
    for name in MODELS:
        costs.know(name, {})
    return costs


class Simulation:
    """Requests of fused decoding with one expert each, all of one drafter. What is learned from is noisy; `seconds` and
    `tokens` are what is expected of the steps that were taken."""

    def __init__(self, machine: Machine, rates: Sequence[float], *, kinds: Kinds | None = None) -> None:
        self.machine = machine
        self.rates = list(rates)
        kinds = kinds or Kinds()
        self.drafting = [kinds.begin("expert") for _ in rates]
        self.costs = StepCosts()
        self.laws = {BASE: machine.base, UNTUNED: machine.small, TUNED: machine.small}
        self.seconds = 0.0
        self.tokens = 0.0
        self.drafts = 0
        self.shadows = 0
        for name, law in self.laws.items():
            sizes = start_up_sizes(len(rates) * (MOST + 1))
            # Of this thread's time, which is less noisy.
            measured = {size: law(size) * math.exp(machine.random.gauss(0.0, 0.03)) for size in sizes}
            self.costs.know(name, measured)

    def step(self, fixed: int | None = None) -> list[int]:
        """Returns the drafts of each request."""
        requests = len(self.rates)
        plain: dict[ModelKey, int] = dict.fromkeys(self.laws, requests)
        wishes = [fixed or 0] * requests
        if fixed is None:
            candidates = [
                Candidate(VERIFIERS, drafting.rate or 0.0, MOST, TUNED) for drafting in self.drafting
            ]
            wishes = choose(candidates, self.costs, tokens=plain, rows=requests)
        depths: list[dict[ModelKey, int]] = [
            {TUNED: sum(wish > depth for wish in wishes)} for depth in range(max(wishes))
        ]
        rows = requests + sum(wishes)
        shadows = [drafting.due >= 1.0 and not k for drafting, k in zip(self.drafting, wishes, strict=True)]
        self.shadows += sum(shadows)
        tokens: dict[ModelKey, int] = {BASE: rows, UNTUNED: rows, TUNED: requests}
        spent = {name: self.takes(self.laws[name], count) for name, count in tokens.items()}
        rest = self.takes(self.machine.pick, rows)
        self.costs.took(sum(spent.values()) + rest, tokens, spent, rows)
        if depths:
            drafted = sum(self.takes(self.machine.small, depth[TUNED]) for depth in depths)
            rest = sum(self.takes(self.machine.pick, depth[TUNED]) for depth in depths)
            self.costs.drafting_took(drafted + rest, depths, {TUNED: drafted})
        for number, (drafting, k) in enumerate(zip(self.drafting, wishes, strict=True)):
            right = [self.machine.random.random() < self.rates[number] for _ in range(max(k, 1))]
            accepted = next((place for place, good in enumerate(right[:k]) if not good), k)
            self.tokens += sum(self.rates[number] ** depth for depth in range(k + 1))
            self.drafts += k
            if k:
                drafting.verified(accepted, k)
            elif shadows[number]:
                drafting.shadowed(right[0])
            else:
                drafting.skipped()
        return wishes

    def takes(self, law: Callable[[int], float], count: int) -> float:
        self.seconds += law(count)
        return self.machine.takes(law, count)

    def speed(self, steps: int, fixed: int | None = None) -> float:
        """Tokens per virtual second from now on."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self.step(fixed)
        return (self.tokens - tokens) / (self.seconds - seconds)


def test_choose_takes_the_best_uniform_number() -> None:
    machine, costs = Machine(), unknown_costs()
    for count in range(1, 73):
        costs.forwards[BASE].observe(count, machine.base(count))
        costs.forwards[UNTUNED].observe(count, machine.small(count))
        costs.forwards[TUNED].observe(count, machine.small(count))
        costs.drafters[TUNED].observe(count, machine.small(count))
        costs.picking.observe(count, machine.pick(count))
        costs.drafting.observe(count, machine.pick(count))

    def speed(rate: float, requests: int, k: int) -> float:
        rows = requests * (k + 1)
        seconds = machine.base(rows) + machine.small(rows) + machine.small(requests) + machine.pick(rows)
        seconds += k * (machine.small(requests) + machine.pick(requests))
        return requests * sum(rate**depth for depth in range(k + 1)) / seconds

    for rate in (0.0, 0.25, 0.5, 0.75, 0.875, 1.0):
        for requests in (1, 2, 4, 8):
            candidate = Candidate(VERIFIERS, rate, MOST, TUNED)
            chosen = choose(
                [candidate] * requests, costs, tokens=dict.fromkeys(costs.forwards, requests), rows=requests
            )
            assert len(set(chosen)) == 1
            best = max(speed(rate, requests, k) for k in range(MOST + 1))
            plain = speed(rate, requests, 0)
            assert speed(rate, requests, chosen[0]) >= best / PAYS * 0.99
            assert chosen[0] == 0 or speed(rate, requests, chosen[0]) > plain


def test_choose_tells_requests_apart() -> None:
    simulation = Simulation(Machine(), [1.0])
    simulation.step()

    def chosen(*candidates: Candidate) -> list[int]:
        requests = len(candidates)
        return choose(
            candidates,
            simulation.costs,
            tokens=dict.fromkeys(simulation.costs.forwards, requests),
            rows=requests,
        )

    good = Candidate(VERIFIERS, 0.95, MOST, TUNED)
    assert chosen(good)[0] > 2
    useless = Candidate(VERIFIERS, 0.02, MOST, TUNED)
    mixed = chosen(good, useless, good, useless)
    assert mixed[0] == mixed[2] > 0 == mixed[1] == mixed[3]
    short = Candidate(VERIFIERS, 0.95, 1, TUNED)
    assert chosen(good, short)[1] <= 1 < chosen(good, short)[0]
    assert chosen(Candidate(VERIFIERS, 1.0, 0, TUNED)) == [0]
    looked_up = Candidate((BASE,), 0.5, 2)
    assert chosen(looked_up)[0] > 0, "drafts that cost no forward pay at lower rates"
    assert choose([], simulation.costs, tokens={}, rows=0) == []


def test_nothing_is_drafted_before_costs_are_known() -> None:
    costs = unknown_costs()
    assert choose([Candidate((BASE,), 1.0, 4)], costs, tokens={BASE: 1}, rows=1) == [0]


def test_drafts_that_a_step_has_no_room_for_are_the_least_likely() -> None:
    simulation = Simulation(Machine(flat(1.0), flat(0.01)), [1.0] * 64)
    good, fair = Candidate(VERIFIERS, 0.95, MOST, TUNED), Candidate(VERIFIERS, 0.5, MOST, TUNED)

    def chosen(candidates: Sequence[Candidate], **room: int) -> list[int]:
        return choose(
            candidates, simulation.costs, tokens=dict.fromkeys(MODELS, 64), rows=len(candidates), **room
        )

    alike = chosen([good] * 64, most_logits=256)
    assert sum(alike) == 256 // 3, "a row of each lane"
    assert set(alike) == {1, 2}, "a first draft for all before a second for any"
    assert set(chosen([good] * 64, most_tokens=512)) == {7}
    assert sum(chosen([good] * 64, most_tokens=100)) == 36
    mixed = chosen([fair, good] * 32, most_logits=192)
    assert sum(mixed) == 64 and set(mixed[::2]) == {0}, "those of others are likelier, the second as well"
    assert chosen([good] * 64, most_logits=2) == [0] * 64


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize("knee_at", [None, 48])
def test_comes_close_to_the_best_fixed_number(rate: float, requests: int, knee_at: int | None) -> None:
    def machine() -> Machine:
        base = flat(25e-3, 1e-3) if knee_at is None else knee(20e-3, knee_at, 1e-3)
        return Machine(base, noise=0.1, hiccups=0.01)

    best = max(Simulation(machine(), [rate] * requests).speed(1, k) for k in range(MOST + 1))
    adaptive = Simulation(machine(), [rate] * requests)
    adaptive.speed(40)
    assert adaptive.speed(400 // requests) >= 0.9 * best


def test_costs_nothing_where_drafts_never_stand() -> None:
    plain = Simulation(Machine(noise=0.1), [0.0]).speed(500, 0)
    simulation = Simulation(Machine(noise=0.1), [0.0])
    assert simulation.speed(500) >= 0.97 * plain
    assert simulation.drafts == 0
    assert simulation.shadows < 500 / SPARSEST + 15


def test_starts_and_stops_as_acceptance_changes() -> None:
    simulation = Simulation(Machine(noise=0.05), [0.0])
    for _ in range(200):
        assert simulation.step() == [0]
    simulation.rates = [0.95]
    waited = next(step for step in range(200) if simulation.step() != [0])
    assert waited < 60
    simulation.speed(50)
    simulation.rates = [0.0]
    drafted = simulation.drafts
    simulation.speed(100)
    assert simulation.step() == [0]
    assert simulation.drafts - drafted < 100


def test_a_new_request_of_a_known_expert_begins_at_once() -> None:
    kinds = Kinds()
    first = Simulation(Machine(), [0.9], kinds=kinds)
    for _ in range(5):
        assert first.step() == [0], "too little is known"
    first.speed(100)
    assert Simulation(Machine(), [0.9], kinds=kinds).step()[0] > 1, "though nobody has seen a pick yet"
    later = Simulation(Machine(), [0.9], kinds=kinds)
    later.costs = first.costs
    assert later.step()[0] > 1


def test_large_batches_do_not_draft_on_a_machine_without_spare_arithmetic() -> None:
    simulation = Simulation(Machine(flat(1e-3, 5e-3), noise=0.02), [0.7] * 16)
    simulation.speed(50)
    assert simulation.step() == [0] * 16


def test_a_costly_drafter_must_be_right_more_often() -> None:
    def drafts(small: float) -> bool:
        simulation = Simulation(Machine(small=flat(small)), [0.35])
        simulation.speed(100)
        drafted = simulation.drafts
        simulation.speed(50)
        return simulation.drafts > drafted

    assert drafts(1e-3)
    assert not drafts(25e-3)


def test_a_machine_that_becomes_slow_and_fast_again_changes_nothing() -> None:
    simulation = Simulation(Machine(noise=0.05), [0.9])
    simulation.speed(100)
    before = simulation.speed(200)
    for busy in (3.0, 1.0, 0.5):
        simulation.machine.busy = busy
        assert simulation.speed(100) == pytest.approx(before, rel=0.05)


def test_costs_between_and_beyond_what_was_seen() -> None:
    costs = ForwardCosts(Speed())
    assert costs.seconds(1) == math.inf
    assert costs.seconds(0) == 0.0
    costs.observe(4, 8.0)
    assert costs.seconds(8) == pytest.approx(16.0), "of one size only the worst can be assumed"
    assert costs.seconds(1) == pytest.approx(8.0), "and that a smaller one saves nothing"
    for _ in range(200):
        costs.observe(4, 8.0)
        costs.observe(16, 20.0)
    assert costs.seconds(10) == pytest.approx(14.0, rel=0.02)
    assert costs.seconds(32) == pytest.approx(36.0, rel=0.02)
    with pytest.raises(ValueError, match="cannot have taken"):
        costs.observe(4, 0.0)
    with pytest.raises(ValueError, match="cannot have taken"):
        costs.observe(0, 1.0)


def test_costs_grow_with_tokens_whatever_was_measured() -> None:
    generator = random.Random(1)
    costs = ForwardCosts(Speed())
    for _ in range(500):
        tokens = generator.randint(1, 200)
        costs.observe(tokens, (1.0 + tokens / 50) * math.exp(generator.gauss(0.0, 0.3)))
    estimates = [costs.seconds(tokens) for tokens in range(1, 400)]
    assert all(later >= earlier * (1.0 - 1e-12) for earlier, later in pairwise(estimates))
    assert costs.seconds(100) == pytest.approx(3.0, rel=0.2)


def test_costs_of_what_is_not_run_follow_the_machine_and_nothing_else() -> None:
    generator = random.Random(2)
    costs = ForwardCosts(Speed())
    for tokens in (1, 2, 3, 6):
        costs.observe(tokens, 1.0 + 0.1 * tokens)
    for step in range(5_000):
        tokens = 1 + step % 2
        busy = 3.0 if step > 2_500 else 1.0
        costs.observe(tokens, busy * (1.0 + 0.1 * tokens) * math.exp(generator.gauss(0.0, 0.5)))
    assert costs.seconds(1) == pytest.approx(3.3, rel=0.5)
    for tokens in (3, 6):
        assert costs.seconds(tokens) / costs.seconds(1) == pytest.approx((1.0 + 0.1 * tokens) / 1.1, rel=0.2)


def test_where_no_clock_tells_parts_keep_their_shares() -> None:
    costs = StepCosts()
    costs.know(BASE, {1: 1.0, 4: 1.1})
    costs.know(TUNED, {1: 0.2, 4: 0.2})
    for _ in range(100):  # four times as fast as at start-up, when each forward was launched by itself
        costs.took(0.325, {BASE: 1, TUNED: 1}, None, 1)
    assert costs.seconds({BASE: 1, TUNED: 1}, 1) == pytest.approx(0.325, rel=0.05)
    assert costs.forwards[BASE].seconds(1) == pytest.approx(0.25, rel=0.05)
    assert costs.drafting_seconds([{TUNED: 1}]) == pytest.approx(0.075, rel=0.1), "of what was never run"
    for _ in range(100):
        costs.took(0.325, {BASE: 1, TUNED: 1}, None, 1)
        costs.drafting_took(0.4, [{TUNED: 1}] * 2, None)
    assert costs.drafting_seconds([{TUNED: 1}]) == pytest.approx(0.2, rel=0.1)
    assert costs.seconds({BASE: 1, TUNED: 1}, 1) == pytest.approx(0.325, rel=0.1)


def test_what_is_not_drafted_for_a_while_follows_the_machine() -> None:
    """A drafter that was tried when the machine was busy does not seem slow for ever."""
    costs = StepCosts()
    for name in MODELS:
        costs.know(name, {1: 1.0, 2: 1.1, 4: 1.2})
    for busy, drafts in ((1.0, True), (6.0, True), (1.0, False)):
        for _ in range(100):
            spent = dict.fromkeys(MODELS, busy)
            costs.took(4.0 * busy, dict.fromkeys(MODELS, 1), spent, 1)
            if drafts:
                costs.drafting_took(2.0 * busy, [{TUNED: 1}], {TUNED: busy})
    assert costs.drafting_seconds([{TUNED: 1}]) == pytest.approx(2.0, rel=0.25)


def test_one_slow_forward_moves_costs_little() -> None:
    costs = ForwardCosts(Speed())
    for _ in range(50):
        costs.observe(1, 1.0)
        costs.observe(5, 1.5)
    costs.observe(5, 100.0)
    assert costs.seconds(5) < 1.75
    assert costs.seconds(1) < 1.15


def test_acceptance_counts_what_was_tried() -> None:
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe(3, 4)  # three right ones to a wrong one
    assert acceptance.right / acceptance.tried == pytest.approx(0.75, abs=0.05)
    for _ in range(100):
        acceptance.observe(4, 4)
    assert acceptance.right / acceptance.tried == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="cannot have stood"):
        acceptance.observe(2, 1)


def test_a_request_inherits_little() -> None:
    kind = Acceptance(256.0)
    assert Drafting(kind).rate is None
    for _ in range(200):
        kind.observe(4, 4)
    drafting = Drafting(kind)
    assert drafting.rate == pytest.approx(1.0)
    for _ in range(6):
        drafting.verified(0, 4)
    assert drafting.rate is not None
    assert drafting.rate < 0.45
    assert kind.right / kind.tried > 0.9


def test_shadows_come_at_first_and_when_there_is_news() -> None:
    drafting = Drafting(Acceptance())

    def gaps(right: bool, count: int) -> list[int]:
        found, since = list[int](), 0
        while len(found) < count:
            since += 1
            if drafting.due >= 1.0:
                drafting.shadowed(right)
                found.append(since)
                since = 0
            else:
                drafting.skipped()
        return found

    assert gaps(False, 10) == [1, 1, 1, 1, 1, 1, 2, 4, 8, 16]
    assert gaps(True, 4)[1:] == [4, 1, 1]


def test_kinds_are_forgotten_one_by_one() -> None:
    kinds = Kinds(most=2)
    for name in ("a", "b"):
        for _ in range(20):
            kinds.begin(name).verified(1, 1)
    kinds.begin("a")
    kinds.begin("c")
    assert kinds.begin("a").rate == 1.0
    assert kinds.begin("b").rate is None
