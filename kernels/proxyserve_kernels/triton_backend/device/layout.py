"""Where things are in the row table that the kernels read: two arrays with one row per fused row.

`ints` int64 [B, INTS(T, S)] and `floats` float32 [B, FLOATS(T, S)], for at most T terms and S support laws per row.
Pointers are absolute addresses, 0 for "none"; a kind is the dtype behind a pointer.
"""

from __future__ import annotations

import triton.language as tl

# Kinds: the index in `proxyserve_kernels.rows.DTYPES`. MIXED is not stored: it is the compile-time value for "look".
FP32, FP16, BF16, MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

# ints
WIDTH = tl.constexpr(0)  # 0: the row is unused
BASE = tl.constexpr(1)  # pointer, kind
REFERENCE = tl.constexpr(3)  # pointer, kind
SEED = tl.constexpr(5)
POSITION = tl.constexpr(6)
TOP_K = tl.constexpr(7)
FLAGS = tl.constexpr(8)
BIAS = tl.constexpr(9)  # pointer to float32 [V]
COUNTS = tl.constexpr(10)  # pointer to int32 [V]: 0 unseen, else 1 + times generated
MASK = tl.constexpr(11)  # pointer to int32 words
MASK_WORDS = tl.constexpr(12)
FORCED = tl.constexpr(13)  # token to report on, -1: the drawn one
LISTED_RAW = tl.constexpr(14)  # how many best tokens to list
LISTED_PROCESSED = tl.constexpr(15)
REMOVED_BY = tl.constexpr(16)  # pointer to int32 words: the mask whose removed mass is reported
TERM_INTS = tl.constexpr(17)  # per term: positive pointer, kind, negative pointer, kind
INTS_PER_TERM = tl.constexpr(4)
INTS_PER_LAW = tl.constexpr(3)  # per support law: pointer (0: none, 1: the fused law), kind, last kept id

# floats
SCALE = tl.constexpr(0)  # 1 / temperature; 1 for greedy rows
TOP_P = tl.constexpr(1)
LOG_MIN_P = tl.constexpr(2)
BASE_WEIGHT = tl.constexpr(3)
POWER = tl.constexpr(4)
CLIP_AT = tl.constexpr(5)
BASE_SHIFT = tl.constexpr(6)  # log-partition of the base, for power means
REPETITION = tl.constexpr(7)
PRESENCE = tl.constexpr(8)
FREQUENCY = tl.constexpr(9)
REPETITION_INVERSE = tl.constexpr(10)
TERM_FLOATS = tl.constexpr(11)  # per term: weight, shift (what to subtract from the delta to normalise it)
FLOATS_PER_TERM = tl.constexpr(2)

# flags
GREEDY = tl.constexpr(1)
FILTERED = tl.constexpr(2)
ONE_SIDED = tl.constexpr(4)
POWER_MEAN = tl.constexpr(8)
SUPPORTED = tl.constexpr(16)
REMOVES = tl.constexpr(32)

#: Pointer value of a support law that is the fused law itself.
FUSED_LAW = tl.constexpr(1)

# Planes of block statistics, float32 [PLANES, B, blocks]. Sums are of exp(score - the block's maximum).
RAW_MAX, RAW_SUM = tl.constexpr(0), tl.constexpr(1)
PROCESSED_MAX, PROCESSED_SUM = tl.constexpr(2), tl.constexpr(3)
REFERENCE_MAX, REFERENCE_SUM = tl.constexpr(4), tl.constexpr(5)
GAP_SUM = tl.constexpr(6)  # sum of exp(raw - maximum) * (raw - reference)
KEPT_MAX, KEPT_SUM = tl.constexpr(7), tl.constexpr(8)  # processed, after filters
REMOVED_SUM = tl.constexpr(
    9
)  # of RAW_SUM, what the mask of REMOVED_BY rules out; written for adjusted batches
PLANES = 10

# Laws a kernel can look at.
RAW, PROCESSED = tl.constexpr(0), tl.constexpr(1)

LOG2E = tl.constexpr(1.4426950408889634)
TOKENS = tl.constexpr(256)  # tokens in a block, `proxyserve_kernels.rows.BLOCK`


def ints(terms: int, laws: int) -> int:
    """Columns of `ints`, rounded up to whole 16-byte units."""
    return -(-(TERM_INTS.value + INTS_PER_TERM.value * terms + INTS_PER_LAW.value * laws) // 2) * 2


def floats(terms: int, laws: int) -> int:
    """Columns of `floats`, likewise; behind the terms come the thresholds of the support laws."""
    return -(-(TERM_FLOATS.value + FLOATS_PER_TERM.value * terms + laws) // 4) * 4
