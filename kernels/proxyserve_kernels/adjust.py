"""Logit bias and penalties, applied to fused scores once, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """Sparse changes to a batch of scores. Each list of entries is int64 / float32 of equal length; a (row, id) pair
    appears at most once per list.

    Bias: `bias_values` is added (-inf removes the token). Penalties: for tokens seen before, `counts` is how often the
    token was generated, `repetition`, `presence` and `frequency` are the row's parameters.
    """

    bias_rows: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    seen_rows: Tensor
    seen_ids: Tensor
    counts: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    def apply(self, scores: Tensor) -> None:
        """Change `scores` float32 [B, V] in place: bias first, then penalties.

        Repetition (Keskar et al. 2019, arXiv 1909.05858): a positive score is divided by the penalty, a negative one
        multiplied. Presence and frequency (OpenAI): subtract `presence` once and `frequency` per generated occurrence.
        """
        if self.bias_rows.numel():
            scores[self.bias_rows, self.bias_ids] += self.bias_values
        if self.seen_rows.numel():
            seen = scores[self.seen_rows, self.seen_ids]
            seen = torch.where(seen > 0, seen / self.repetition, seen * self.repetition)
            seen -= self.frequency * self.counts + self.presence * (self.counts > 0)
            scores[self.seen_rows, self.seen_ids] = seen
