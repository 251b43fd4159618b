"""Launch shapes: a static table, so that nothing is tuned, and nothing synchronises, while serving."""

from __future__ import annotations

from dataclasses import dataclass

#: Products and sums are contracted where the code says so (`tl.fma`) and nowhere else: scores that one kernel compares
#: with another's have to be the same bits in both.
EXACT = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Tile:
    """`blocks` of 256 tokens per program of one warp.

    With more warps the compiler spreads a block of float32 over two of them, but not one of bfloat16, and not in a
    small tile: the sum of a block would be made in another order. One warp makes it in one order in every tile, with
    fewer instructions per token besides (`aot`)."""

    blocks: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {"num_warps": 1, **EXACT}


#: Every tile that is compiled, largest first.
TILES = (Tile(4), Tile(2), Tile(1))

#: Programs wanted at least: 16 warps for each of the 132 multiprocessors of an H100 or H200.
PROGRAMS = 16 * 132


def tile_for(rows: int, blocks: int) -> Tile:
    """The largest tile that still makes enough programs of `rows` rows of `blocks` blocks, else the smallest."""
    for tile in TILES:
        if rows * -(-blocks // tile.blocks) >= PROGRAMS:
            return tile
    return TILES[-1]


#: Warps of the kernels that have one program per row, and the blocks that they open at once.
ROW_WARPS = 8
ROW_OPTIONS: dict[str, int | bool] = {"num_warps": ROW_WARPS, **EXACT}
GROUP = 8

#: Blocks that the searches open at once: with 8 the compiler spills a register or two.
SEARCH_GROUP = 4

#: Named tokens of which one program of one warp tells the log-probs: one for each of its threads.
TOGETHER = 32
LIST_OPTIONS: dict[str, int | bool] = {"num_warps": 1, **EXACT}

#: Places in the buffer of best tokens of a row, and so the longest list.
ROOM = 1024
