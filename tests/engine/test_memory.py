"""The memory plan against its definition, over many sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxyserve.config import EngineConfig
from proxyserve.engine.arena import Arena, Layout
from proxyserve.engine.kv_storage import LayerShape
from proxyserve.engine.memory import (
    Tenants,
    blocks_of_new_arena,
    kv_budget,
    least_arena_bytes,
    memory_limit,
    plan_arenas,
    scoring_bytes,
    spelled,
)
from proxyserve.errors import LoadError, NoRoom
from proxyserve.models.model_set import ModelSet

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)

shapes = st.builds(
    LayerShape, heads=st.integers(1, 3), key_size=st.integers(1, 8), value_size=st.integers(1, 8)
)
layouts = st.builds(
    Layout,
    shapes=st.lists(shapes, min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    device=st.just(CPU),
)
tenants = st.builds(Tenants, models=st.integers(1, 40), context=st.integers(1, 300))
block_sizes = st.integers(1, 32)
batches = st.integers(1, 16)


def layout_of(layers: int, dtype: torch.dtype = torch.float32) -> Layout:
    return Layout((LayerShape(2, 8, 8),) * layers, dtype, CPU)


@given(layouts, block_sizes)
def test_a_layout_says_what_its_blocks_take(layout: Layout, block_size: int) -> None:
    arena = Arena(layout, 3, block_size)
    assert arena.bytes == 3 * layout.block_bytes(block_size)
    assert arena.tokens == 3 * block_size


# The plan at start-up -------------------------------------------------------------------------------------------


@given(st.dictionaries(layouts, tenants, min_size=1, max_size=4), st.integers(0, 10**6), block_sizes, batches)
def test_every_lane_gets_as_many_blocks_as_the_budget_allows(
    groups: dict[Layout, Tenants], budget: int, block_size: int, max_batch: int
) -> None:
    lanes = {layout: min(group.models, 3) for layout, group in groups.items()}
    of_all = sum(layout.block_bytes(block_size) * lanes[layout] for layout in groups)

    def plan(budget: int) -> dict[Layout, int]:
        return plan_arenas(groups, budget=budget, block_size=block_size, max_batch=max_batch)

    if budget < 2 * of_all:
        with pytest.raises(LoadError) as caught:
            plan(budget)
        (enough,) = re.findall(r"at least (\d+) bytes", caught.value.message)
        assert set(plan(int(enough))) == set(groups)
        with pytest.raises(LoadError):
            plan(int(enough) - 1)
        return
    blocks = plan(budget)
    assert sum(count * layout.block_bytes(block_size) for layout, count in blocks.items()) <= budget
    per_lane = {layout: count // lanes[layout] for layout, count in blocks.items()}
    full = {layout: max_batch * -(-group.context // block_size) for layout, group in groups.items()}
    for layout, count in blocks.items():
        assert count == per_lane[layout] * lanes[layout]  # the same for each lane
        # One block more for every lane is either useless or too much.
        assert per_lane[layout] == full[layout] or (per_lane[layout] + 1) * of_all > budget
    short = [per_lane[layout] for layout in groups if per_lane[layout] < full[layout]]
    assert len(set(short)) <= 1


def test_the_hundredth_model_of_a_layout_takes_no_more_blocks() -> None:
    plans = [
        plan_arenas({layout_of(2): Tenants(models, 128)}, budget=10**7, block_size=16, max_batch=4)
        for models in (1, 2, 3, 4, 100)
    ]
    assert [*plans[0].values()] == [32]
    assert [*plans[1].values()] == [64]
    assert plans[2] == plans[3] == plans[4] == {layout_of(2): 96}


def test_no_models_need_no_blocks() -> None:
    assert plan_arenas({}, budget=0, block_size=16, max_batch=4) == {}


# An arena that comes later --------------------------------------------------------------------------------------


@given(
    layouts,
    st.integers(1, 300),
    st.none() | st.integers(2, 400),
    st.integers(-1000, 10**6),
    block_sizes,
    batches,
)
def test_a_new_arena_holds_two_lanes_and_stays_in_its_room(
    layout: Layout, context: int, wanted: int | None, room: int, block_size: int, max_batch: int
) -> None:
    least = least_arena_bytes(layout, context, block_size, wanted)

    def blocks(room: int) -> int:
        return blocks_of_new_arena(
            layout, context, wanted=wanted, room=room, block_size=block_size, max_batch=max_batch
        )

    contexts = -(-context // block_size)
    per_lane = contexts if wanted is None else min(contexts, wanted)
    assert least == 2 * per_lane * layout.block_bytes(block_size)
    if room < least:
        with pytest.raises(NoRoom, match=re.escape(spelled([least])[0])):
            blocks(room)
    else:
        count = blocks(room)
        assert least <= count * layout.block_bytes(block_size) <= room
        most = 2 * min(max_batch * contexts, wanted or max_batch * contexts)
        assert count == most or (count + 1) * layout.block_bytes(block_size) > room
    assert blocks(least) * layout.block_bytes(block_size) == least


# Sizes of machines ----------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_what_there_is() -> None:
    assert kv_budget(CPU, 12345) == memory_limit(CPU, 12345) == 12345


def test_what_scoring_takes_is_set_aside(tiny_models: ModelSet) -> None:
    one = EngineConfig(max_batch=4, max_scored_rows=100)
    width = tiny_models.base.vocabulary.size
    assert scoring_bytes(tiny_models.base, one) >= 4 * width * (100 + 4)
    more = scoring_bytes(tiny_models.base, replace(one, max_scored_rows=101)) - scoring_bytes(
        tiny_models.base, one
    )
    assert more == 4 * width
    assert kv_budget(CPU, None) - kv_budget(CPU, None, 4567) == 4567
    assert memory_limit(CPU, None) - memory_limit(CPU, None, 4567) == 4567
    assert kv_budget(CPU, 12345, 4567) == memory_limit(CPU, 12345, 4567) == 12345


def test_defaults_are_parts_of_the_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    assert kv_budget(CPU, None) <= min(0.3 * total, 2 * 2**30)
    assert kv_budget(CPU, None) > 0
    assert 0.5 * total < memory_limit(CPU, None) < 0.95 * total


def test_sizes_for_people() -> None:
    assert spelled([0, 1023, 1024, 1536, 2**20, 2**30, 3 * 2**40]) == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "1.0 GiB",
        "3072.0 GiB",
    ]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_that_store_alike_are_one(layers: int, dtype: torch.dtype) -> None:
    assert layout_of(layers, dtype) == layout_of(layers, dtype)
    assert len({layout_of(count, kind) for count in (1, 2) for kind in DTYPES}) == 4
