"""Finding markers (`<think>`, `<tool_call>`) in text that comes in pieces cut anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Split(NamedTuple):
    """`before` is text in front of the first marker, `after` what follows it. Where no marker was found, `marker` is
    None, `before` is what cannot belong to one, and `after` may be the beginning of one: keep it and put it in front of
    the next piece."""

    before: str
    marker: str | None
    after: str


def split_at_marker(text: str, markers: Sequence[str]) -> Split:
    """Split at the first marker; of several that begin at the same place, at the longest."""
    found = [(position, -len(marker)) for marker in markers if (position := text.find(marker)) >= 0]
    if found:
        position, length = min(found)
        end = position - length
        return Split(text[:position], text[position:end], text[end:])
    held = max((overlap(text, marker) for marker in markers), default=0)
    return Split(text[: len(text) - held], None, text[len(text) - held :])


def overlap(text: str, marker: str) -> int:
    """Length of the longest proper beginning of `marker` that `text` ends with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
