"""Device functions that form fused scores in registers: the inside of every kernel.

A tile is a set of whole blocks of 256 tokens of one row: `offsets` int32 [n, 256] are the token ids. `ints` and
`floats` point at the row's entries in the table. Everything is float32 from the load on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxyserve_kernels.triton_backend.device.layout import (
    BASE,
    BASE_SHIFT,
    BASE_WEIGHT,
    BF16,
    BIAS,
    CLIP_AT,
    COUNTS,
    FLAGS,
    FLOATS_PER_TERM,
    FP16,
    FP32,
    FREQUENCY,
    FUSED_LAW,
    INTS_PER_LAW,
    INTS_PER_TERM,
    LOG2E,
    MASK,
    MASK_WORDS,
    ONE_SIDED,
    POWER,
    POWER_MEAN,
    PRESENCE,
    PROCESSED,
    REFERENCE,
    REMOVES,
    REPETITION,
    REPETITION_INVERSE,
    SCALE,
    SUPPORTED,
    TERM_FLOATS,
    TERM_INTS,
    TOKENS,
    WIDTH,
)


@triton.jit
def block_offsets(blocks):
    """Token ids int32 [n, 256] of `blocks` int32 [n]."""
    return blocks[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]


@triton.jit
def load_lane(pointer, kind, offsets, width, other, KIND: tl.constexpr):
    """Entries of one row of logits as float32; `other` where `offsets` >= width or the pointer is 0.

    The bound is rounded up to 16 entries, and the address declared a multiple of 16 bytes, so that loads are 128 bits
    wide. Rows are allocated that way (see `table`); the caller discards what lies between the width and the bound.
    """
    bound = tl.where(pointer == 0, 0, ((width + 15) // 16) * 16)
    inside = offsets < bound
    if KIND == FP32:
        address = tl.multiple_of(pointer.to(tl.pointer_type(tl.float32)), 16)
        return tl.load(address + offsets, mask=inside, other=other)
    elif KIND == FP16:
        address = tl.multiple_of(pointer.to(tl.pointer_type(tl.float16)), 16)
        return tl.load(address + offsets, mask=inside, other=other).to(tl.float32)
    elif KIND == BF16:
        address = tl.multiple_of(pointer.to(tl.pointer_type(tl.bfloat16)), 16)
        return tl.load(address + offsets, mask=inside, other=other).to(tl.float32)
    else:
        single = load_lane(tl.where(kind == FP32, pointer, 0), kind, offsets, width, other, FP32)
        half = load_lane(tl.where(kind == FP16, pointer, 0), kind, offsets, width, other, FP16)
        brain = load_lane(tl.where(kind == BF16, pointer, 0), kind, offsets, width, other, BF16)
        return tl.where(kind == FP32, single, tl.where(kind == FP16, half, brain))


@triton.jit
def delta_tile(ints, floats, offsets, width, term: tl.constexpr, KIND: tl.constexpr, GENERAL: tl.constexpr):
    """positive - negative of one term, by the policy for -inf; 0 where the row has no such term or its weight is 0."""
    entry = ints + TERM_INTS + INTS_PER_TERM * term
    used = tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * term) != 0.0
    reach = tl.where(used, width, 0)
    positive = load_lane(tl.load(entry), tl.load(entry + 1), offsets, reach, 0.0, KIND)
    negative = load_lane(tl.load(entry + 2), tl.load(entry + 3), offsets, reach, 0.0, KIND)
    delta = positive - negative
    clip = tl.load(floats + CLIP_AT)
    if GENERAL:
        delta -= tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * term + 1)
    lost = positive == float("-inf")
    gained = negative == float("-inf")
    # Times 0: what the other row holds does not matter, unless it is a NaN.
    only_negative, only_positive = tl.fma(negative, 0.0, -clip), tl.fma(positive, 0.0, clip)
    delta = tl.where(lost, tl.where(gained, 0.0, only_negative), tl.where(gained, only_positive, delta))
    if GENERAL:
        one_sided = (tl.load(ints + FLAGS) & ONE_SIDED) != 0
        # Written so that a NaN is not below 0 and stays.
        delta = tl.where(one_sided & (delta < 0.0), 0.0, delta)
    return delta


@triton.jit
def power_mean_tile(ints, floats, offsets, base, width, KIND: tl.constexpr, TERMS: tl.constexpr):
    """log((sum of w_m * p_m ** r) ** (1 / r)) of the normalised base and terms."""
    r = tl.load(floats + POWER)
    extreme = (r == float("inf")) | (r == float("-inf"))
    ordinary = (r != 0.0) & (extreme == 0)
    exponent = tl.where(ordinary, r, 1.0)
    peak = tl.full(base.shape, float("-inf"), tl.float32)
    mass = tl.zeros(base.shape, tl.float32)
    product = tl.zeros(base.shape, tl.float32)
    largest = tl.full(base.shape, float("-inf"), tl.float32)
    smallest = tl.full(base.shape, float("inf"), tl.float32)
    used = tl.zeros([], tl.int32)
    for member in tl.static_range(TERMS + 1):
        if member == 0:
            weight = tl.load(floats + BASE_WEIGHT)
            law = base - tl.load(floats + BASE_SHIFT)
        else:
            entry = ints + TERM_INTS + INTS_PER_TERM * (member - 1)
            weight = tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * (member - 1))
            weight = tl.where(tl.load(entry) == 0, 0.0, weight)
            law = load_lane(tl.load(entry), tl.load(entry + 1), offsets, width, float("-inf"), KIND)
            law -= tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * (member - 1) + 1)
        if weight > 0.0:
            value = exponent * law + tl.log(weight)
            higher = tl.maximum(peak, value)
            # Both still -inf: nothing has been added, and -inf - -inf would be NaN.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            mass = mass * tl.exp2((peak - safe) * LOG2E) + tl.exp2((value - safe) * LOG2E)
            peak = higher
            product += weight * law
            largest = tl.maximum(largest, law)
            smallest = tl.minimum(smallest, law)
            used += 1
    mean = (peak + tl.log(mass)) / exponent
    # With a negative power one law that rules a token out decides; the sum above met inf - inf there.
    decisive = tl.where(exponent < 0.0, float("-inf"), float("nan"))
    mean = tl.where(smallest == decisive, float("-inf"), mean)
    # A maximum may step over a NaN, the product does not.
    mean = tl.where(product == product, mean, product)
    mean = tl.where(r == 0.0, product, mean)
    mean = tl.where(r == float("inf"), tl.where(product == product, largest, product), mean)
    mean = tl.where(r == float("-inf"), tl.where(product == product, smallest, product), mean)
    return tl.where(used == 0, float("-inf"), mean)


@triton.jit
def fused_tile(
    ints,
    floats,
    offsets,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """(fused, reference) scores before adjustments, -inf from the row's width on.

    GENERAL is off when every row of the batch is a plain weighted sum on top of its base; a plain row gets the same
    bits either way, because what GENERAL adds is exact for it (times 1, minus 0).
    """
    width = tl.load(ints + WIDTH).to(tl.int32)
    inside = offsets < width
    base = load_lane(tl.load(ints + BASE), tl.load(ints + BASE + 1), offsets, width, float("-inf"), KIND)
    if GENERAL:
        base = tl.where(inside, base, float("-inf"))
        # An id with no score stays one: -inf times a weight of 0 or less would be NaN or +inf.
        unfused = tl.where(base == float("-inf"), base, base * tl.load(floats + BASE_WEIGHT))
    else:
        unfused = base
    score = unfused
    for term in tl.static_range(TERMS):
        delta = delta_tile(ints, floats, offsets, width, term, KIND, GENERAL)
        score = tl.fma(tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * term), delta, score)
    if GENERAL:
        flags = tl.load(ints + FLAGS)
        if (flags & POWER_MEAN) != 0:
            score = power_mean_tile(ints, floats, offsets, base, width, KIND, TERMS)
        if LAWS > 0:
            if (flags & SUPPORTED) != 0:
                law_ints = ints + TERM_INTS + INTS_PER_TERM * TERMS
                law_floats = floats + TERM_FLOATS + FLOATS_PER_TERM * TERMS
                kept = score != score
                broken = kept
                for slot in tl.static_range(LAWS):
                    pointer = tl.load(law_ints + INTS_PER_LAW * slot)
                    kind = tl.load(law_ints + INTS_PER_LAW * slot + 1)
                    last = tl.load(law_ints + INTS_PER_LAW * slot + 2).to(tl.int32)
                    threshold = tl.load(law_floats + slot) + tl.zeros(score.shape, tl.float32)
                    lane = tl.where(pointer == FUSED_LAW, 0, pointer)
                    law = load_lane(lane, kind, offsets, width, float("-inf"), KIND)
                    law = tl.where(pointer == FUSED_LAW, score, law)
                    broken = broken | (law != law)
                    above = (law > threshold) | ((law == threshold) & (offsets <= last))
                    reach = tl.where(pointer == 0, 0, width)
                    kept = kept | (above & (law > float("-inf")) & (offsets < reach))
                removes = (flags & REMOVES) != 0
                score = tl.where(kept, score, tl.where(removes, float("-inf"), unfused))
                score = tl.where(broken, float("nan"), score)
        reference = load_lane(
            tl.load(ints + REFERENCE), tl.load(ints + REFERENCE + 1), offsets, width, float("-inf"), KIND
        )
        reference = tl.where(inside, reference, float("-inf"))
    else:
        reference = tl.where(inside, base, float("-inf"))
    # Between the width and the loads' bound there may be anything, NaN too.
    return tl.where(inside, score, float("-inf")), reference


@triton.jit
def allowed_tile(pointer, words, offsets):
    """Whether the mask of so many `words` at `pointer` allows the tokens `offsets`."""
    index = offsets // 32
    word = tl.load(pointer.to(tl.pointer_type(tl.int32)) + index, mask=index < words, other=0)
    return ((word >> (offsets % 32)) & 1) != 0


@triton.jit
def adjusted_tile(ints, floats, offsets, score):
    """Logit bias, then penalties, then the grammar mask, of the rows that have them."""
    width = tl.load(ints + WIDTH).to(tl.int32)
    bias_pointer = tl.load(ints + BIAS)
    if bias_pointer != 0:
        bias = tl.multiple_of(bias_pointer.to(tl.pointer_type(tl.float32)), 16)
        score += tl.load(bias + offsets, mask=offsets < ((width + 15) // 16) * 16, other=0.0)
    count_pointer = tl.load(ints + COUNTS)
    if count_pointer != 0:
        counts = tl.multiple_of(count_pointer.to(tl.pointer_type(tl.int32)), 16)
        count = tl.load(counts + offsets, mask=offsets < ((width + 15) // 16) * 16, other=0)
        times = (count - 1).to(tl.float32)
        factor = tl.where(score > 0.0, tl.load(floats + REPETITION_INVERSE), tl.load(floats + REPETITION))
        penalised = score * factor
        present = tl.where(times > 0.0, tl.load(floats + PRESENCE), 0.0)
        penalised -= tl.load(floats + FREQUENCY) * times + present
        score = tl.where(count > 0, penalised, score)
    mask_pointer = tl.load(ints + MASK)
    if mask_pointer != 0:
        # A NaN stays, so that a mask cannot hide a broken row.
        allowed = allowed_tile(mask_pointer, tl.load(ints + MASK_WORDS), offsets)
        score = tl.where(allowed | (score != score), score, float("-inf"))
    return tl.where(offsets < width, score, float("-inf"))


@triton.jit
def law_tile(
    ints,
    floats,
    offsets,
    LAW: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Scores of the raw law, or of the processed one before filters."""
    score, _ = fused_tile(ints, floats, offsets, KIND, TERMS, LAWS, GENERAL)
    if LAW == PROCESSED:
        if ADJUST:
            score = adjusted_tile(ints, floats, offsets, score)
        score = score * tl.load(floats + SCALE)
    return score


@triton.jit
def block_mass(score, peak):
    """Sum of exp(score - peak) in each block: [n, 256], [n] -> [n]; 0 where the block is empty."""
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    return tl.sum(tl.exp2((score - safe[:, None]) * LOG2E), axis=1)


@triton.jit
def ordered(score):
    """float32 -> int32 with the same order. -0.0 and 0.0 become one key."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The inverse of `ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(score, index):
    """int64 keys whose descending order is (score descending, index ascending)."""
    return (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def packed_score(key):
    """The score in a `packed` key."""
    return unordered((key >> 32).to(tl.int32))


@triton.jit
def packed_index(key):
    """The index in a `packed` key, int32."""
    return (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)
