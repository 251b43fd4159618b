"""Constraints made of plain Python, for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from proxyserve.engine.constraint import Constraint

#: What may follow the tokens so far: ids, or None for all.
Rule = Callable[[Sequence[int]], Collection[int] | None]


def bitmask(ids: Collection[int], words: int) -> Tensor:
    """int32 [words], the obvious way; ids beyond it are left out."""
    values = [0] * words
    for token in ids:
        if token // 32 < words:
            values[token // 32] |= 1 << (token % 32)
    return torch.tensor([value - 2**32 if value >= 2**31 else value for value in values], dtype=torch.int32)


@dataclass
class RuleState:
    """Masks have `words` words. The text is complete when `whole` says so."""

    rule: Rule
    words: int
    whole: Callable[[Sequence[int]], bool]
    seen: list[int] = field(default_factory=list)

    def mask(self) -> Tensor | None:
        ids = self.rule(self.seen)
        return None if ids is None else bitmask(ids, self.words)

    def advance(self, token: int) -> None:
        self.seen.append(token)

    def rollback(self, count: int) -> None:
        del self.seen[len(self.seen) - count :]

    @property
    def complete(self) -> bool:
        return self.whole(self.seen)


class FillingState(RuleState):
    """The same, all masks of a step in one call."""

    calls = 0

    def mask(self) -> Tensor | None:
        raise AssertionError("`fill` is there")

    @classmethod
    def fill(cls, constraints: Sequence[Self], masks: Tensor, rows: Sequence[int]) -> None:
        cls.calls += 1
        for constraint, row in zip(constraints, rows, strict=True):
            mask = RuleState.mask(constraint)
            masks[row] = -1 if mask is None else 0
            if mask is not None:
                own = mask[: masks.shape[1]]
                masks[row, : len(own)] = own


def never(seen: Sequence[int]) -> bool:
    return False


@dataclass(frozen=True)
class Ruled:
    """`rule` for every choice, by itself."""

    rule: Rule
    words: int = 12
    whole: Callable[[Sequence[int]], bool] = never
    kind: type[RuleState] = RuleState

    def start(self) -> Constraint:
        return self.kind(self.rule, self.words, self.whole)


def spelling(*tokens: int, kind: type[RuleState] = RuleState) -> Ruled:
    """Exactly these tokens, and then nothing."""
    return Ruled(
        lambda seen: {tokens[len(seen)]} if len(seen) < len(tokens) else set(),
        whole=lambda seen: len(seen) == len(tokens),
        kind=kind,
    )


def among(*ids: int, kind: type[RuleState] = RuleState) -> Ruled:
    """Always any of these."""
    return Ruled(lambda seen: ids, kind=kind)
