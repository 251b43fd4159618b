"""Logits to measure on. Random, never zeros: some hardware is faster on zeros."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels import PickControls, Ref, Row, RowBatch, Term
from proxyserve_kernels.rows import BLOCK

#: Standard deviation of normal base logits. "sharp": a handful of tokens hold nearly everything, as in most steps of a
#: language model; "mid": some hundreds; "flat": tens of thousands, as from a model that is far out of its depth. The
#: fused law is a little sharper (the pair adds noise of 0.5) and measured at the temperature of the run.
SHAPES = {"sharp": 6.0, "mid": 3.5, "flat": 1.0}
SHAPES_NOTE = "logits N(0, s), s = " + ", ".join(f"{s:g} {name}" for name, s in SHAPES.items())


def lanes(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    count: int = 3,
    *,
    shape: str = "sharp",
    seed: int = 0,
) -> list[Tensor]:
    """`count` models' logits [rows, vocabulary]: a base of the given shape, then pairs: an untuned model N(0, 2) and a
    tuned one that differs from it by N(0, 0.5). Rows are allocated at multiples of 256 entries."""
    generator = torch.Generator(device).manual_seed(seed)
    pitch = -(-vocabulary // BLOCK) * BLOCK

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, pitch, device=device, generator=generator)

    sources = [noise(SHAPES[shape]).to(dtype)]
    while len(sources) < count:
        untuned = noise(2.0)
        sources += [(untuned + noise(0.5)).to(dtype), untuned.to(dtype)]
    return [source[:, :vocabulary] for source in sources[:count]]


def fused_batch(sources: list[Tensor], weight: float = 1.0) -> RowBatch:
    """Row r of every source: the first is the base, then pairs of positive and negative."""
    rows, vocabulary = sources[0].shape
    positives = range(1, len(sources) - 1, 2)
    return RowBatch.of(
        sources,
        [
            Row(
                Ref(0, row),
                vocabulary,
                tuple(Term(Ref(first, row), Ref(first + 1, row), weight) for first in positives),
            )
            for row in range(rows)
        ],
    )


def controls(
    rows: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logprobs: int | None = None,
    compare: bool = False,
) -> PickControls:
    """The same wishes for every row, its own seed for each."""
    return replace(
        PickControls.greedy(rows),
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        seeds=torch.arange(rows),
        positions=torch.arange(rows),
        raw=(logprobs,) * rows,
        compare=compare,
    )
