"""Offers, leases and holds: who keeps which models; and what the engine's residents come to as models come and go."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxyserve.engine.arena import Arena
from proxyserve.engine.offer import Lease, Offer, Offers
from proxyserve.engine.residents import Residents
from proxyserve.engine.runner import Runner
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.formats.lora import LoraModule, LoraWeights
from proxyserve.models.loading import choose_placement, load_model
from proxyserve.models.model_set import ModelSet
from proxyserve.types import ModelKey
from tests.tiny import TinyFamily

KEYS = tuple(ModelKey(name, number) for name in ("qa.tuned", "record.tuned") for number in (1, 2, 3))


def offer_of(models: ModelSet) -> Offer:
    return Offer(Catalog(models), FusionPolicy())


class FakeOffer(Offer):
    """Of models that need not exist."""

    def __init__(self, keys: frozenset[ModelKey]) -> None:
        object.__setattr__(self, "keys", keys)


def fake(*keys: ModelKey) -> Offer:
    return FakeOffer(frozenset(keys))


def test_an_offer_knows_what_it_could_run(tiny_models: ModelSet) -> None:
    assert offer_of(tiny_models).keys == {model.key for model in tiny_models.models.values()}
    assert {key.name for key in offer_of(tiny_models).keys} == {"atlas", "qa.tuned", "record.tuned", "small"}


def test_a_lease_keeps_its_offer_when_another_takes_its_place() -> None:
    old, new = fake(KEYS[0]), fake(KEYS[1])
    offers = Offers(old)
    with offers.lease() as lease:
        assert offers.replace(new) and offers.current is new
        assert lease.offer is old and offers.used(KEYS[0])
    assert not offers.used(KEYS[0])


def test_what_is_current_is_not_used_by_that_alone() -> None:
    assert not Offers(fake(KEYS[0])).used(KEYS[0])


def test_replacing_unless_something_is_held() -> None:
    old, new = fake(*KEYS[:2]), fake(KEYS[1])
    offers = Offers(old)
    offers.hold([KEYS[0]])
    assert not offers.replace(new, unless_held=[KEYS[0]]) and offers.current is old
    assert not offers.replace(new, unless_held=[KEYS[1], KEYS[0]])
    offers.release([KEYS[0]])
    with offers.lease() as lease:  # whoever prepares a request has what it needs, for as long as that takes
        assert offers.replace(new, unless_held=[KEYS[0]]) and offers.current is new
        assert offers.used(KEYS[0]) and lease.offer is old


def test_who_waits_is_told_when_the_last_user_has_gone() -> None:
    told: list[str] = []
    offers = Offers(fake(KEYS[0]))
    offers.on_release = lambda: told.append("now")
    with offers.lease(), offers.lease():
        pass
    assert not told  # the offer is the current one: nobody can be waiting for it
    first, second = offers.lease(), offers.lease()
    offers.replace(fake(KEYS[1]))
    first.__exit__(None, None, None)
    assert not told
    second.__exit__(None, None, None)
    assert told == ["now"]
    offers.hold([KEYS[0], KEYS[1]])
    offers.hold([KEYS[0]])
    offers.release([KEYS[0]])
    assert told == ["now"]
    offers.release([KEYS[0], KEYS[1]])
    assert told == ["now"] * 2


def test_a_lease_ends_with_an_error_too() -> None:
    offers = Offers(fake(KEYS[0]))
    with pytest.raises(KeyError), offers.lease():
        raise KeyError
    assert not offers.used(KEYS[0])


def test_last_uses() -> None:
    offers = Offers(fake(*KEYS))
    assert offers.last_held(KEYS[0]) == 0.0
    for key in KEYS[:2]:
        offers.hold([key])
        offers.release([key])
    assert 0.0 < offers.last_held(KEYS[0]) <= offers.last_held(KEYS[1])
    offers.touch(KEYS[:1])
    assert offers.last_held(KEYS[1]) <= offers.last_held(KEYS[0]) and not offers.used(KEYS[0])
    offers.forget(KEYS)
    assert offers.last_held(KEYS[0]) == 0.0


def test_leases_on_many_threads_are_counted_right() -> None:
    first, second = fake(KEYS[0]), fake(KEYS[1])
    offers = Offers(first)
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        ready.wait()
        for turn in range(300):
            with offers.lease() as lease:
                offers.hold(lease.offer.keys)
            if number == 0:
                offers.replace((first, second)[turn % 2])
            offers.release(lease.offer.keys)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not offers._leased and not offers._held


class OfferMachine(RuleBasedStateMachine):
    """Against lists of who has what."""

    def __init__(self) -> None:
        super().__init__()
        self.current = fake(*KEYS[:2])
        self.offers = Offers(self.current)
        self.leases: list[Lease] = []
        self.holds: list[tuple[ModelKey, ...]] = []
        self.told = 0
        self.offers.on_release = self._count

    def _count(self) -> None:
        self.told += 1

    def users(self, key: ModelKey) -> int:
        return sum(key in lease.offer.keys for lease in self.leases) + self.held(key)

    def held(self, key: ModelKey) -> int:
        return sum(key in keys for keys in self.holds)

    @rule()
    def lease(self) -> None:
        self.leases.append(self.offers.lease())
        assert self.leases[-1].offer is self.current

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 100))
    def end(self, place: int) -> None:
        lease = self.leases.pop(place % len(self.leases))
        last = all(other.offer is not lease.offer for other in self.leases)
        told = self.told + (last and lease.offer is not self.current)
        lease.__exit__(None, None, None)
        assert self.told == told

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 100), both=st.booleans())
    def hold(self, place: int, both: bool) -> None:
        keys = sorted(self.leases[place % len(self.leases)].offer.keys)
        self.holds.append(tuple(keys if both else keys[:1]))
        self.offers.hold(self.holds[-1])

    @precondition(lambda self: self.holds)
    @rule(place=st.integers(0, 100))
    def release(self, place: int) -> None:
        keys = self.holds.pop(place % len(self.holds))
        told = self.told + any(self.held(key) == 0 for key in keys)
        self.offers.release(keys)
        assert self.told == told

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1, max_size=2), unless=st.sets(st.sampled_from(KEYS)))
    def replace(self, keys: set[ModelKey], unless: set[ModelKey]) -> None:
        new = fake(*keys)
        done = self.offers.replace(new, unless_held=unless)
        assert done == all(self.held(key) == 0 for key in unless)
        if done:
            self.current = new

    @invariant()
    def agrees(self) -> None:
        assert self.offers.current is self.current
        for key in KEYS:
            assert self.offers.used(key) == (self.users(key) > 0)
            assert self.offers.held(key) == self.held(key)


TestOfferMachine = OfferMachine.TestCase
TestOfferMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# Residents ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runners(tiny_family: TinyFamily) -> list[Runner]:
    """Of the base, the untuned model and a tuned one of the same shape."""
    placement = choose_placement("cpu", "float32")
    folders = (tiny_family.base, tiny_family.untuned, tiny_family.experts["qa"])
    names = ("atlas", "small", "qa.tuned")
    return [
        Runner(load_model(folder, ModelKey(name), placement))
        for folder, name in zip(folders, names, strict=True)
    ]


def arena(runner: Runner) -> Arena:
    return Arena(runner.layout, 6, 4)


def test_models_of_one_layout_share_an_arena_which_goes_with_the_last(runners: list[Runner]) -> None:
    base, untuned, tuned = runners
    assert untuned.layout == tuned.layout != base.layout
    residents = Residents()
    residents.adopt(base, arena(base))
    alone = residents.bytes
    assert alone == base.bytes + residents.arenas[base.layout].bytes
    shared = arena(untuned)
    residents.adopt(untuned, shared)
    before = residents.runners
    residents.adopt(tuned, shared)
    assert tuned.model.key not in before, "somebody may be reading it"
    assert residents.pools[untuned.model.key] is residents.pools[tuned.model.key] is shared.pool
    assert tuned.storage is untuned.storage is shared.storage
    assert residents.bytes == alone + untuned.bytes + tuned.bytes + shared.bytes
    residents.drop(untuned.model.key)
    assert shared.layout in residents.arenas
    residents.drop(tuned.model.key)
    assert residents.arenas.keys() == {base.layout} and residents.bytes == alone
    residents.drop(tuned.model.key)  # what is not there can go
    assert residents.bytes == alone


def test_a_second_arena_of_a_layout_is_refused(runners: list[Runner]) -> None:
    _, untuned, tuned = runners
    residents = Residents()
    residents.adopt(untuned, arena(untuned))
    with pytest.raises(ValueError, match="another arena"):
        residents.adopt(tuned, arena(tuned))
    assert residents.runners.keys() == residents.pools.keys() == {untuned.model.key}


def test_what_a_model_has_published_in_the_cache_goes_with_it(runners: list[Runner]) -> None:
    _, untuned, tuned = runners
    residents, shared = Residents(), arena(untuned)
    residents.adopt(untuned, shared)
    residents.adopt(tuned, shared)
    blocks = shared.pool.allocate(4)
    for number, (block, owner) in enumerate(
        zip(blocks, [untuned.model.key, tuned.model.key] * 2, strict=True)
    ):
        shared.pool.publish(block, bytes([number]), owner)
    shared.pool.release(blocks)
    assert shared.pool.cached == 4
    residents.drop(tuned.model.key)
    shared.pool.check()
    assert shared.pool.cached == 2 and shared.pool.available == 6
    assert shared.pool.match([bytes([0])]) == [blocks[0]] and shared.pool.match([bytes([1])]) == []


def test_statistics_go_on_when_another_generation_takes_over(
    runners: list[Runner], tiny_family: TinyFamily
) -> None:
    _, untuned, tuned = runners
    residents, shared = Residents(), arena(untuned)
    residents.adopt(tuned, shared)
    tuned.stats.rows += 5
    residents.drop(tuned.model.key)
    next_one = Runner(
        load_model(tiny_family.experts["record"], ModelKey("qa.tuned", 2), choose_placement("cpu", "float32"))
    )
    residents.adopt(next_one, shared)
    assert next_one.stats is tuned.stats and residents.stats["qa.tuned"].rows == 5


def test_a_model_over_another_comes_and_goes_with_its_adapter(
    runners: list[Runner],
) -> None:
    _, untuned, _ = runners
    name = "model.layers.0.self_attn.q_proj"
    down, up = torch.zeros(2, 32), torch.zeros(2, 32).t()
    weights = LoraWeights(2, {name: LoraModule(down, up)}, 2 * 2 * 32 * 4)
    over = replace(
        untuned.model, key=ModelKey("qa.tuned"), over=untuned.model, adapter=weights, bytes=weights.bytes
    )
    residents = Residents()
    residents.drop_over(over)  # never came, like its trunk
    residents.adopt(untuned, arena(untuned))
    residents.drop_over(over)
    alone = residents.bytes
    residents.adopt_over(over)
    assert residents.bytes == alone + weights.bytes and over.key in untuned.adapters
    residents.drop_over(over)
    assert residents.bytes == alone and len(untuned.adapters) == 0
