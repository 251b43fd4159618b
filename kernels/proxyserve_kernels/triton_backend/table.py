"""Build the row table of a batch on the host and bring it to the device in two copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proxyserve_kernels.controls import MIN_TEMPERATURE, Adjustments, PickControls
from proxyserve_kernels.rows import ABSENT, BLOCK, CLIP, DTYPES, FUSED, RowBatch
from proxyserve_kernels.triton_backend.device import layout

#: Loads are 16 bytes wide, so a row must begin at a multiple of this.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """Which compiled kernels a batch needs: the compile-time values that all of them share. `kind` is the dtype of all
    sources, or MIXED; `terms` and `laws` are rounded up to what is compiled."""

    kind: int
    terms: int
    laws: int
    general: bool

    def constants(self) -> dict[str, int | bool]:
        """As keyword arguments of a kernel."""
        return {"KIND": self.kind, "TERMS": self.terms, "LAWS": self.laws, "GENERAL": self.general}


#: Numbers of terms and support laws that kernels are compiled for.
TERM_COUNTS = (1, 2, 4, 8)
LAW_COUNTS = (0, 1, 2, 4)


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """`ints` int64 and `floats` float32 [bucket, columns] on the device, see `layout`; rows from `rows` on are unused.
    `keep` holds what the pointers in it point to. `listed` int64 [bucket, m] on the device: the tokens whose raw
    log-probs are wanted, -1 for none; None if no row wants any."""

    ints: Tensor
    floats: Tensor
    rows: int
    width: int
    variant: Variant
    keep: tuple[Tensor, ...]
    listed: Tensor | None = None

    @property
    def bucket(self) -> int:
        return self.ints.shape[0]

    @property
    def blocks(self) -> int:
        return self.width // BLOCK

    def weight_columns(self) -> Tensor:
        """View [bucket, terms] of the weights, for a solver to write to."""
        first = layout.TERM_FLOATS.value
        return self.floats[:, first : first + 2 * self.variant.terms : 2]

    def shift_columns(self) -> Tensor:
        """View [bucket, terms] of what is subtracted from each delta."""
        first = layout.TERM_FLOATS.value + 1
        return self.floats[:, first : first + 2 * self.variant.terms : 2]

    def threshold_columns(self) -> Tensor:
        """View [bucket, laws] of the support thresholds."""
        first = layout.TERM_FLOATS.value + 2 * self.variant.terms
        return self.floats[:, first : first + self.variant.laws]

    def last_columns(self) -> Tensor:
        """View [bucket, laws] of the last kept ids of the supports."""
        first = layout.TERM_INTS.value + layout.INTS_PER_TERM.value * self.variant.terms + 2
        return self.ints[:, first : first + 3 * self.variant.laws : 3]


def bucket_of(rows: int) -> int:
    """Rows of the table for `rows` rows of a batch: the next power of two, so that launch shapes repeat."""
    return 1 << (rows - 1).bit_length()


def fitting(count: int, sizes: Sequence[int], what: str) -> int:
    """The least of `sizes` that is at least `count`. Raises ValueError if none is."""
    for size in sizes:
        if count <= size:
            return size
    raise ValueError(f"a row has {count} {what}; the kernels are built for at most {sizes[-1]}")


def aligned(source: Tensor) -> Tensor:
    """`source`, or a copy whose rows begin at multiples of 16 bytes and may be read up to a multiple of 16 entries.

    Logits should be allocated like that in the first place (a row stride that is a multiple of 16 entries), the copy
    costs a pass over them.
    """
    rows, width = source.shape
    reach = -(-width // 16) * 16
    end = source.storage_offset() + (rows - 1) * source.stride(0) + reach
    pitch = source.stride(0) * source.element_size()
    fits = end * source.element_size() <= source.untyped_storage().nbytes()
    if fits and source.data_ptr() % ALIGNMENT == 0 and (pitch % ALIGNMENT == 0 or rows == 1):
        return source
    padded = source.new_empty(rows, reach)
    padded[:, :width] = source
    return padded


class Pointers:
    """Addresses of rows of sources."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.sources = [aligned(source) for source in sources]
        self._start = np.array([source.data_ptr() for source in self.sources], dtype=np.int64)
        self._pitch = np.array([s.stride(0) * s.element_size() for s in self.sources], dtype=np.int64)
        self._kind = np.array([DTYPES.index(source.dtype) for source in self.sources], dtype=np.int64)

    @property
    def kind(self) -> int:
        """The kind of all sources, or MIXED."""
        kinds = set(self._kind.tolist())
        return int(kinds.pop()) if len(kinds) == 1 else layout.MIXED.value

    def of(self, refs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and kinds, int64, of `refs` int64 [..., 2]; 0 where the source is negative."""
        source, row = refs[..., 0].numpy(), refs[..., 1].numpy()
        known = np.maximum(source, 0)
        address = self._start[known] + row * self._pitch[known]
        return np.where(source >= 0, address, 0), np.where(source >= 0, self._kind[known], 0)


def build_table(batch: RowBatch, controls: PickControls | None = None) -> RowTable:
    """The table of `batch`. Thresholds and shifts, which depend on the logits, are filled in on the device later.
    Raises ValueError for more terms or support laws per row than kernels are built for."""
    rules, B = batch.rules, batch.size
    supports = None if rules is None else rules.supports
    pointers = Pointers(batch.sources)
    variant = Variant(
        kind=pointers.kind,
        terms=fitting(batch.terms, TERM_COUNTS, "terms"),
        laws=fitting(0 if supports is None else supports.of.shape[1], LAW_COUNTS, "support laws"),
        general=rules is not None,
    )
    T, S = variant.terms, variant.laws
    bucket = bucket_of(B)
    ints = np.zeros((bucket, layout.ints(T, S)), dtype=np.int64)
    floats = np.zeros((bucket, layout.floats(T, S)), dtype=np.float32)
    base, base_kind = pointers.of(batch.base)
    ints[:B, layout.WIDTH.value] = batch.widths.numpy()
    ints[:B, layout.BASE.value], ints[:B, layout.BASE.value + 1] = base, base_kind
    ints[:, layout.FORCED.value] = -1
    floats[:, layout.SCALE.value] = 1.0
    floats[:, layout.LOG_MIN_P.value] = -math.inf
    floats[:, layout.BASE_WEIGHT.value] = 1.0
    floats[:, layout.CLIP_AT.value] = CLIP

    first = layout.TERM_INTS.value
    terms = ints[:B, first : first + 4 * T].reshape(B, T, 4)
    positive, positive_kind = pointers.of(batch.positive)
    negative, negative_kind = pointers.of(batch.negative)
    terms[:, : batch.terms] = np.stack([positive, positive_kind, negative, negative_kind], axis=-1)
    ints[:B, first : first + 4 * T] = terms.reshape(B, 4 * T)
    on_host = batch.weights.device.type == "cpu"
    if on_host:
        weights = np.where(positive != 0, batch.weights.numpy(), 0.0)
        at = layout.TERM_FLOATS.value
        floats[:B, at : at + 2 * batch.terms : 2] = weights

    flags = np.zeros(B, dtype=np.int64)
    if rules is not None:
        reference, reference_kind = pointers.of(rules.reference)
        ints[:B, layout.REFERENCE.value], ints[:B, layout.REFERENCE.value + 1] = reference, reference_kind
        floats[:B, layout.BASE_WEIGHT.value] = rules.base_weight.numpy()
        floats[:B, layout.POWER.value] = rules.power.numpy()
        floats[:B, layout.CLIP_AT.value] = rules.clip.numpy()
        flags |= layout.ONE_SIDED.value * rules.one_sided.numpy().astype(np.int64)
        flags |= layout.POWER_MEAN.value * ~np.isnan(rules.power.numpy())
    if supports is not None:
        address, kind = pointers.of(supports.of)
        address = np.where(supports.of[..., 0].numpy() == FUSED, layout.FUSED_LAW.value, address)
        at = layout.TERM_INTS.value + layout.INTS_PER_TERM.value * T
        laws = ints[:B, at : at + 3 * S].reshape(B, S, 3)
        laws[:, : address.shape[1], 0], laws[:, : kind.shape[1], 1] = address, kind
        ints[:B, at : at + 3 * S] = laws.reshape(B, 3 * S)
        flags |= layout.SUPPORTED.value * (supports.of[..., 0] != ABSENT).any(dim=1).numpy()
        flags |= layout.REMOVES.value * supports.removes.numpy()
    keep: tuple[Tensor, ...] = (*pointers.sources,)
    listed = None
    if controls is not None:
        flags |= _write_controls(ints[:B], floats[:B], controls)
        if controls.adjustments is not None:
            keep += _write_adjustments(ints[:B], floats[:B], controls.adjustments, batch)
        if controls.listed is not None and controls.listed.shape[1]:
            listed = np.full((bucket, controls.listed.shape[1]), -1, dtype=np.int64)
            listed[:B] = controls.listed.numpy()
    ints[:B, layout.FLAGS.value] = flags

    table = RowTable(
        _send(ints, batch.device),
        _send(floats, batch.device),
        B,
        batch.width,
        variant,
        keep,
        None if listed is None else _send(listed, batch.device),
    )
    if not on_host:
        present = torch.from_numpy(positive != 0).to(batch.device, non_blocking=True)
        table.weight_columns()[:B, : batch.terms] = torch.where(present, batch.weights, 0.0)
    return table


def _write_controls(ints: np.ndarray, floats: np.ndarray, controls: PickControls) -> np.ndarray:
    """Sampling parameters; returns the rows' flags int64 [B]."""
    temperature = controls.temperature.numpy()
    top_k, top_p, min_p = controls.top_k.numpy(), controls.top_p.numpy(), controls.min_p.numpy()
    greedy = temperature < MIN_TEMPERATURE
    filtered = ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)) & ~greedy
    floats[:, layout.SCALE.value] = np.where(greedy, 1.0, 1.0 / np.where(greedy, 1.0, temperature))
    floats[:, layout.TOP_P.value] = top_p
    with np.errstate(divide="ignore"):
        floats[:, layout.LOG_MIN_P.value] = np.log(min_p)
    ints[:, layout.SEED.value] = controls.seeds.numpy()
    ints[:, layout.POSITION.value] = controls.positions.numpy()
    ints[:, layout.TOP_K.value] = np.minimum(top_k, ints[:, layout.WIDTH.value])
    if controls.forced is not None:
        ints[:, layout.FORCED.value] = controls.forced.numpy()
    ints[:, layout.LISTED_RAW.value] = _listed(controls.raw)
    ints[:, layout.LISTED_PROCESSED.value] = np.where(greedy, 0, _listed(controls.processed))
    return layout.GREEDY.value * greedy.astype(np.int64) + layout.FILTERED.value * filtered.astype(np.int64)


def _listed(wishes: Sequence[int | None] | None) -> np.ndarray:
    """Tokens to list per row: the most that any row asked for, for each row that asked."""
    most = max((wish for wish in wishes or () if wish is not None), default=0)
    return np.array([0 if wish is None else most for wish in wishes or (0,)])


def _write_adjustments(
    ints: np.ndarray, floats: np.ndarray, adjustments: Adjustments, batch: RowBatch
) -> tuple[Tensor, ...]:
    """Dense rows of bias and counts for the rows that have any, made on the device; returns what must stay alive."""
    kept: list[Tensor] = []

    def dense(rows: Tensor, ids: Tensor, values: Tensor, column: int) -> None:
        if not rows.numel():
            return
        own, place = torch.unique(rows, return_inverse=True)
        device = batch.device
        table = torch.zeros(own.shape[0], batch.width, dtype=values.dtype, device=device)
        table[place.to(device), ids.to(device)] = values.to(device)
        address = table.data_ptr() + np.arange(own.shape[0]) * table.stride(0) * table.element_size()
        ints[own.numpy(), column] = address
        kept.append(table)

    dense(adjustments.bias_rows, adjustments.bias_ids, adjustments.bias_values, layout.BIAS.value)
    counts = adjustments.counts.to(torch.int32) + 1
    dense(adjustments.seen_rows, adjustments.seen_ids, counts, layout.COUNTS.value)
    rows = adjustments.seen_rows.numpy()
    floats[rows, layout.REPETITION.value] = adjustments.repetition.numpy()
    floats[rows, layout.REPETITION_INVERSE.value] = adjustments.repetition.reciprocal().numpy()
    floats[rows, layout.PRESENCE.value] = adjustments.presence.numpy()
    floats[rows, layout.FREQUENCY.value] = adjustments.frequency.numpy()
    if adjustments.masks is not None and adjustments.mask_of is not None:
        masks = adjustments.masks.contiguous().to(batch.device, non_blocking=True)
        for of, column in (
            (adjustments.mask_of, layout.MASK.value),
            (adjustments.removed_by, layout.REMOVED_BY.value),
        ):
            if of is not None:
                number = of.numpy()
                address = masks.data_ptr() + np.maximum(number, 0) * masks.stride(0) * masks.element_size()
                ints[:, column] = np.where(number >= 0, address, 0)
        ints[:, layout.MASK_WORDS.value] = masks.shape[1]
        kept.append(masks)
    return tuple(kept)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
