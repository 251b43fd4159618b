"""Speculative verification: which drafted tokens stand under the fused law, and what follows them.

A request with k drafted tokens has k + 1 rows in the target batch: row j gives the law of token j, the last one the
law of the bonus token. Both rules leave the law of the text exactly as it is without drafts, for any drafter.

rejection (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): draft x ~ q stands with
probability min(1, p(x) / q(x)); at the first that does not, a token is drawn from max(p - q, 0), renormalised. p and q
are the processed laws of target and draft.

shared noise: the target draws every token by itself; drafts stand while they equal it. If the drafter drew with the
same seed and position, its Gumbel noise was the same and the two mostly agree. The text is, token for token, the one
that the seed gives without speculation, and q is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.rows import RowBatch

VerifyRule = Literal["rejection", "shared_noise"]


@dataclass(frozen=True, slots=True, eq=False)
class Drafts:
    """n requests with at most k drafted tokens each; host tensors.

    `tokens` int64 [n, k]: the drafts, -1 after a request's last. `rows` int64 [n, k + 1]: the target batch's rows of
    its places, as many as drafts plus one, then -1. For rejection, `laws` and `law_controls` describe the law each
    draft was drawn from and `law_rows` int64 [n, k] its row there (-1 where there is no draft).
    """

    tokens: Tensor
    rows: Tensor
    laws: RowBatch | None = None
    law_controls: PickControls | None = None
    law_rows: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.tokens.shape
        if tuple(self.rows.shape) != (n, k + 1):
            raise ValueError(
                f"rows must be [{n}, {k + 1}] for drafts [{n}, {k}], not {tuple(self.rows.shape)}"
            )
        drafted = self.tokens >= 0
        if bool(((self.rows[:, 1:] >= 0) != drafted).any()) or bool((self.rows[:, 0] < 0).any()):
            raise ValueError("a request with j drafts needs exactly j + 1 target rows")
        if bool((drafted[:, 1:] & ~drafted[:, :-1]).any()):
            raise ValueError("a request's drafts must come first, then -1")
        given = [value is not None for value in (self.laws, self.law_controls, self.law_rows)]
        if any(given) != all(given):
            raise ValueError("laws, law_controls and law_rows go together")
        if self.law_rows is not None and bool(((self.law_rows >= 0) != drafted).any()):
            raise ValueError("law_rows must name a row for every draft and no other")


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """`accepted` int64 [n]: drafts that stand. `tokens` int64 [n, k + 1]: those, then the one token that follows them,
    then -1. `valid` bool [n]: False if a row up to that token was bad; the request then has no token at all (-1).
    `picks`: what `PickControls.raw` and `processed` asked of the target rows, about the tokens in `tokens`."""

    accepted: Tensor
    tokens: Tensor
    valid: Tensor
    picks: Picks


def leading(stands: Tensor) -> Tensor:
    """How many True come first in each row of bool [n, k], int64 [n]."""
    return stands.long().cumprod(dim=1).sum(dim=1)


def settle(drafts: Drafts, accepted: Tensor, drawn: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted, tokens, valid) of `Verdicts`, from how many drafts stand, int64 [n], the token that would follow j of
    them in column j of `drawn` int64 [n, k + 1], and which target rows are good, `valid` bool [B]."""
    device = drawn.device
    rows = drafts.rows.to(device)
    column = torch.arange(rows.shape[1], device=device)
    kept = torch.nn.functional.pad(drafts.tokens.to(device), (0, 1), value=-1)
    tokens = torch.where(column < accepted[:, None], kept, -1)
    tokens = torch.where(column == accepted[:, None], drawn, tokens)
    good = (valid[rows.clamp(min=0)] | (column > accepted[:, None])).all(dim=1)
    return torch.where(good, accepted, 0), torch.where(good[:, None], tokens, -1), good


def emitted(drafts: Drafts, tokens: Tensor, rows: int) -> Tensor:
    """`PickControls.forced` int64 [rows] (host) that reports on `tokens` int64 [n, k + 1]."""
    forced = torch.full((rows,), -1, dtype=torch.int64)
    here = drafts.rows >= 0
    forced[drafts.rows[here]] = tokens.cpu()[here]
    return forced
