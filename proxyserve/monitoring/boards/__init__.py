"""The boards: which questions they answer, in the order in which an operator asks them."""

from __future__ import annotations

from collections.abc import Mapping

from proxyserve.api import families as f
from proxyserve.api.families import Family
from proxyserve.monitoring.board import Board
from proxyserve.monitoring.boards.experts import experts_board
from proxyserve.monitoring.boards.fusion import fusion_board
from proxyserve.monitoring.boards.keys import keys_board
from proxyserve.monitoring.boards.overview import overview_board
from proxyserve.monitoring.boards.process import process_board

#: Families that are on no board, and why.
LEFT_OUT: Mapping[Family, str] = {
    f.KV_BLOCKS: "the share in use says it without needing the pool's size",
    f.KV_BLOCKS_IN_USE: "the share in use says it without needing the pool's size",
    f.PROCESS_VIRTUAL_MEMORY: "address space that torch reserves says nothing of memory in use",
}


def all_boards() -> tuple[Board, ...]:
    return (overview_board(), fusion_board(), experts_board(), keys_board(), process_board())
