"""What is asked of each row beside its fusion, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Temperatures below this are greedy: 1 / temperature must stay finite.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """Changes to fused scores, in this order: logit bias, penalties, grammar mask.

    Entries are lists of equal length, host tensors: `*_rows` and `*_ids` int64, values float32; a (row, id) pair
    appears at most once in a list, and ids lie below the row's width.

    Bias: `bias_values` is added (-inf removes the token). Penalties, for tokens seen before: `counts` is how often
    the token was generated (0: it is in the prompt only), `repetition`, `presence`, `frequency` are the parameters of
    its row. Repetition (Keskar et al. 2019, arXiv 1909.05858): a positive score is divided by the penalty, any other
    multiplied. Presence and frequency (OpenAI): `presence` is subtracted once and `frequency` per generated occurrence.

    Grammar: `masks` int32 [M, words], bit `i % 32` of word `i // 32` is 1 where id i is allowed; ids beyond the words
    are not. `mask_of` int64 [B]: which mask a row has, -1 for none. `removed_by` int64 [B]: the mask for which
    `Picks.removed` is wanted, -1 for none; it need not be the one that is applied.
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
    masks: Tensor | None = None
    mask_of: Tensor | None = None
    removed_by: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.masks is None) != (self.mask_of is None):
            raise ValueError("masks and mask_of go together")
        if self.masks is None and self.removed_by is not None:
            raise ValueError("removed_by names masks, and there are none")
        if self.masks is not None and (self.masks.dtype != torch.int32 or self.masks.dim() != 2):
            raise ValueError(
                f"masks must be int32 [M, words], not {self.masks.dtype} {tuple(self.masks.shape)}"
            )

    @classmethod
    def none(cls) -> Adjustments:
        """No entries; `dataclasses.replace` fills some in."""
        ints, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        return cls(ints, ints, floats, ints, ints, floats, floats, floats, floats)


@dataclass(frozen=True, slots=True, eq=False)
class PickControls:
    """How each row's token is chosen; host tensors with one entry per row.

    `temperature` float32 (below MIN_TEMPERATURE: greedy); `top_k` int64 (0 = off), `top_p` float32 (1 = off), `min_p`
    float32 (0 = off); `seeds` int64 (64 bits of any sign), `positions` int64 (the absolute position the token will
    have, below 2**32).

    The fused scores with adjustments and temperature are filtered in this order. min-p keeps tokens at least `min_p`
    times as likely as the likeliest; top-k then keeps the best k; top-p then keeps the fewest best ones that hold at
    least `top_p` of what is left, always at least one. Ties go to the lowest id. What remains, renormalised, is the
    processed law; at temperature 0 it is all on the best token, whatever the filters.

    `raw` and `processed` ask for log-probs: one entry per row, None for no, else how many of the likeliest tokens to
    list. `forced` int64 gives the token to report on instead of the drawn one (-1: the drawn one). `listed` int64
    [B, m] names tokens whose raw log-probs are wanted as well (-1: none), in rows that ask for raw ones at all.
    `compare` False leaves out KL and flips, which are then 0 and False.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    raw: Sequence[int | None]
    processed: Sequence[int | None] | None = None
    adjustments: Adjustments | None = None
    forced: Tensor | None = None
    listed: Tensor | None = None
    compare: bool = True

    @property
    def reports(self) -> bool:
        """Whether any row asks for log-probs."""
        return any(wish is not None for wish in (*self.raw, *(self.processed or ())))

    @classmethod
    def greedy(cls, rows: int) -> PickControls:
        """Greedy for every row, nothing reported; `dataclasses.replace` changes some of it."""
        return cls(
            temperature=torch.zeros(rows),
            top_k=torch.zeros(rows, dtype=torch.int64),
            top_p=torch.ones(rows),
            min_p=torch.zeros(rows),
            seeds=torch.zeros(rows, dtype=torch.int64),
            positions=torch.zeros(rows, dtype=torch.int64),
            raw=(None,) * rows,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """Log-probs under one law, in nats, on the device of the logits; defined for the rows that asked.

    `chosen` float32 [B]: of the reported token. `ranks` int64 [B]: how many tokens come before it, best first, ties by
    id (0: it is the best; -1: the law rules it out). `ids` int64 [B, n] and `values` float32 [B, n]: the likeliest
    tokens, n the most that any row asked for; where a law has fewer possible tokens the rest is id -1, value -inf.
    `listed` float32 [B, m]: of the tokens in `PickControls.listed`, -inf where that is -1 or beyond the row's width;
    None for the processed law, or where no list was given. A token has the identical float wherever it appears.
    """

    chosen: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor
    listed: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """One token per row and what is known about it; tensors [B] on the device of the logits.

    `tokens` int64: the drawn token, -1 where `valid` bool is False (the row held a NaN, +inf, or no token at all).
    `kl` float32 is KL(fused || reference) and `flips` bool whether the two have different best tokens, both of the raw
    law. `raw` is the fused law before adjustments, temperature and filters, `processed` the one the token is drawn
    from; each is None if no row asked. `removed` float32: the probability, under the raw law, of the tokens that the
    mask of `Adjustments.removed_by` rules out, 0 for rows without; None if there is no `removed_by`. It is the mass of
    those tokens, not 1 less that of the others, so small ones are exact as well.
    """

    tokens: Tensor
    valid: Tensor
    kl: Tensor
    flips: Tensor
    raw: Logprobs | None
    processed: Logprobs | None
    removed: Tensor | None = None
