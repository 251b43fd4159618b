"""Lists of KV blocks as kernels for paged attention take them: one after the other, with where each begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxyserve.engine.attention import Span


@dataclass(frozen=True, slots=True)
class PageLists:
    """Of n spans, on the host, int32: `queries` [n + 1] is where each span's tokens begin in the packed row, `starts`
    [n + 1] where its blocks begin in `pages` [blocks], and `last` [n] how many tokens its last block has."""

    queries: Tensor
    starts: Tensor
    pages: Tensor
    last: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int) -> PageLists:
        queries, starts = [0], [0]
        pages: list[int] = []
        last: list[int] = []
        for span in spans:
            length = span.start + span.count
            used = -(-length // block_size)
            pages.extend(span.blocks[:used])
            queries.append(queries[-1] + span.count)
            starts.append(len(pages))
            last.append(length - (used - 1) * block_size)
        return cls(*(torch.tensor(values, dtype=torch.int32) for values in (queries, starts, pages, last)))

    def table(self, filling: int = 0) -> Tensor:
        """The same as a table [n, most blocks], filled up with the id of any block."""
        counts = self.starts.diff()
        inside = torch.arange(int(counts.max())) < counts[:, None]
        table = torch.full(inside.shape, filling, dtype=torch.int32)
        table[inside] = self.pages
        return table


def slots_of(spans: Sequence[Span], block_size: int) -> list[int]:
    """Of each token of the packed row: its row in a layer's pool seen as [blocks * block_size, heads, size]."""
    return [
        span.blocks[position // block_size] * block_size + position % block_size
        for span in spans
        for position in range(span.start, span.start + span.count)
    ]
