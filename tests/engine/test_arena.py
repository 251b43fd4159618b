"""Arenas: which models share one, when one comes and when it goes, and that nothing crosses from model to model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from proxyserve.engine.arena import Arena
from proxyserve.engine.engine import Engine
from proxyserve.engine.offer import Offer
from proxyserve.engine.runner import Runner
from proxyserve.errors import InvalidRequest, LoadError, NoRoom
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.model_set import ModelSet
from proxyserve.types import ModelKey
from tests.engine.driver import Collected, run, submission
from tests.experts.shelf import Shelf, load_expert, make_engine, make_library, make_shelf, save_tiny, tune

PROMPT = [5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45, 300, 12, 77, 140, 9, 1, 350, 211, 6]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf = make_shelf(tmp_path_factory.mktemp("shelf"), "llama")
    save_tiny(shelf.root / "deep", "llama", seed=7, layers=3)
    tune(shelf.root / "deep-qa", shelf.root / "deep", seed=8)
    return shelf


@pytest.fixture
def library(shelf: Shelf) -> Library:
    return make_library(shelf.base)


def bring(library: Library, shelf: Shelf, *names: str) -> list[LoadedExpert]:
    return [load_expert(library, name, shelf.specs[name], shelf.root) for name in names]


DEEP = ExpertSpec(Source("deep-qa"), Source("deep"))


def adopt(engine: Engine, loaded: LoadedExpert, *, room: int = 2**24) -> None:
    arenas = dict(engine.residents.arenas)
    for runner in loaded.fresh:
        if runner.layout not in arenas:
            arenas[runner.layout] = engine.new_arena(runner, room)
    engine.adopt([(runner, arenas[runner.layout]) for runner in loaded.fresh], loaded.over_trunks)


def offer(engine: Engine, experts: Iterable[LoadedExpert]) -> None:
    current = engine.offers.current
    models = ModelSet(current.catalog.models.base, [loaded.expert for loaded in experts])
    engine.offers.replace(Offer(replace(current.catalog, models=models), current.policy))


def drop(engine: Engine, library: Library, loaded: LoadedExpert) -> None:
    engine.drop(loaded.over_trunks, library.release(loaded))


def ask(engine: Engine, name: str, request_id: str = "r") -> Collected:
    return run(engine, [submission(request_id, PROMPT, {name: 1.0}, logprobs=0)])[f"{request_id}/0"]


def test_models_of_one_layout_share_an_arena(shelf: Shelf, library: Library) -> None:
    engine = make_engine(library, bring(library, shelf, "folder", "lora", "diff", "packed", "overbase"))
    pools = {key.name: pool for key, pool in engine.pools.items()}
    small = {"small", "folder.tuned", "diff.tuned", "packed.tuned"}
    assert set(pools) == {"atlas", *small}  # adapters take none
    assert len({id(pools[name]) for name in small}) == 1
    assert pools["atlas"] is not pools["small"]
    assert len(engine.residents.arenas) == 2
    for runner in engine.runners.values():
        assert isinstance(runner, Runner)
        assert runner.storage is engine.residents.arenas[runner.layout].storage


def test_an_arena_comes_with_its_first_model_and_goes_with_its_last(shelf: Shelf, library: Library) -> None:
    first = bring(library, shelf, "lora")
    engine = make_engine(library, first)
    before = engine.residents.bytes
    arenas = dict(engine.residents.arenas)
    deep = load_expert(library, "deep", DEEP, shelf.root)
    adopt(engine, deep)
    offer(engine, [*first, deep])
    layout = deep.fresh[0].layout
    assert set(engine.residents.arenas) == {*arenas, layout}
    assert engine.residents.bytes == before + deep.bytes + engine.residents.arenas[layout].bytes
    # Each of its two lanes has the blocks that the other arenas' lanes have.
    assert engine.residents.arenas[layout].pool.num_blocks == 2 * (engine.blocks_per_lane or 0)
    ask(engine, "deep")
    offer(engine, first)
    drop(engine, library, deep)
    assert engine.residents.arenas == arenas
    assert engine.residents.bytes == before
    assert set(engine.runners) == {ModelKey("atlas"), ModelKey("small")} == set(engine.pools)


def test_nothing_is_left_after_many_swaps(shelf: Shelf, library: Library) -> None:
    """Weights, adapters, hooks and blocks of generations that went; counters go on."""
    stays = bring(library, shelf, "lora")
    engine = make_engine(library, stays)
    ask(engine, "lora")
    before = engine.residents.bytes
    steps = engine.counters.steps
    answers: dict[str, set[tuple[int, ...]]] = {}
    for generation in range(2, 8):
        for name, spec in (
            ("folder", shelf.specs["folder"]),
            ("third", shelf.specs["third"]),
            ("deep", DEEP),
        ):
            loaded = load_expert(library, name, spec, shelf.root, generation=generation)
            adopt(engine, loaded)
            offer(engine, [*stays, loaded])
            answers.setdefault(name, set()).add(tuple(ask(engine, name).tokens))
            offer(engine, stays)
            drop(engine, library, loaded)
            assert engine.residents.bytes == before
            engine.check()
    assert all(len(texts) == 1 for texts in answers.values())
    assert engine.counters.steps > steps
    trunk = engine.runners[ModelKey("small")]
    assert isinstance(trunk, Runner) and len(trunk.adapters) == 1


def test_cached_prefixes_never_cross_generations(shelf: Shelf, library: Library) -> None:
    """Two generations of one name, one arena, one prompt: the second one finds nothing of the first."""
    first = load_expert(library, "qa", shelf.specs["folder"], shelf.root)
    engine = make_engine(library, [first], block_size=4)
    one = ask(engine, "qa", "a")
    spec = ExpertSpec(Source("record"), Source("small"))
    second = load_expert(library, "qa", spec, shelf.root, generation=2)
    adopt(engine, second)
    offer(engine, [second])
    two = ask(engine, "qa", "b")
    assert one.last and two.last and one.last.usage and two.last.usage and two.last.fusion
    assert two.last.fusion.generations == {"qa": 2}
    lanes = two.last.usage.lane_tokens
    assert lanes["qa.tuned"] == one.last.usage.lane_tokens["qa.tuned"]  # all of it was computed
    assert lanes["small"] < one.last.usage.lane_tokens["small"]  # this one has not changed
    alone = make_library(shelf.base)
    fresh = make_engine(alone, [load_expert(alone, "qa", spec, shelf.root)])
    assert ask(fresh, "qa").tokens == two.tokens != one.tokens


def test_an_adapter_that_comes_again_finds_nothing_of_the_one_before(shelf: Shelf, library: Library) -> None:
    """As when a parked expert wakes: the same key, and blocks that others have had meanwhile."""
    stays = bring(library, shelf, "folder")
    engine = make_engine(library, stays, block_size=4)
    for _ in range(2):
        loaded = load_expert(library, "lora", shelf.specs["lora"], shelf.root)
        adopt(engine, loaded)
        offer(engine, [*stays, loaded])
        answer = ask(engine, "lora")
        assert answer.last and answer.last.usage
        assert answer.last.usage.lane_tokens["lora.tuned"] == len(PROMPT) + 11
        offer(engine, stays)
        drop(engine, library, loaded)


def test_blocks_of_a_model_that_left_serve_its_successor(shelf: Shelf, library: Library) -> None:
    """An arena whose blocks are all cached for models that are gone still holds a whole request."""
    stays = bring(library, shelf, "lora")
    engine = make_engine(library, stays, block_size=4, kv_memory=150_000)
    for generation in range(1, 6):
        loaded = load_expert(library, "folder", shelf.specs["folder"], shelf.root, generation=generation)
        adopt(engine, loaded)
        offer(engine, [*stays, loaded])
        for number in range(4):
            prompt = [number + generation, *PROMPT]
            result = run(engine, [submission(f"{generation}.{number}", prompt, {"folder": 1.0})])
            assert len(result[f"{generation}.{number}/0"].tokens) == 12
        offer(engine, stays)
        pool = engine.pools[ModelKey("small")]
        cached = pool.cached
        drop(engine, library, loaded)
        assert pool.cached < cached  # nobody will ever look for them
        assert all(pool.in_use == 0 for pool in engine.pools.values())


def test_a_layout_has_one_arena(shelf: Shelf, library: Library) -> None:
    engine = make_engine(library, bring(library, shelf, "lora"))
    loaded = load_expert(library, "folder", shelf.specs["folder"], shelf.root)
    (runner,) = loaded.fresh
    with pytest.raises(ValueError, match="another arena"):
        engine.adopt([(runner, Arena(runner.layout, 4, 16))])
    assert runner.model.key not in engine.runners


def test_an_arena_for_which_there_is_no_room(shelf: Shelf, library: Library) -> None:
    engine = make_engine(library, bring(library, shelf, "lora"))
    deep = load_expert(library, "deep", DEEP, shelf.root)
    least = 2 * (256 // 16) * deep.fresh[0].layout.block_bytes(16)
    with pytest.raises(NoRoom, match="need at least"):
        engine.new_arena(deep.fresh[0], least - 1)
    assert engine.new_arena(deep.fresh[0], least).bytes == least
    assert deep.fresh[0].layout not in engine.residents.arenas  # nobody has adopted it


def test_a_kv_budget_that_is_too_small_says_what_would_do(shelf: Shelf, library: Library) -> None:
    loaded = bring(library, shelf, "lora", "folder")
    with pytest.raises(LoadError, match=r"at least (\d+) bytes") as caught:
        make_engine(library, loaded, kv_memory=1000)
    enough = int(caught.value.message.split("at least ")[1].split()[0])
    engine = make_engine(library, loaded, kv_memory=enough)
    assert sum(arena.bytes for arena in engine.residents.arenas.values()) == enough
    with pytest.raises(LoadError):
        make_engine(library, loaded, kv_memory=enough - 1)


def test_a_request_that_would_never_fit_is_refused_at_once(shelf: Shelf, library: Library) -> None:
    """Its lanes share an arena, so each has a part of it."""
    engine = make_engine(library, bring(library, shelf, "lora", "folder"), kv_memory=120_000)
    with pytest.raises(InvalidRequest, match="KV memory") as caught:
        engine.submit(submission("r", PROMPT, {"lora": 1.0}, max_tokens=200))
    assert caught.value.code == "context_length_exceeded"
    room = int(caught.value.message.split("prompt and ")[1].split()[0])
    result = run(engine, [submission("s", PROMPT, {"lora": 1.0}, max_tokens=room)])
    assert len(result["s/0"].tokens) == room
    with pytest.raises(InvalidRequest):
        engine.submit(submission("t", PROMPT, {"lora": 1.0}, max_tokens=room + 1))


def test_contexts_of_all_sizes_fit_one_plan(shelf: Shelf, tmp_path: Path) -> None:
    """The base's and the experts' arenas give each lane the same blocks, as far as contexts go."""
    library = make_library(shelf.base)
    engine = make_engine(library, bring(library, shelf, "folder"), max_batch=2, kv_memory=2**26)
    for key, model in engine.models.models.items():
        assert isinstance(model, LoadedModel)
        assert engine.pools[key].num_blocks == 2 * (256 // 16) * (1 if key.name == "atlas" else 2)
