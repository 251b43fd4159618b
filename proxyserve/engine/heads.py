"""What goes through a model's head, rows of hidden states or differences of two, and what comes out.

The two lanes of an expert that is an adapter over its untuned model share one head. A rule that only reads their
difference needs one row of it instead of two, since a linear head of `h_tuned - h_untuned` is the difference of the
heads (with less rounding: no two logits are rounded before they are subtracted).

Rounding logits to bfloat16 before they are subtracted is the largest error of a fused law by far, and unneeded: the
product is summed in float32 anyway, and costs no more if it stays there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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


def logits_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the logits of a model of this dtype. Only on a CUDA device can a product be of another dtype than its factors
    at no cost."""
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cuda" else dtype


class WideHead(nn.Module):
    """Takes the place of a linear head, with its weights, whose logits are to be float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., in] -> float32 [.., out]."""
        if hidden.device.type == "cuda":
            rows = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.mm(rows, self.weight.t(), out_dtype=torch.float32)
            logits = logits.view(*hidden.shape[:-1], -1)
        else:
            logits = nn.functional.linear(hidden.float(), self.weight.float())
        return logits if self.bias is None else logits + self.bias


def widen_head(model: PreTrainedModel) -> None:
    """Have the model's logits in float32, in place. Heads that are not plain linear layers (quantised ones) stay."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        model.set_output_embeddings(WideHead(head))


def watch_head(head: nn.Module) -> None:
    """Let `head_rows` decide what this head runs on."""
    head.register_forward_pre_hook(_combine)


def _combine(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
    rows = _current.get()
    if rows is None:
        return None
    (hidden,) = inputs
    return (torch.cat([hidden[:, rows.plain], hidden[:, rows.plus] - hidden[:, rows.minus]], dim=1),)
