"""The variants that are compiled ahead of time, and what each may cost on sm_90.

The numbers are what the compiler gives today with a little room; a regression shows as a failed test. Registers decide
how many programs share a multiprocessor (65536 registers each), instructions per token whether K1 can keep up with the
memory (an H200 has about 4.4 TB/s and 132 x 128 lanes: some 45 instructions per token at three 2-byte inputs).
"""

from __future__ import annotations

from collections.abc import Iterator

from proxyserve_kernels.triton_backend.aot import Budget, Case
from proxyserve_kernels.triton_backend.device import layout, pick, select, stats
from proxyserve_kernels.triton_backend.tuning import GROUP, ROOM, ROW_WARPS, TILES

KINDS = {
    "fp32": layout.FP32.value,
    "fp16": layout.FP16.value,
    "bf16": layout.BF16.value,
    "mixed": layout.MIXED.value,
}


def variant(kind: str, terms: int, laws: int = 0, general: bool = False, adjust: bool | None = None) -> dict[str, int | bool]:
    """Compile-time values of a variant."""
    values = {"KIND": KINDS[kind], "TERMS": terms, "LAWS": laws, "GENERAL": general}
    return values if adjust is None else {**values, "ADJUST": adjust}


def cases() -> Iterator[Case]:
    """Every case of the table."""
    for tile in TILES:
        yield Case(
            f"fuse_stats bf16 T1 tile{tile.blocks}",
            stats.fuse_stats,
            {"TILE": tile.blocks, **variant("bf16", 1, adjust=False)},
            tile.warps,
            Budget(255, 100),
        )
    for kind in ("fp32", "fp16", "mixed"):
        yield Case(
            f"fuse_stats {kind} T1 tile8",
            stats.fuse_stats,
            {"TILE": 8, **variant(kind, 1, adjust=False)},
            8,
            Budget(255, 100),
        )
    for terms in (2, 4, 8):
        yield Case(
            f"fuse_stats bf16 T{terms} tile8",
            stats.fuse_stats,
            {"TILE": 8, **variant("bf16", terms, adjust=False)},
            8,
            Budget(255, 200),
        )
    yield Case(
        "fuse_stats bf16 T1 adjust tile8",
        stats.fuse_stats,
        {"TILE": 8, **variant("bf16", 1, adjust=True)},
        8,
        Budget(255, 200),
    )
    yield Case(
        "fuse_stats bf16 T2 general L2 adjust tile8",
        stats.fuse_stats,
        {"TILE": 8, **variant("bf16", 2, 2, True, True)},
        8,
        Budget(255, 300),
    )
    shape = {"BLOCKS": 1024, "SORTED": 512, "ROOM": ROOM, "GROUP": GROUP}
    for name, kernel in (("best_tokens", select.best_tokens), ("search", select.search)):
        for law, listed in ((1, 0), (1, 32), (0, 32)):
            yield Case(
                f"{name} bf16 T1 law{law} list{listed}",
                kernel,
                {"LAW": law, "LIST": listed, **shape, **variant("bf16", 1, adjust=False)},
                ROW_WARPS,
                Budget(255),
            )
    yield Case(
        "best_tokens bf16 T2 general L2 adjust list32",
        select.best_tokens,
        {"LAW": 1, "LIST": 32, **shape, **variant("bf16", 2, 2, True, True)},
        ROW_WARPS,
        Budget(255),
    )
    yield Case(
        "filter_blocks bf16 T1 tile8",
        stats.filter_blocks,
        {"TILE": 8, **variant("bf16", 1, adjust=False)},
        8,
        Budget(255, 200),
    )
    yield Case(
        "count_before bf16 T1 tile8",
        stats.count_before,
        {"TILE": 8, "LAW": 0, **variant("bf16", 1, adjust=False)},
        8,
        Budget(255, 200),
    )
    yield Case(
        "write_scores bf16 T1 tile8",
        stats.write_scores,
        {"TILE": 8, **variant("bf16", 1)},
        8,
        Budget(255, 200),
    )
    for blocks in (128, 512, 1024):
        yield Case(
            f"pick bf16 T1 blocks{blocks}",
            pick.pick,
            {"BLOCKS": blocks, **variant("bf16", 1, adjust=False)},
            ROW_WARPS,
            Budget(255),
        )
    yield Case(
        "pick bf16 T2 general L2 adjust",
        pick.pick,
        {"BLOCKS": 512, **variant("bf16", 2, 2, True, True)},
        ROW_WARPS,
        Budget(255),
    )
