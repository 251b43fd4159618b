"""What rank 0 tells the others: lines of JSON, a name and its arguments. Nothing that is read can run code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from proxyserve.engine.attention import Span
from proxyserve.engine.packed_row import PackedRow
from proxyserve.models.loading import Placement


def write(stream: BinaryIO, message: object) -> None:
    """Raises OSError if nobody is there."""
    stream.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    stream.flush()


def read(stream: BinaryIO) -> Any:
    """The next message. Raises EOFError at the end, OSError if the connection broke."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def placement_to_json(placement: Placement) -> list[str]:
    return [str(placement.device), str(placement.dtype).removeprefix("torch.")]


def placement_from_json(value: list[str]) -> Placement:
    device, dtype = value
    return Placement(torch.device(device), getattr(torch, dtype))


def row_to_json(row: PackedRow, block_size: int) -> dict[str, Any]:
    """Without blocks that are not read: lanes hold those of their whole answer. A divided base has neither adapters nor
    differences of rows."""
    assert row.heads is None and row.adapters is None
    spans = [
        [list(span.blocks[: -(-(span.start + span.count) // block_size)]), span.start, span.count]
        for span in row.spans
    ]
    return {"ids": row.ids, "positions": row.positions, "spans": spans, "wanted": row.wanted}


def row_from_json(value: Mapping[str, Any]) -> PackedRow:
    spans = [Span(blocks, start, count) for blocks, start, count in value["spans"]]
    return PackedRow(value["ids"], value["positions"], spans, value["wanted"])
