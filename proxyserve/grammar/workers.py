"""Masks of several choices at once."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

_MOST_THREADS = 8
#: Masks of fewer words are found in microseconds, and handing them out takes longer.
_LARGE = 1024


class MaskWorkers:
    """The library's threads, started when there is first something to share out, and one buffer for their results.
    For the engine's thread alone."""

    def __init__(self, words: int, threads: int | None = None) -> None:
        """`words` per mask. `threads` None takes one for a small vocabulary, and leaves a core to everything else."""
        self._words = words
        most = _MOST_THREADS if words >= _LARGE else 1
        self._threads = threads or max(1, min(most, (os.cpu_count() or 1) - 1))
        self._executor: LLExecutor | None = None
        self._buffer = torch.empty((0, words), dtype=torch.int32)

    def compute(self, matchers: Sequence[LLMatcher]) -> Tensor:
        """int32 [matchers, words], overwritten by the next call. A matcher that fails is in error afterwards."""
        if len(matchers) > len(self._buffer):
            self._buffer = torch.empty((2 * len(matchers), self._words), dtype=torch.int32)
        start, size = self._buffer.data_ptr(), self._words * self._buffer.element_size()
        if self._threads == 1 or len(matchers) == 1:
            for row, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(start + row * size, size)
        else:
            if self._executor is None:
                self._executor = LLExecutor(self._threads)
            pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(pairs, start, size, len(self._buffer))
        return self._buffer[: len(matchers)]
