"""The variants that are compiled ahead of time, and what each may cost on sm_90.

The numbers are what the compiler gives today with a little room; a regression shows as a failed test. Registers decide
how many programs share a multiprocessor (65536 registers each). An H200 has lanes for some 41 instructions per token
while three 2-byte inputs stream in at 4.3 TB/s, so K1 without comparison and temperature has to stay below that.
"""

from __future__ import annotations

from collections.abc import Iterator

from proxyserve_kernels.triton_backend.aot import Budget, Case
from proxyserve_kernels.triton_backend.device import layout, paged, pick, residual, select, stats, tilt
from proxyserve_kernels.triton_backend.paged import KEYS, WARPS
from proxyserve_kernels.triton_backend.tuning import GROUP, ROOM, ROW_WARPS, SEARCH_GROUP, TILES, TOGETHER

KINDS = {
    "fp32": layout.FP32.value,
    "fp16": layout.FP16.value,
    "bf16": layout.BF16.value,
    "mixed": layout.MIXED.value,
}

#: Blocks of a row program at every vocabulary up to 262,144.
ROW = {"BLOCKS": 1024}


def variant(
    kind: str, terms: int, laws: int = 0, general: bool = False, adjust: bool | None = None
) -> dict[str, int | bool]:
    """Compile-time values of a variant."""
    values: dict[str, int | bool] = {
        "KIND": KINDS[kind],
        "TERMS": terms,
        "LAWS": laws,
        "GENERAL": general,
    }
    return values if adjust is None else {**values, "ADJUST": adjust}


PLAIN = variant("bf16", 1, adjust=False)
FULL = variant("bf16", 2, 2, True, True)


def cases() -> Iterator[Case]:
    """Every case of the table."""
    yield from fuse_cases()
    yield from pick_cases()
    yield from tilt_cases()
    yield from residual_cases()
    yield from attention_cases()


def fuse_cases() -> Iterator[Case]:
    """K1 in all tiles, dtypes and numbers of terms; with and without its extras."""
    bare, extras = {"SCALED": False, "COMPARE": False}, {"SCALED": True, "COMPARE": True}

    def case(name: str, tile: int, values: dict[str, int | bool], budget: Budget) -> Case:
        return Case(f"fuse_stats {name} tile{tile}", stats.fuse_stats, {"TILE": tile, **values}, 1, budget)

    registers = {4: 112, 2: 72, 1: 48}
    for tile in TILES:
        budget = Budget(registers[tile.blocks], 36)
        yield case("bf16 T1 bare", tile.blocks, {**PLAIN, **bare}, budget)
        yield case("fp32 T1 bare", tile.blocks, {**variant("fp32", 1, adjust=False), **bare}, budget)
        budget = Budget(registers[tile.blocks] + 8, 60)
        yield case("bf16 T1", tile.blocks, {**PLAIN, **extras}, budget)
        yield case("fp32 T1", tile.blocks, {**variant("fp32", 1, adjust=False), **extras}, budget)
    yield case("fp16 T1", 2, {**variant("fp16", 1, adjust=False), **extras}, Budget(72, 60))
    yield case("mixed T1", 2, {**variant("mixed", 1, adjust=False), **extras}, Budget(128, 80))
    for terms, most, instructions in ((2, 96, 80), (4, 128, 110), (8, 168, 170)):
        yield case(f"bf16 T{terms}", 2, {**variant("bf16", terms, adjust=False), **extras},
                   Budget(most, instructions))  # fmt: skip
    yield case("bf16 T1 adjust", 2, {**variant("bf16", 1, adjust=True), **extras}, Budget(128, 130))
    yield case("bf16 T2 L2 general adjust", 1, {**FULL, **extras}, Budget(160, 300))


def pick_cases() -> Iterator[Case]:
    """K2, K3 and what stands between them."""
    for law, listed in ((1, 0), (1, 32), (0, 32)):
        values = {"LAW": law, "LIST": listed, "ROOM": ROOM, "GROUP": GROUP, **ROW, **PLAIN}
        yield Case(f"best_tokens law{law} list{listed}", select.best_tokens, values, ROW_WARPS, Budget(240))
    values = {"LAW": 1, "LIST": 32, "ROOM": ROOM, "GROUP": GROUP, **ROW, **FULL}
    yield Case("best_tokens general adjust list32", select.best_tokens, values, ROW_WARPS, Budget(240))
    for name, lanes in (("", PLAIN), (" general adjust", FULL)):
        values = {"GROUP": SEARCH_GROUP, **ROW, **lanes}
        yield Case(f"search_last{name}", select.search_last, values, ROW_WARPS, Budget(255))
        for law in (0, 1):
            listing = {**values, "LAW": law, "LIST": 32, "ROOM": ROOM}
            yield Case(f"search_list law{law}{name}", select.search_list, listing, ROW_WARPS, Budget(255))
    yield Case("filter_blocks tile2", stats.filter_blocks, {"TILE": 2, **PLAIN}, 1, Budget(80, 70))
    yield Case("count_before tile2", stats.count_before, {"TILE": 2, "LAW": 0, **PLAIN}, 1, Budget(80, 40))
    values = {"TILE": 2, **variant("bf16", 1)}
    yield Case("write_scores tile2", stats.write_scores, values, 1, Budget(72, 40))
    for name, lanes in (("", variant("bf16", 1)), (" general", variant("bf16", 2, 2, True))):
        values = {"TOGETHER": TOGETHER, **lanes}
        yield Case(f"listed_logprobs{name}", stats.listed_logprobs, values, 1, Budget(56, narrow=12))
    for compare in (False, True):
        values = {**ROW, "COMPARE": compare, **PLAIN}
        yield Case(f"pick compare{int(compare)}", pick.pick, values, ROW_WARPS, Budget(80, narrow=12))
    values = {**ROW, "COMPARE": True, **FULL}
    yield Case("pick general adjust", pick.pick, values, ROW_WARPS, Budget(96, narrow=40))


def tilt_cases() -> Iterator[Case]:
    """The solver's passes and steps."""
    lanes = {"KIND": KINDS["bf16"], "TERMS": 1}
    double = {"out": "*fp64"}
    for points, moments, most in ((1, 3, 96), (16, 1, 96), (21, 1, 96)):
        values = {"TILE": 2, "POINTS": points, "MOMENTS": moments, **lanes}
        yield Case(f"tilt_stats points{points} tile2", tilt.tilt_stats, values, 1, Budget(most))
    yield Case("pair_stats tile2", tilt.pair_stats, {"TILE": 2, **lanes}, 1, Budget(96))
    values = {"TILE": 1, "KIND": KINDS["bf16"], "TERMS": 4}
    yield Case("moment_stats T4 tile1", tilt.moment_stats, values, 1, Budget(160))
    yield Case("gather_moments", tilt.gather_moments, ROW, ROW_WARPS, Budget(64), double)
    yield Case("gather_grid", tilt.gather_grid, ROW, ROW_WARPS, Budget(64), double)
    yield Case("gather_sums", tilt.gather_sums, ROW, ROW_WARPS, Budget(64), double)
    yield Case("gather_pairs", tilt.gather_pairs, ROW, ROW_WARPS, Budget(64))
    yield Case("solve_step", tilt.solve_step, ROW, ROW_WARPS, Budget(80))


def residual_cases() -> Iterator[Case]:
    """Draws from what is left of a rejected draft's target."""
    values = {**PLAIN, **{f"Q_{name}": PLAIN[name] for name in ("KIND", "TERMS", "LAWS", "GENERAL")}}
    yield Case("residual_stats tile2", residual.residual_stats, {"TILE": 2, **values}, 1, Budget(96, 80))
    values = {**ROW, **values}
    yield Case("residual_pick", residual.residual_pick, values, ROW_WARPS, Budget(80, narrow=12))


def attention_cases() -> Iterator[Case]:
    """Attention over pages: heads of 64 and 128, with and without what some architectures have."""
    tensors = ("query", "keys", "values", "out")
    types = {**dict.fromkeys(tensors, "*bf16"), "pages": "*i64", "firsts": "*i64", "positions": "*i64",
             "partial": "*fp32", "maxima": "*fp32", "sums": "*fp32", "sinks": "*bf16",
             "scale": "fp32", "softcap": "fp32"}  # fmt: skip
    for size, heads, extras, most in ((128, 32, False, 168), (64, 14, False, 168), (128, 32, True, 168)):
        kv_heads = 8 if heads == 32 else 2
        values: dict[str, int | bool | str] = {
            "BLOCK_SIZE": 16, "HEADS": heads, "KV_HEADS": kv_heads, "SIZE": size, "VALUE": size, "GROUP": 16,
            "WIDTH": size, "VALUE_WIDTH": size, "KEYS": KEYS, "SHARES": 8, "SOFTCAP": extras, "WINDOW": extras,
            "PRECISION": "tf32",
        }  # fmt: skip
        name = f"attend_share size{size} heads{heads}/{kv_heads}{' extras' if extras else ''}"
        yield Case(name, paged.attend_share, values, WARPS, Budget(most), types)
        joined = {"HEADS": heads, "VALUE": size, "VALUE_WIDTH": size, "SHARES": 8, "SINKS": extras}
        budget = Budget(64, narrow=1 if extras else 0)
        yield Case(f"join_shares size{size} heads{heads}/{kv_heads}{' sinks' if extras else ''}",
                   paged.join_shares, joined, 1, budget, types)  # fmt: skip
