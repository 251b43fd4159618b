"""Random batches and controls with everything awkward in them, and what float32 may get wrong about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from proxyserve_kernels import (
    FUSED,
    Adjustments,
    Backend,
    PickControls,
    Ref,
    Row,
    RowBatch,
    Support,
    Term,
)
from proxyserve_kernels import reference as slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: Around one block, around whole blocks, and one of many blocks that no power of two divides.
WIDTHS = (1, 2, 31, 255, 256, 257, 1000, 4099)

#: What lies in a source beyond the width of the row that reads it.
GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 7.0)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """A batch and what is asked of it."""

    batch: RowBatch
    controls: PickControls


def interpreted(backend: Backend) -> bool:
    """Whether a call takes a tenth of a second instead of a millisecond."""
    return backend.name == "triton" and DEVICE.type != "cuda"


def examples(backend: Backend, count: int, interpreted_count: int) -> Callable[..., Any]:
    """Hypothesis settings for tests that run on both backends: the same examples every time."""
    return settings(
        max_examples=interpreted_count if interpreted(backend) else count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Shrinking a failure would take the interpreter many minutes.
        phases=[Phase.generate] if interpreted(backend) else tuple(Phase),
    )


def widths_for(backend: Backend) -> tuple[int, ...]:
    """Vocabulary sizes that the backend gets through in time."""
    return tuple(width for width in WIDTHS if width <= 257) if interpreted(backend) else WIDTHS


def ints(values: Sequence[object]) -> Tensor:
    """int64, on the host."""
    return torch.tensor(values, dtype=torch.int64)


def floats(values: Sequence[object]) -> Tensor:
    """float32, on the host."""
    return torch.tensor(values, dtype=torch.float32)


def spread(rows: Sequence[Tensor], dtype: torch.dtype, padding: int, gap: int, garbage: float) -> Tensor:
    """`rows` (each [own width] float32) as a source [n, widest + padding] whose rows lie `gap` further apart than they
    are wide; everything that is no row's is `garbage`."""
    width = max(len(row) for row in rows) + padding
    storage = torch.full((len(rows), width + gap), garbage).to(dtype)
    for number, row in enumerate(rows):
        storage[number, : len(row)] = row.to(dtype)
    return storage.to(DEVICE)[:, :width]


def source(*rows: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """A plain source [n, V] of rows of equal length."""
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


SHAPES = ("smooth", "sharp", "ties", "equal", "holes", "lone", "shifted")


def logits(generator: torch.Generator, width: int, shape: str) -> Tensor:
    """float32 [width]; at least one entry is finite."""
    values = torch.randn(width, generator=generator)
    match shape:
        case "smooth":
            return 2 * values
        case "sharp":
            return 8 * values
        case "ties":
            return (2 * values).round()
        case "equal":
            return torch.full((width,), 1.5)
        case "shifted":
            return 2 * values + 300
    holes = torch.rand(width, generator=generator) < (0.3 if shape == "holes" else 2.0)
    holes[int(torch.randint(width, (1,), generator=generator))] = False
    return (3 * values).masked_fill(holes, -math.inf)


class Builder:
    """Collects rows of logits into sources of several dtypes, then makes the batch."""

    def __init__(
        self, generator: torch.Generator, layouts: Sequence[tuple[torch.dtype, int, int, float]]
    ) -> None:
        self.generator = generator
        self.layouts = layouts
        self.rows: list[list[Tensor]] = [[] for _ in layouts]

    def add(self, source: int, values: Tensor) -> Ref:
        """Put `values` [width] into source number `source`."""
        self.rows[source].append(values)
        return Ref(source, len(self.rows[source]) - 1)

    def batch(self, rows: Sequence[Row]) -> RowBatch:
        """Every row reads its own source rows, which are shuffled so that no order can be relied on."""
        places = [torch.randperm(len(held), generator=self.generator).tolist() for held in self.rows]
        used = [number for number, held in enumerate(self.rows) if held]
        sources = []
        for number in used:
            held: list[Tensor] = [torch.empty(0)] * len(self.rows[number])
            for old, new in enumerate(places[number]):
                held[new] = self.rows[number][old]
            sources.append(spread(held, *self.layouts[number]))

        def moved(ref: Ref) -> Ref:
            return Ref(used.index(ref.source), places[ref.source][ref.row])

        def moved_row(row: Row) -> Row:
            terms = tuple(
                Term(moved(t.positive), None if t.negative is None else moved(t.negative), t.weight)
                for t in row.terms
            )
            support = row.support
            if support is not None:
                laws = tuple(moved(law) if isinstance(law, Ref) else law for law in support.of)
                support = support._replace(of=laws)
            reference = None if row.reference is None else moved(row.reference)
            return row._replace(base=moved(row.base), terms=terms, support=support, reference=reference)

        return RowBatch.of(sources, [moved_row(row) for row in rows])


WEIGHTS = st.one_of(st.sampled_from((0.0, 1.0, -1.0, 0.5, 1e4)), st.floats(-3, 3, width=32))
POWERS = (math.inf, -math.inf, 0.0, 1.0, -1.0, 0.5, 2.0, -3.0)
TOP_P = (0.0, 1e-7, 0.3, 0.9, 0.999, 1.0)
MIN_P = (0.0, 1e-6, 0.1, 1.0)


@st.composite
def batches(
    draw: st.DrawFn,
    widths: Sequence[int] = WIDTHS,
    most_rows: int = 4,
    most_terms: int = 4,
    rules: bool = True,
    shapes: Sequence[str] = SHAPES,
    huge: bool = True,
) -> RowBatch:
    """Rows of different widths, dtypes, strides, numbers of terms and, with `rules`, every other field of `Row`. No row
    is bad by itself; `huge` allows weights of 1e4 (where every score stays finite in float32)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    layouts = [
        (
            draw(st.sampled_from(DTYPES)),
            draw(st.sampled_from((0, 1, 7, 300))),
            draw(st.sampled_from((0, 5, 64))),
            draw(st.sampled_from(GARBAGE)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    builder = Builder(generator, layouts)
    widest = draw(st.sampled_from(tuple(widths)))
    weights = WEIGHTS if huge else WEIGHTS.filter(lambda weight: abs(weight) <= 3)

    def new(width: int, shape: str | None = None) -> Ref:
        number = draw(st.integers(0, len(layouts) - 1))
        return builder.add(number, logits(generator, width, shape or draw(st.sampled_from(tuple(shapes)))))

    rows = []
    for _ in range(draw(st.integers(1, most_rows))):
        width = max(1, widest - draw(st.sampled_from((0, 0, 1, 5, 300))))
        row = Row(new(width), width)
        mean = rules and draw(st.integers(0, 3)) == 0
        terms = []
        for _ in range(draw(st.integers(0, most_terms))):
            negative = None if mean or draw(st.integers(0, 3)) == 0 else new(width)
            weight = draw(st.floats(0, 2, width=32)) if mean else draw(weights)
            terms.append(Term(new(width), negative, weight))
        row = row._replace(terms=tuple(terms))
        if mean:
            row = row._replace(
                power=draw(st.sampled_from(POWERS)), base_weight=draw(st.sampled_from((0.25, 1.0, 1.0)))
            )
        elif rules:
            row = row._replace(
                base_weight=draw(st.sampled_from((1.0, 1.0, 1.0, 0.0, 0.5, -1.0))),
                one_sided=draw(st.booleans()),
                normalise=draw(st.booleans()),
                clip=draw(st.sampled_from((50.0, 50.0, 3.0))),
            )
        if rules and draw(st.booleans()):
            row = row._replace(reference=new(width))
        if rules and draw(st.booleans()):
            laws = [draw(st.sampled_from((FUSED, "base", "new"))) for _ in range(draw(st.integers(1, 3)))]
            named = {"base": lambda row=row: row.base, "new": lambda width=width: new(width)}
            row = row._replace(
                support=Support(
                    tuple(FUSED if law == FUSED else named[str(law)]() for law in laws),
                    draw(st.sampled_from((0, 1, 5, width, width + 1))),
                    draw(st.sampled_from(TOP_P)),
                    draw(st.sampled_from(MIN_P)),
                    draw(st.sampled_from(("mask", "base"))),
                )
            )
        rows.append(row)
    return builder.batch(rows)


@st.composite
def picks(draw: st.DrawFn, batch: RowBatch, adjust: bool = True) -> PickControls:
    """Controls for `batch`; every row asks for the whole of its processed law."""
    B, widths = batch.size, batch.widths.tolist()
    each = range(B)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    asked = [None if draw(st.integers(0, 3)) == 0 else draw(st.sampled_from((0, 1, 3, 40))) for _ in each]
    return PickControls(
        temperature=floats([draw(st.sampled_from((0.0, 1e-4, 0.7, 1.0, 1.0, 1.5))) for _ in each]),
        top_k=ints([draw(st.sampled_from((0, 0, 1, 2, 40, widths[r], widths[r] + 1))) for r in each]),
        top_p=floats([draw(st.sampled_from(TOP_P)) for _ in each]),
        min_p=floats([draw(st.sampled_from((0.0, 0.0, *MIN_P))) for _ in each]),
        seeds=ints([draw(st.sampled_from((0, -1, 2**63 - 1, -(2**63), 12345))) for _ in each]),
        positions=ints([draw(st.sampled_from((0, 1, 77, 2**31, 2**32 - 1))) for _ in each]),
        raw=asked,
        processed=widths,
        adjustments=adjustments(generator, widths) if adjust and draw(st.booleans()) else None,
        listed=ints(
            [[draw(st.sampled_from((-1, 0, w - 1, w, w // 2, 2**33))) for _ in range(3)] for w in widths]
        )
        if draw(st.booleans())
        else None,
    )


def adjustments(generator: torch.Generator, widths: Sequence[int]) -> Adjustments:
    """Some bias, penalties and a grammar mask for about half the rows; each leaves some token possible. The removed
    mass is that of the mask that is applied, of another one or of none."""
    bias: list[tuple[int, int, float]] = []
    seen: list[tuple[int, int, float, float, float, float]] = []
    mask_of, removed_by, masks = [], [], []
    words = -(-max(widths) // 32)
    for row, width in enumerate(widths):
        coins = torch.rand(4, generator=generator).tolist()
        if coins[0] < 0.5:
            ids = torch.randperm(width, generator=generator)[:5].tolist()
            bias += [
                (row, token, -math.inf if place and not place % 3 else 1.5) for place, token in enumerate(ids)
            ]
        if coins[1] < 0.5:
            ids = torch.randperm(width, generator=generator)[:20].tolist()
            seen += [(row, token, float(place % 4), 1.3, 0.5, 0.25) for place, token in enumerate(ids)]
        mask_of.append(-1)
        if coins[2] < 0.5:
            mask_of[-1] = len(masks)
            # Signed 32-bit words, the sign bit included.
            masks.append(torch.randint(-(2**31), 2**31, (words,), generator=generator))
        removed_by.append(-1)
        if masks and coins[3] < 0.7:
            removed_by[-1] = mask_of[-1] if coins[3] < 0.4 else len(masks) - 1
    columns = list(zip(*bias, strict=True)) or [(), (), ()]
    seen_columns = list(zip(*seen, strict=True)) or [()] * 6
    made = replace(
        Adjustments.none(),
        bias_rows=ints(columns[0]),
        bias_ids=ints(columns[1]),
        bias_values=floats(columns[2]),
        seen_rows=ints(seen_columns[0]),
        seen_ids=ints(seen_columns[1]),
        counts=floats(seen_columns[2]),
        repetition=floats(seen_columns[3]),
        presence=floats(seen_columns[4]),
        frequency=floats(seen_columns[5]),
    )
    if not masks:
        return made
    return replace(
        made,
        masks=torch.stack(masks).to(torch.int32),
        mask_of=ints(mask_of),
        removed_by=ints(removed_by),
    )


def rounding(batch: RowBatch, row: int) -> float:
    """How far, in nats, a fused float32 score may lie from the float64 one: about ten roundings of the largest number
    that takes part in it."""
    spec = slow.row_of(batch, row)
    largest = abs(spec.base_weight) * _largest(slow.lane(batch, spec.base, spec.width))
    for term in spec.terms:
        sizes = [_largest(slow.lane(batch, term.positive, spec.width)), spec.clip]
        if term.negative is not None:
            sizes.append(_largest(slow.lane(batch, term.negative, spec.width)))
        largest += abs(term.weight) * (max(sizes) + 10)
    if spec.power is not None:
        # The mean divides by r, and takes the log of sums whose terms r stretches.
        stretch = abs(spec.power) if 0 < abs(spec.power) < math.inf else 1.0
        largest = (largest + 20) * max(stretch, 1 / stretch)
    return 1e-6 * (largest + 10)


def _largest(values: Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def support_is_clear(batch: RowBatch, row: int, tolerance: float) -> bool:
    """Whether a change of every score by `tolerance` leaves the row's support as it is."""
    spec = slow.row_of(batch, row)
    if spec.support is None:
        return True
    plain = spec._replace(support=None)
    fused = slow.linear(batch, plain) if spec.power is None else slow.power_mean(batch, plain)
    filters = spec.support[1:4]
    for law in spec.support.of:
        own = slow.lane(batch, law, spec.width) if isinstance(law, Ref) else fused
        if not clear_cut(own, *filters, tolerance=tolerance if law == FUSED else 1e-5):
            return False
    return True


def clear_cut(scores: Tensor, top_k: int, top_p: float, min_p: float, tolerance: float) -> bool:
    """Whether float32 cannot mistake what the filters keep of `scores` [V]: no removed token within reach of the last
    kept one, and no threshold within reach of the mass or the floor it is compared with."""
    order = slow.ordered_ids(scores)
    kept = slow.kept_ids(scores, top_k, top_p, min_p)
    if not kept:
        return True
    values = [float(scores[token]) for token in order]
    law = torch.softmax(scores.double(), dim=0)
    if min_p > 0 and any(
        abs(v - values[0] - math.log(min_p)) < 4 * tolerance for v in values if v != values[0]
    ):
        return False
    # An exact tie is broken by id alike in any precision only if the tied scores came out of the same numbers.
    if len(kept) < len(order) and values[len(kept) - 1] - values[len(kept)] < 4 * tolerance:
        return False
    if top_p < 1:
        alive = slow.kept_ids(scores, top_k, 1.0, min_p)
        total = float(law[alive].sum())
        mass = law[kept].cumsum(dim=0)
        reached = mass[-2:] if len(kept) > 1 else mass
        if any(abs(float(m) - top_p * total) < 4 * tolerance + 1e-6 for m in reached):
            return False
    return True
