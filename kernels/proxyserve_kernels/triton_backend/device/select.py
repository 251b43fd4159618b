"""The best tokens of a row in order, and from them what the filters keep and the lists of likeliest tokens.

`best_tokens` sorts the blocks by their maxima and opens them best first: what it has not opened is known to be no
better than the next maximum. The tokens at least as good as the worst opened maximum go to a buffer, which is sorted.
With them it finds the last kept token as `torch_backend.filters` does. A row whose last token is not among them for
certain (a flat law with a large nucleus, or ties across the edge) is flagged, and found by bisection over the 2**32
possible scores. Nothing is approximate, so the two give the same token whichever a row goes through.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxyserve_kernels.triton_backend.device.layout import (
    FILTERED,
    FLAGS,
    LISTED_PROCESSED,
    LISTED_RAW,
    LOG2E,
    LOG_MIN_P,
    PROCESSED,
    PROCESSED_MAX,
    RAW,
    RAW_MAX,
    TOKENS,
    TOP_K,
    TOP_P,
    WIDTH,
)
from proxyserve_kernels.triton_backend.device.sorting import sort_descending
from proxyserve_kernels.triton_backend.device.tiles import (
    block_offsets,
    law_tile,
    ordered,
    packed,
    packed_index,
    packed_score,
    unordered,
)

#: Least `packed` key there is: an empty place in a buffer.
EMPTY = tl.constexpr(-(2**63))


@triton.jit
def opened_blocks(order, place, opened):
    """Block numbers at `place` of the sorted `order`; 0, a block that can be read, from `opened` on."""
    keys = tl.load(order + place, mask=place < opened, other=0)
    return tl.where(place < opened, packed_index(keys), 0)


@triton.jit
def collect(
    ints,
    floats,
    order,
    buffer,
    opened,
    threshold,
    last,
    room,
    peak,
    GROUP: tl.constexpr,
    LAW: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Write the keys of tokens from (threshold, last) upwards, found in the first `opened` blocks of `order`, to
    `buffer`. Returns (how many there are, the sum of exp(score - peak) over them as float64); stops above `room`."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    start = tl.zeros([], tl.int32)
    while (start < opened) & (count <= room):
        place = start + tl.arange(0, GROUP)
        offsets = block_offsets(opened_blocks(order, place, opened))
        score = law_tile(ints, floats, offsets, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST)
        kept = (score > threshold) | ((score == threshold) & (offsets <= last))
        kept = kept & (score > float("-inf")) & (place < opened)[:, None]
        flat = kept.reshape([GROUP * TOKENS]).to(tl.int32)
        at = count + tl.cumsum(flat, axis=0) - 1
        keys = packed(score, offsets).reshape([GROUP * TOKENS])
        tl.store(buffer + at, keys, mask=(flat != 0) & (at < room))
        weight = tl.where(kept, tl.exp2((score - peak) * LOG2E), 0.0)
        mass += tl.sum(tl.sum(weight, axis=1).to(tl.float64), axis=0)
        count += tl.sum(flat, axis=0)
        start += GROUP
    return count, mass


@triton.jit
def store_list(keys, count, wanted, ids, values, ROOM: tl.constexpr, LIST: tl.constexpr):
    """The first `wanted` of sorted `keys` [ROOM] as ids int64 and scores float32 [LIST]."""
    place = tl.arange(0, ROOM)
    listed = (place < wanted) & (place < count)
    inside = place < LIST
    tl.store(ids + place, tl.where(listed, packed_index(keys).to(tl.int64), -1), mask=inside)
    tl.store(values + place, tl.where(listed, packed_score(keys), float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def best_tokens(
    ints,
    floats,
    stats,
    orders,
    buffers,
    thresholds,
    lasts,
    unsure,
    list_ids,
    list_values,
    int_stride,
    float_stride,
    blocks,
    plane,
    LAW: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    LIST: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Grid (rows). Writes (thresholds float32, lasts int64): the last token that the filters keep (PROCESSED only);
    the list of best tokens; and unsure int32: bit 0 if the last kept token is left to `search_last`, bit 1 if the list
    is left to `search_list`.

    `orders` int64 [rows, BLOCKS] and `buffers` int64 [rows, ROOM] are scratch."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    floats += row * float_stride
    filtered = (tl.load(ints + FLAGS) & FILTERED) != 0
    if LAW == RAW:
        filtered = filtered & False
        wanted = tl.load(ints + LISTED_RAW).to(tl.int32)
        stats += RAW_MAX * plane + row * blocks
    else:
        wanted = tl.load(ints + LISTED_PROCESSED).to(tl.int32)
        stats += PROCESSED_MAX * plane + row * blocks
    tl.store(unsure + row, 0)
    if LAW == PROCESSED:
        tl.store(thresholds + row, float("-inf"))
        tl.store(lasts + row, tl.full([], 0x7FFFFFFF, tl.int64))
    if LIST > 0:
        place = tl.arange(0, ROOM)
        tl.store(list_ids + row * LIST + place, tl.full([ROOM], -1, tl.int64), mask=place < LIST)
        tl.store(
            list_values + row * LIST + place, tl.full([ROOM], float("-inf"), tl.float32), mask=place < LIST
        )
    if (tl.load(ints + WIDTH) == 0) | ((filtered == 0) & (wanted == 0)):
        return
    orders += row * BLOCKS
    buffers += row * ROOM

    block = tl.arange(0, BLOCKS)
    maxima = tl.load(stats + block, mask=block < blocks, other=float("-inf"))
    sums = tl.load(stats + plane + block, mask=block < blocks, other=0.0)
    peak = tl.max(maxima, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum((sums * tl.exp2((maxima - safe) * LOG2E)).to(tl.float64), axis=0)
    if (total != total) | (peak == float("-inf")):
        return  # a bad row; `pick` flags it
    possible = tl.sum((maxima > float("-inf")).to(tl.int32), axis=0)
    tl.store(orders + block, sort_descending(packed(maxima, block)))
    tl.debug_barrier()  # the order is read back by other threads

    top_k = tl.where(filtered, tl.load(ints + TOP_K), 0).to(tl.int32)
    share = tl.load(floats + TOP_P)
    floor = safe + tl.load(floats + LOG_MIN_P)
    has_floor = filtered & (floor > float("-inf"))
    unlimited = (top_k == 0) & (has_floor == 0)

    # What a filter keeps must not depend on how long a list some other row of the batch wants, so that has no say here:
    # a list that comes out too short is left to `search_list`, whose result is the same.
    need = tl.maximum(tl.where(filtered, tl.minimum(top_k, ROOM), wanted), 8)
    opened = tl.minimum(need, possible)
    # The tokens at least as good as the worst opened maximum; at last, with all blocks open, every token.
    everything = possible == 0
    count = tl.zeros([], tl.int32)
    fits, spills = tl.zeros([], tl.int32), possible + 1
    going = possible > 0
    while going:
        worst = packed_score(tl.load(orders + opened - 1))
        bound = tl.where(everything, float("-inf"), worst)
        count, mass = collect(
            ints, floats, orders, buffers, opened, bound, 0x7FFFFFFF, ROOM, safe,
            GROUP, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST,
        )  # fmt: skip
        enough = (top_k > 0) & (count >= top_k)
        enough = enough | (has_floor & (bound < floor))
        enough = enough | (unlimited & (mass >= share.to(tl.float64) * total))
        enough = tl.where(filtered, enough, count >= wanted)
        # Open twice as many, or, once there were more than the buffer takes, a number between.
        spilled = count > ROOM
        spills = tl.where(spilled, opened, spills)
        fits = tl.where(spilled, fits, opened)
        following = tl.where(spills > possible, tl.minimum(opened * 2, possible), (fits + spills) // 2)
        last_chance = (following == opened) & (opened == possible) & (spilled == 0)
        going = (enough == 0) | spilled
        going = going & (everything == 0) & (last_chance | (following != fits))
        everything = everything | (going & last_chance)
        opened = tl.where(going, following, opened)
    tl.debug_barrier()

    if count > ROOM:
        tl.store(unsure + row, filtered.to(tl.int32) + 2 * (wanted > 0).to(tl.int32))
        return
    # A token that is not in the buffer is worse than all that are, unless it ties with the worst of them in a block
    # that was not opened.
    beyond = tl.where(
        opened < possible, packed_score(tl.load(orders + tl.minimum(opened, BLOCKS - 1))), float("-inf")
    )
    place = tl.arange(0, ROOM)
    keys = sort_descending(tl.load(buffers + place, mask=place < count, other=EMPTY))
    scores = packed_score(keys)
    missing = tl.zeros([], tl.int32)
    if LIST > 0:
        store_list(keys, count, wanted, list_ids + row * LIST, list_values + row * LIST, ROOM, LIST)
        worst = tl.sum(tl.where(place == tl.minimum(wanted, count) - 1, scores, 0.0), axis=0)
        listed = (count >= wanted) & (worst > beyond)
        missing += tl.where((wanted > 0) & (listed == 0), 2, 0)
    if LAW == PROCESSED:
        if filtered:
            survives = (place < count) & (scores >= floor) & ((top_k == 0) | (place < top_k))
            survivors = tl.sum(survives.to(tl.int32), axis=0)
            weight = tl.where(survives, tl.exp2((scores - safe) * LOG2E), 0.0).to(tl.float64)
            level = tl.cumsum(weight, axis=0)
            whole = tl.where(unlimited, total, tl.sum(weight, axis=0))
            # A top-p of 1 keeps also what is too small to count in the sum.
            goal = tl.where(share >= 1.0, float("inf"), share).to(tl.float64) * whole
            below = (level - weight) < goal
            kept = survives & below
            final = tl.maximum(tl.sum(kept.to(tl.int32), axis=0), 1) - 1
            threshold = tl.sum(tl.where(place == final, scores, 0.0), axis=0)
            last = tl.sum(tl.where(place == final, packed_index(keys), 0), axis=0)
            # Known if the list holds a token beyond what survives the limits, or beyond the nucleus.
            kept_mass = tl.sum(tl.where(place == final, level, 0.0), axis=0)
            in_limits = (survivors < count) | ((top_k > 0) & (survivors == top_k))
            in_nucleus = kept_mass >= goal
            reached = everything | tl.where(unlimited, in_nucleus, in_limits)
            tl.store(thresholds + row, threshold)
            tl.store(lasts + row, last.to(tl.int64))
            missing += tl.where(reached & (threshold > beyond), 0, 1)
    tl.store(unsure + row, missing)


@triton.jit
def weigh(
    ints, floats, order, opened, first, second, third, alive, alive_last, peak,
    MASS: tl.constexpr, GROUP: tl.constexpr, LAW: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr,
    LAWS: tl.constexpr, GENERAL: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """Weight of the tokens with keys from `first`, `second`, `third` upwards, float64 each: their number, or with MASS
    the sum of exp(score - peak). Only tokens from (alive, alive_last) upwards count."""
    first, second, third = first.to(tl.int32), second.to(tl.int32), third.to(tl.int32)
    one, two, three = tl.zeros([], tl.float64), tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    start = tl.zeros([], tl.int32)
    while start < opened:
        place = start + tl.arange(0, GROUP)
        offsets = block_offsets(opened_blocks(order, place, opened))
        score = law_tile(ints, floats, offsets, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST)
        living = (score > alive) | ((score == alive) & (offsets <= alive_last))
        living = living & (score > float("-inf")) & (place < opened)[:, None]
        weight = tl.where(living, 1.0, 0.0)
        if MASS:
            weight = tl.where(living, tl.exp2((score - peak) * LOG2E), 0.0)
        key = ordered(score)
        one += tl.sum(tl.sum(tl.where(key >= first, weight, 0.0), axis=1).to(tl.float64), axis=0)
        two += tl.sum(tl.sum(tl.where(key >= second, weight, 0.0), axis=1).to(tl.float64), axis=0)
        three += tl.sum(tl.sum(tl.where(key >= third, weight, 0.0), axis=1).to(tl.float64), axis=0)
        start += GROUP
    return one, two, three


@triton.jit
def reach(
    ints, floats, order, block_keys, blocks, target, alive, alive_last, peak,
    MASS: tl.constexpr, GROUP: tl.constexpr, LAW: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr,
    LAWS: tl.constexpr, GENERAL: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """(score, id) of the first token, best first, up to which the weight of the living sums to `target`."""
    low = tl.full([], -(2**31), tl.int64)
    high = ordered(peak + 0.0).to(tl.int64)
    while low < high:
        # Three pivots a pass: low < first <= second <= third <= high.
        step = (high - low + 3) // 4
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        opened = tl.sum((block_keys.to(tl.int64) >= first).to(tl.int32), axis=0)
        one, two, three = weigh(
            ints, floats, order, opened, first, second, third, alive, alive_last, peak,
            MASS, GROUP, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST,
        )  # fmt: skip
        new_low = tl.where(one >= target, first, low)
        new_low = tl.where(two >= target, second, new_low)
        new_low = tl.where(three >= target, third, new_low)
        new_high = tl.where(three >= target, high, third - 1)
        new_high = tl.where(two >= target, new_high, second - 1)
        new_high = tl.where(one >= target, new_high, first - 1)
        low, high = new_low, new_high
    score = unordered(low.to(tl.int32))
    # Tied tokens have one weight. Take as many of them, lowest ids first, as are needed.
    opened = tl.sum((block_keys.to(tl.int64) >= low).to(tl.int32), axis=0)
    tied, above, _ = weigh(
        ints, floats, order, opened, low, low + 1, low + 1, alive, alive_last, peak,
        MASS, GROUP, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST,
    )  # fmt: skip
    each = tl.full([], 1.0, tl.float64)
    if MASS:
        each = tl.exp2((score - peak) * LOG2E).to(tl.float64)
    # The quotient from a division in float32, put right in float64; one in float64 would be a call that spills.
    rest = target - above
    quotient = tl.ceil(rest.to(tl.float32) / each.to(tl.float32)).to(tl.float64) - 1.0
    for _ in tl.static_range(3):
        quotient += tl.where(quotient * each < rest, 1.0, 0.0)
    needed = tl.maximum(quotient, 1.0).to(tl.int32)
    seen = tl.zeros([], tl.int32)
    last = tl.full([], -1, tl.int32)
    start = tl.zeros([], tl.int32)
    while (start < blocks) & (seen < needed):
        offsets = block_offsets(start + tl.arange(0, GROUP))
        value = law_tile(ints, floats, offsets, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST)
        living = (value > alive) | ((value == alive) & (offsets <= alive_last))
        hit = ((value == score) & living).reshape([GROUP * TOKENS]).to(tl.int32)
        rank = seen + tl.cumsum(hit, axis=0)
        ids = offsets.reshape([GROUP * TOKENS])
        # Rounding may leave fewer ties than are needed; then all of them are kept.
        last = tl.maximum(last, tl.max(tl.where((hit != 0) & (rank <= needed), ids, -1), axis=0))
        seen += tl.sum(hit, axis=0)
        start += GROUP
    return score, last


@triton.jit
def block_peaks(stats, blocks, BLOCKS: tl.constexpr):
    """(highest maximum, number of blocks that have any token, ordered keys of the maxima int32 [BLOCKS]) of a row."""
    block = tl.arange(0, BLOCKS)
    maxima = tl.load(stats + block, mask=block < blocks, other=float("-inf"))
    possible = tl.sum((maxima > float("-inf")).to(tl.int32), axis=0)
    return tl.max(maxima, axis=0), possible, ordered(maxima)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def search_last(
    ints, floats, stats, orders, thresholds, lasts, unsure, int_stride, float_stride, blocks, plane,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr,
    LAWS: tl.constexpr, GENERAL: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """K3, grid (rows): the last kept token of the rows for which `best_tokens` did not find it, by bisection. Always
    launched, so that the sequence of launches does not depend on the data; other rows leave at once."""
    row = tl.program_id(0).to(tl.int64)
    if (tl.load(unsure + row) & 1) == 0:
        return
    ints += row * int_stride
    floats += row * float_stride
    orders += row * BLOCKS
    peak, possible, block_keys = block_peaks(stats + PROCESSED_MAX * plane + row * blocks, blocks, BLOCKS)
    lowest = tl.full([], -(2**31), tl.int64)
    alive = peak + tl.load(floats + LOG_MIN_P)
    alive_last = tl.full([], 0x7FFFFFFF, tl.int32)
    count, _, _ = weigh(
        ints, floats, orders, possible, lowest, lowest, lowest, alive, alive_last, peak,
        False, GROUP, PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST,
    )  # fmt: skip
    top_k = tl.load(ints + TOP_K)
    # Also where nothing is cut off by number, if min-p alone filters: the last living token is the last kept one.
    if (top_k > 0) | (tl.load(floats + TOP_P) >= 1.0):
        limit = tl.where(top_k == 0, count, tl.minimum(top_k.to(tl.float64), count))
        alive, alive_last = reach(
            ints, floats, orders, block_keys, blocks, limit, alive, alive_last, peak,
            False, GROUP, PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST,
        )  # fmt: skip
    share = tl.load(floats + TOP_P)
    if share < 1.0:
        mass, _, _ = weigh(
            ints, floats, orders, possible, lowest, lowest, lowest, alive, alive_last, peak,
            True, GROUP, PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST,
        )  # fmt: skip
        alive, alive_last = reach(
            ints, floats, orders, block_keys, blocks, share.to(tl.float64) * mass, alive, alive_last, peak,
            True, GROUP, PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST,
        )  # fmt: skip
    tl.store(thresholds + row, alive)
    tl.store(lasts + row, alive_last.to(tl.int64))


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def search_list(
    ints, floats, stats, orders, buffers, unsure, list_ids, list_values, int_stride, float_stride, blocks, plane,
    LAW: tl.constexpr, BLOCKS: tl.constexpr, ROOM: tl.constexpr, LIST: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr, LAWS: tl.constexpr, GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):  # fmt: skip
    """As `search_last`, for the lists of best tokens: finds the last one listed, then collects and sorts."""
    row = tl.program_id(0).to(tl.int64)
    if (tl.load(unsure + row) & 2) == 0:
        return
    ints += row * int_stride
    floats += row * float_stride
    orders += row * BLOCKS
    buffers += row * ROOM
    if LAW == RAW:
        stats += RAW_MAX * plane
        wanted = tl.load(ints + LISTED_RAW).to(tl.int32)
    else:
        stats += PROCESSED_MAX * plane
        wanted = tl.load(ints + LISTED_PROCESSED).to(tl.int32)
    peak, possible, block_keys = block_peaks(stats + row * blocks, blocks, BLOCKS)
    lowest = tl.full([], -(2**31), tl.int64)
    count, _, _ = weigh(
        ints, floats, orders, possible, lowest, lowest, lowest, float("-inf"), 0x7FFFFFFF, peak,
        False, GROUP, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST,
    )  # fmt: skip
    score, last = reach(
        ints, floats, orders, block_keys, blocks, tl.minimum(wanted.to(tl.float64), count), float("-inf"), 0x7FFFFFFF,
        peak, False, GROUP, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST,
    )  # fmt: skip
    found, _ = collect(
        ints, floats, orders, buffers, possible, score, last, ROOM, peak,
        GROUP, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST,
    )  # fmt: skip
    tl.debug_barrier()
    place = tl.arange(0, ROOM)
    keys = sort_descending(tl.load(buffers + place, mask=place < found, other=EMPTY))
    store_list(keys, found, wanted, list_ids + row * LIST, list_values + row * LIST, ROOM, LIST)
