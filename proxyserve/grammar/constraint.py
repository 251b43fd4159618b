"""A compiled grammar at work: which tokens may come next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from llguidance import LLMatcher
from torch import Tensor

from proxyserve.engine.constraint import ConstraintFailed
from proxyserve.grammar.table import TokenTable
from proxyserve.grammar.workers import MaskWorkers


class CompiledGrammar:
    """A `Constrains`. Shared by requests and choices; `start` may be called on any thread."""

    def __init__(
        self, matcher: LLMatcher, table: TokenTable, workers: MaskWorkers, end_ids: frozenset[int]
    ) -> None:
        self._matcher = matcher
        self._table = table
        self._workers = workers
        self._end_ids = end_ids

    def ending_with(self, end_ids: Iterable[int]) -> CompiledGrammar:
        """The same with other ids that end a text."""
        return CompiledGrammar(self._matcher, self._table, self._workers, frozenset(end_ids))

    def start(self) -> GrammarConstraint:
        return GrammarConstraint(self._matcher, self._table, self._workers, self._end_ids)


class GrammarConstraint:
    """A `Constraint`. A token that ends the text may come where the text is whole, and elsewhere only if the grammar
    names it and nothing else."""

    def __init__(
        self, compiled: LLMatcher, table: TokenTable, workers: MaskWorkers, end_ids: Iterable[int]
    ) -> None:
        """`compiled` has seen no token, and sees none."""
        self._compiled = compiled
        self._matcher = compiled.deep_copy()
        self._tokens: list[int] = []  # what the matcher consumed
        self._over = 0  # tokens since the text ended
        self._workers = workers
        self._size = len(table.tokens)
        self._end = table.end
        self._ends = frozenset(token for token in end_ids if 0 <= token < self._size)
        self._buffer = torch.empty(table.words, dtype=torch.int32)
        self._bytes = self._buffer.numpy().view("uint8")
        self._mask = self._buffer[: (self._size + 31) // 32]
        self._fresh = False  # whether the buffer is of this position

    def mask(self) -> Tensor:
        """int32 [ceil(vocabulary / 32)], the same memory each time. Raises ConstraintFailed."""
        if not self._fresh:
            self._require_sound()
            buffer = self._buffer
            self._matcher.unsafe_compute_mask_ptr(buffer.data_ptr(), buffer.numel() * buffer.element_size())
            self._finish()
        return self._mask

    @classmethod
    def fill(cls, constraints: Sequence[GrammarConstraint], masks: Tensor, rows: Sequence[int]) -> None:
        """Write the mask of each to its row of `masks` int32 [n, words], those of one vocabulary at the same time, 0
        in words beyond its own. Raises ConstraintFailed if one of them fails."""
        groups: dict[MaskWorkers, list[GrammarConstraint]] = {}
        for constraint in constraints:
            if not constraint._fresh:
                constraint._require_sound()
                groups.setdefault(constraint._workers, []).append(constraint)
        for workers, group in groups.items():
            computed = workers.compute([constraint._matcher for constraint in group])
            for constraint, mask in zip(group, computed, strict=True):
                constraint._buffer.copy_(mask)
                constraint._finish()
        for constraint, row in zip(constraints, rows, strict=True):
            words = min(masks.shape[1], len(constraint._mask))
            masks[row, :words] = constraint._mask[:words]
            masks[row, words:] = 0

    def advance(self, token: int) -> None:
        if self._over or (token in self._ends and self._matcher.is_accepting()):
            self._over += 1
        else:
            self._tokens.append(token)
            self._matcher.consume_token(token)  # an error stays in the matcher, for `mask` to find
        self._fresh = False

    def rollback(self, count: int) -> None:
        over = min(count, self._over)
        self._over -= over
        count -= over
        if count:
            del self._tokens[-count:]
            if not self._matcher.rollback(count):
                # It is in error, and stays so: begin again. Drafts that are drawn under the masks come to this only
                # where the grammar takes too much work.
                self._matcher = self._compiled.deep_copy()
                self._matcher.consume_tokens(self._tokens)
        self._fresh = False

    @property
    def complete(self) -> bool:
        return bool(self._over) or (self._matcher.is_stopped() and not self._matcher.is_error())

    def _require_sound(self) -> None:
        """Raises ConstraintFailed once the matcher has met an error."""
        if not self._matcher.is_error():
            return
        error = self._matcher.get_error().removesuffix("\n<non-verbose/>")
        if "NoExtension" in error:
            raise ConstraintFailed("The text cannot go on under the grammar, and must not end here.")
        raise ConstraintFailed(f"The grammar takes too much work here, or met an error: {error}")

    def _finish(self) -> None:
        """The buffer has the library's mask, in which one id stands for the end of the text: put the real ones in."""
        self._require_sound()
        named = {token: self._get(token) for token in self._ends}
        whole = self._get(self._end)
        self._set(self._end, False)
        for token in self._ends:
            self._set(token, whole)
        if not whole and any(named.values()) and not self._bytes.any():
            for token, may in named.items():
                self._set(token, may)
        self._fresh = True

    def _get(self, token: int) -> bool:
        return bool(self._bytes[token >> 3] >> (token & 7) & 1)

    def _set(self, token: int, may: bool) -> None:
        bit = 1 << (token & 7)
        if may:
            self._bytes[token >> 3] |= bit
        else:
            self._bytes[token >> 3] &= 0xFF ^ bit
