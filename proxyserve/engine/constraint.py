"""What may come next, as far as it depends on what came before: grammars, budgets of thought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor


class Constraint(Protocol):
    """The state of one choice. Used on the engine's thread alone."""

    def mask(self) -> Tensor | None:
        """Which tokens may come next: int32 [words] on the host, bit `i % 32` of word `i // 32` set where id i may;
        ids beyond the words may not. None where every token may. Valid until the next `advance` or `rollback`.

        Raises ConstraintFailed if that cannot be found within the constraint's limits, which ends the choice."""

    def advance(self, token: int) -> None:
        """`token` has been chosen, or is supposed to be."""

    def rollback(self, count: int) -> None:
        """Undo the last `count` calls of `advance`, one that raised among them: everything is as if they had never been
        made. At most the last MOST_DRAFTS calls can be undone."""

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing may follow: the choice ends, as if it had met a stop string."""


class FillsTogether(Constraint, Protocol):
    """A Constraint that can write the masks of many choices in one call. Where its class has `fill`, the engine calls
    that once per step instead of `mask` once per choice."""

    @classmethod
    def fill(cls, constraints: Sequence[Self], masks: Tensor, rows: Sequence[int]) -> None:
        """Write the mask of each of `constraints` to its row of `masks` int32 [n, words], on the host, whole: 0 in
        words beyond its own, -1 (all ones) where every token may come. Other rows are others'.

        If it raises anything, each of the constraints is asked for its own `mask`, so that one that fails fails
        alone."""


class Constrains(Protocol):
    """What a submission asks for; shared by its choices."""

    def start(self) -> Constraint:
        """A fresh state for one choice."""


class ConstraintFailed(Exception):
    """The message says why no token can be named; it may be told to the client."""
