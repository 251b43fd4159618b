"""Launch shapes: a static table, so that nothing is tuned, and nothing synchronises, while serving."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """`blocks` of 256 tokens per program, and its warps.

    Never more warps than blocks: then a block belongs to one warp, its sum is made in one order, and the results are
    the same bits for every tile. Two blocks a warp spread the fixed cost of a program over more tokens."""

    blocks: int
    warps: int


#: Every tile that is compiled, largest first.
TILES = (Tile(8, 4), Tile(4, 4), Tile(2, 2), Tile(1, 1))

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

#: Places in the buffer of best tokens of a row, and so the longest list.
ROOM = 1024
