"""What goes through a model's head: rows of hidden states, or differences of two.

The two lanes of an expert that is an adapter over its untuned model share one head. A rule that only reads their
difference needs one row of it instead of two, since a linear head of `h_tuned - h_untuned` is the difference of the
heads (with less rounding: no two logits are rounded before they are subtracted).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class HeadRows:
    """`plain` [n] int64 picks rows of hidden states, `plus` and `minus` [m] int64 pairs of them; n + m rows go through
    the head, in that order."""

    plain: Tensor
    plus: Tensor
    minus: Tensor

    @classmethod
    def of(
        cls, plain: Sequence[int], differences: Sequence[tuple[int, int]], device: torch.device
    ) -> HeadRows:
        plus, minus = zip(*differences, strict=True) if differences else ((), ())
        return cls(*(torch.tensor(rows, dtype=torch.int64, device=device) for rows in (plain, plus, minus)))


_current: ContextVar[HeadRows | None] = ContextVar("proxyserve_heads", default=None)


@contextmanager
def head_rows(rows: HeadRows | None) -> Iterator[None]:
    """Have heads run on these rows inside the block; None leaves them alone."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)


def watch_head(head: nn.Module) -> None:
    """Let `head_rows` decide what this head runs on."""
    head.register_forward_pre_hook(_combine)


def _combine(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
    rows = _current.get()
    if rows is None:
        return None
    (hidden,) = inputs
    return (torch.cat([hidden[:, rows.plain], hidden[:, rows.plus] - hidden[:, rows.minus]], dim=1),)
