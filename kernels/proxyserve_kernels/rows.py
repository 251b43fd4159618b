"""The row contract: which rows of which models' logits make up each fused row, and how.

    linear (every row by default):   s = base_weight * base + sum over terms of weight * (positive - negative)

Each row of the batch names its own base row and any number of terms, in tensors of different models, widths, strides
and dtypes. Proxy-tuning (Liu et al. 2024, arXiv 2401.08565) is the case "positive = tuned, negative = untuned"; a row
without terms is its base alone. `Rules` holds what is not linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

#: The unit of every reduction over the vocabulary, and of sampling: 256 tokens. A row's blocks are always combined in
#: the same order, so neither the batch around a row nor the size of a kernel's tiles can change a bit of its result.
BLOCK = 256

#: Default of `Rules.clip`, in nats.
CLIP = 50.0

#: Source number of "no row here" in `positive`, `negative` and `Supports.of`.
ABSENT = -1

#: Source number, in `Supports.of`, of the fused law itself (before its support mask).
FUSED = -2

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Ref(NamedTuple):
    """One row of logits: `sources[source][row]`."""

    source: int
    row: int


class Term(NamedTuple):
    """`weight * (positive - negative)`; without a negative the positive row alone."""

    positive: Ref
    negative: Ref | None = None
    weight: float = 1.0


class Support(NamedTuple):
    """Keep tokens that are likely under at least one of the laws `of` (each a model's row by itself, or FUSED).

    A law keeps its nucleus: min-p, then top-k, then top-p, as in `PickControls`. Outside, a token is removed ("mask")
    or keeps the score it has without any term ("base").
    """

    of: tuple[Ref | Literal[-2], ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    outside: Literal["mask", "base"] = "mask"


class Row(NamedTuple):
    """One fused row, spelled out; `RowBatch.of` turns a list of these into the arrays of a batch.

    `width`: ids from here on score -inf. `power`: None for the sum, else the exponent r of the power mean
    `log((sum of w_m * p_m ** r) ** (1 / r))` of the normalised base (weight `base_weight`) and terms (each a positive
    row alone); r = 0 is the weighted sum of log-probs, +-inf the largest or smallest of them. `one_sided`: a term adds
    `weight * max(0, positive - negative)` of the normalised rows. `normalise`: terms are made of log-softmax rows, not
    raw logits (a difference by a constant, which only a support with outside "base" or a power mean can see).
    `reference`: the law that KL and flips compare with, by default the base.
    """

    base: Ref
    width: int
    terms: tuple[Term, ...] = ()
    base_weight: float = 1.0
    power: float | None = None
    one_sided: bool = False
    normalise: bool = False
    support: Support | None = None
    reference: Ref | None = None
    clip: float = CLIP


@dataclass(frozen=True, slots=True, eq=False)
class Supports:
    """`Support` of each row as arrays. `of` int64 [B, S, 2] with (source, row) entries, source ABSENT where unused and
    FUSED for the fused law; a row whose entries are all unused has no support. `top_k` int64 [B], `top_p`, `min_p`
    float32 [B], `removes` bool [B] (outside is "mask")."""

    of: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    removes: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """The non-linear parts of a batch; fields as in `Row`. `base_weight`, `power` (NaN: the sum) and `clip` float32
    [B], `one_sided` and `normalise` bool [B], `reference` int64 [B, 2] with (source, row) entries.

    `clip`, in nats: a token that one row of a pair rules out (-inf) and the other does not moves the score by this
    much, not by infinity; an infinite delta would turn a negative weight or an absent token into certainty or NaN.
    """

    base_weight: Tensor
    power: Tensor
    one_sided: Tensor
    normalise: Tensor
    clip: Tensor
    reference: Tensor
    supports: Supports | None = None

    def __post_init__(self) -> None:
        if bool((self.one_sided & ~self.power.isnan()).any()):
            raise ValueError("a power mean has no one-sided terms")


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """B rows to fuse, each with at most T terms.

    `sources`: logits, each [rows, width] of float32, float16 or bfloat16 on one device, entries of a row adjacent.
    The descriptors are host tensors: `base` int64 [B, 2] with (source, row) entries; `widths` int64 [B], at least 1
    and at most the width of every source the row reads; `positive` and `negative` int64 [B, T, 2], source ABSENT where
    there is none. `weights` float32 [B, T], on the host or on the device (a solver writes it there).
    Raises ValueError for shapes, sources or dtypes that do not fit.
    """

    sources: tuple[Tensor, ...]
    base: Tensor
    widths: Tensor
    positive: Tensor
    negative: Tensor
    weights: Tensor
    rules: Rules | None = None

    def __post_init__(self) -> None:
        B, T = self.positive.shape[:2]
        shapes = {
            "base": (self.base, (B, 2)),
            "widths": (self.widths, (B,)),
            "positive": (self.positive, (B, T, 2)),
            "negative": (self.negative, (B, T, 2)),
            "weights": (self.weights, (B, T)),
        }
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        if B == 0 or not self.sources:
            raise ValueError("a batch needs at least one row and one source")
        for number, source in enumerate(self.sources):
            if source.dtype not in DTYPES or source.dim() != 2 or source.stride(1) != 1:
                raise ValueError(
                    f"source {number} must be a [rows, width] tensor of float32, float16 or bfloat16 whose rows are "
                    f"contiguous; it is {source.dtype} {tuple(source.shape)} with strides {source.stride()}"
                )
            if source.device != self.sources[0].device:
                raise ValueError(
                    f"source {number} is on {source.device}, source 0 on {self.sources[0].device}"
                )
        self._check_refs("base", self.base, self.widths)
        widths = self.widths[:, None].expand(B, T)
        self._check_refs("positive", self.positive, widths, allowed=(ABSENT,))
        self._check_refs("negative", self.negative, widths, allowed=(ABSENT,))
        if bool(((self.positive[..., 0] == ABSENT) & (self.negative[..., 0] != ABSENT)).any()):
            raise ValueError("a term without a positive row has a negative one")
        if self.rules is not None:
            self._check_refs("reference", self.rules.reference, self.widths)
            pairs = (self.negative[..., 0] != ABSENT).any(dim=1)
            if bool((pairs & ~self.rules.power.isnan()).any()):
                raise ValueError("a power mean is of single rows: its terms have no negative")
            supports = self.rules.supports
            if supports is not None:
                widths = self.widths[:, None].expand(supports.of.shape[:2])
                self._check_refs("supports.of", supports.of, widths, allowed=(ABSENT, FUSED))

    def _check_refs(self, name: str, refs: Tensor, widths: Tensor, allowed: tuple[int, ...] = ()) -> None:
        """Every (source, row) lies inside a source at least as wide as its fused row."""
        source, row = refs[..., 0].flatten().numpy(), refs[..., 1].flatten().numpy()
        width = widths.flatten().numpy()
        present = source >= 0
        lowest = min(allowed, default=0)
        if ((source < lowest) | (source >= len(self.sources))).any() or (not allowed and not present.all()):
            raise ValueError(f"{name} names a source that is not there")
        source, row, width = source[present], row[present], width[present]
        heights, widths_of = np.array([tensor.shape for tensor in self.sources]).T
        absent = (row < 0) | (row >= heights[source])
        if absent.any():
            number = source[absent][0]
            raise ValueError(
                f"{name} names a row that source {number} with {heights[number]} rows does not have"
            )
        wide = (width < 1) | (width > widths_of[source])
        if wide.any():
            number = source[wide][0]
            raise ValueError(f"a row is wider than source {number}, which {name} names, or has no width")

    @classmethod
    def of(cls, sources: Sequence[Tensor], rows: Sequence[Row]) -> RowBatch:
        """The arrays of `rows`. Convenient, one Python object per row; a server fills the arrays itself."""
        T = max((len(row.terms) for row in rows), default=0)
        absent = (ABSENT, 0)
        positive = [[*(t.positive for t in row.terms), *[absent] * (T - len(row.terms))] for row in rows]
        negative = [
            [*(t.negative or absent for t in row.terms), *[absent] * (T - len(row.terms))] for row in rows
        ]
        weights = [[*(t.weight for t in row.terms), *[0.0] * (T - len(row.terms))] for row in rows]
        B = len(rows)
        return cls(
            sources=tuple(sources),
            base=_ints([row.base for row in rows]).view(B, 2),
            widths=_ints([row.width for row in rows]),
            positive=_ints(positive).view(B, T, 2),
            negative=_ints(negative).view(B, T, 2),
            weights=_floats(weights).view(B, T),
            rules=_rules(rows),
        )

    @property
    def size(self) -> int:
        return self.base.shape[0]

    @property
    def terms(self) -> int:
        """T, the most terms that any row has."""
        return self.positive.shape[1]

    @property
    def width(self) -> int:
        """Columns of fused scores: the widest row, rounded up to whole blocks."""
        return -(-int(self.widths.max()) // BLOCK) * BLOCK

    @property
    def device(self) -> torch.device:
        return self.sources[0].device

    def linear(self, rows: Tensor | None = None) -> RowBatch:
        """The same rows, or only `rows` int64 [n] of them, as plain sums on top of their base: no rule but the clip."""
        every = torch.arange(self.size)
        if self.rules is None and (rows is None or torch.equal(rows, every)):
            return self
        every = every if rows is None else rows
        clip = None if self.rules is None else self.rules.clip[every]
        n, base = every.shape[0], self.base[every]
        return RowBatch(
            sources=self.sources,
            base=base,
            widths=self.widths[every],
            positive=self.positive[every],
            negative=self.negative[every],
            weights=self.weights[every.to(self.weights.device)],
            rules=None
            if clip is None or bool((clip == CLIP).all())
            else Rules(
                base_weight=torch.ones(n),
                power=torch.full((n,), math.nan),
                one_sided=torch.zeros(n, dtype=torch.bool),
                normalise=torch.zeros(n, dtype=torch.bool),
                clip=clip,
                reference=base,
            ),
        )

    def with_weights(self, weights: Tensor) -> RowBatch:
        """The same rows with other weights, float32 [B, T]."""
        return replace(self, weights=weights)


def _rules(rows: Sequence[Row]) -> Rules | None:
    plain = Row(Ref(0, 0), 1)
    if all(row[3:] == plain[3:] for row in rows):
        return None
    return Rules(
        base_weight=_floats([row.base_weight for row in rows]),
        power=_floats([math.nan if row.power is None else row.power for row in rows]),
        one_sided=torch.tensor([row.one_sided for row in rows]),
        normalise=torch.tensor([row.normalise for row in rows]),
        clip=_floats([row.clip for row in rows]),
        reference=_ints([row.reference or row.base for row in rows]),
        supports=_supports(rows),
    )


def _supports(rows: Sequence[Row]) -> Supports | None:
    if all(row.support is None for row in rows):
        return None
    none = Support(of=())
    supports = [row.support or none for row in rows]
    S = max(len(support.of) for support in supports)
    of = [
        [
            *((FUSED, 0) if law == FUSED else law for law in support.of),
            *[(ABSENT, 0)] * (S - len(support.of)),
        ]
        for support in supports
    ]
    return Supports(
        of=_ints(of).view(len(rows), S, 2),
        top_k=_ints([support.top_k for support in supports]),
        top_p=_floats([support.top_p for support in supports]),
        min_p=_floats([support.min_p for support in supports]),
        removes=torch.tensor([support.outside == "mask" for support in supports]),
    )


def _ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
