"""Launch shapes: a static table, so that nothing is tuned, and nothing synchronises, while serving.

A tile is a number of blocks of 256 tokens, one warp each: with fewer tokens per warp than a block, a block's sum would
be made by two warps, in another order. The results are the same bits for every tile.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """`blocks` of 256 tokens per program, with as many warps."""

    blocks: int

    @property
    def warps(self) -> int:
        return self.blocks


#: Every tile that is compiled, largest first.
TILES = (Tile(8), Tile(4), Tile(2), Tile(1))

#: Programs wanted at least, about two for each of the processors of an H100 or H200.
PROGRAMS = 264


def tile_for(rows: int, blocks: int) -> Tile:
    """The largest tile that still makes enough programs of `rows` rows of `blocks` blocks, else the smallest."""
    for tile in TILES:
        if rows * -(-blocks // tile.blocks) >= PROGRAMS:
            return tile
    return TILES[-1]


#: Warps of the kernels that have one program per row, and the blocks they open at once.
ROW_WARPS = 8
GROUP = 8

#: Places in the buffer of best tokens.
ROOM = 1024
