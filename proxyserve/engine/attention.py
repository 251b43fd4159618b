"""Paged attention behind the attention registry of transformers.

A model runs on one packed row of tokens from many lanes. Its layers call `paged_attention`, which writes the new keys
and values into the model's KV blocks and lets every token attend to its own lane's blocks. Where a lane's tokens
are is described by an `AttentionPlan`, made once per forward and found through a context variable, so that model
classes that do not pass keyword arguments down work too.

        packed row:   a a a | b | c | d d        ids of lanes a, b, c, d
        spans:        chunks    single chunks    lanes with one token share one padded call, longer chunks likewise
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from proxyserve.engine.kv_storage import KVStorage, LayerShape

#: The name under which `paged_attention` is registered.
IMPLEMENTATION = "proxyserve_paged"

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `start` to `start + count` of one lane, and the blocks that hold the lane."""

    blocks: Sequence[int]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class SpanTable:
    """The spans of a packed row as arrays, int64 on the host: `starts`, `counts` and `offsets` (of their first token in
    the packed row) [n], `blocks` [n, most], padded with 0."""

    starts: Numbers
    counts: Numbers
    offsets: Numbers
    blocks: Numbers

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int) -> SpanTable:
        starts = np.array([span.start for span in spans], dtype=np.int64)
        counts = np.array([span.count for span in spans], dtype=np.int64)
        used = -(-(starts + counts) // block_size)
        blocks = np.zeros((len(spans), used.max()), dtype=np.int64)
        for row, (span, number) in enumerate(zip(spans, used.tolist(), strict=True)):
            blocks[row, :number] = span.blocks[:number]
        return cls(starts, counts, np.cumsum(counts) - counts, blocks)

    def slots(self, block_size: int) -> Numbers:
        """Where each token of the packed row is stored, [tokens]."""
        if self.counts.max() == 1:
            return self.blocks[np.arange(len(self.starts)), self.starts // block_size] * block_size + (
                self.starts % block_size
            )
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        positions = np.arange(len(owners)) - self.offsets[owners] + self.starts[owners]
        return self.blocks[owners, positions // block_size] * block_size + positions % block_size


class SpanGroup:
    """Spans of similar length that attend in one padded call.

    For n spans, the longest with q tokens and the longest context with k tokens: `query_index` [n, q] int64 picks
    tokens of the packed row (padding picks token 0 of the span), `tables` [n * blocks] int64 are block ids (padding
    repeats block 0), `positions` [n, q] int64. Padded rows are computed and thrown away; `real` [tokens] picks the
    others from the flattened [n * q]."""

    def __init__(
        self, spans: SpanTable, members: Sequence[int], block_size: int, device: torch.device
    ) -> None:
        starts, counts, offsets = spans.starts[members], spans.counts[members], spans.offsets[members]
        blocks = -(-int((starts + counts).max()) // block_size)
        self.count = len(members)
        self.queries = int(counts.max())
        self.keys = blocks * block_size
        steps = np.arange(self.queries)
        inside = steps < counts[:, None]
        query_index = offsets[:, None] + np.where(inside, steps, 0)
        self.tables = _tensor(spans.blocks[members, :blocks].ravel(), device)
        self.query_index = _tensor(query_index, device)
        self.positions = _tensor(starts[:, None] + np.where(inside, steps, 0), device)
        self.packed = _tensor(query_index[inside], device)
        self.real = _tensor(np.flatnonzero(inside), device)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, 1, q, k]: 0 where a token may look, -inf where not (the future, other lanes' leftovers
        in the last block, and what a sliding window has passed). Layers share it."""
        mask = self._masks.get((window, dtype))
        if mask is None:
            keys = torch.arange(self.keys, device=self.positions.device)
            distance = self.positions[:, :, None] - keys
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask = mask.masked_fill_(hidden, -math.inf)[:, None]
            self._masks[window, dtype] = mask
        return mask


class Plan(Protocol):
    """Where one forward's tokens live, and how they attend. `slots` [tokens] int64: the row of each packed token in a
    layer's pool seen as [num_blocks * block_size, heads, size]. `layers` counts the calls, for the check that every
    layer came by."""

    storage: KVStorage
    slots: Tensor
    layers: list[int]

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """`query` [tokens, heads, size] against the blocks of each token's lane, whose keys and values are in place ->
        [tokens, heads, value size]."""


@dataclass(slots=True)
class AttentionPlan:
    """`Plan` by gathering each lane's blocks into one padded call per group of lanes: any device, every feature."""

    storage: KVStorage
    slots: Tensor
    groups: list[SpanGroup]
    layers: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, spans: Sequence[Span], storage: KVStorage) -> AttentionPlan:
        size = storage.block_size
        device = storage.keys[0].device
        table = SpanTable.of(spans, size)
        groups = [SpanGroup(table, members, size, device) for members in _similar(spans)]
        return cls(storage, _tensor(table.slots(size), device), groups)

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        keys, values = self.storage.keys[layer], self.storage.values[layer]
        if len(self.groups) == 1 and self.groups[0].queries == 1:
            return _attend_group(how, self.groups[0], query[:, None], keys, values, window)[:, 0]
        output = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
        for group in self.groups:
            attended = _attend_group(how, group, query[group.query_index], keys, values, window)
            output[group.packed] = attended.flatten(0, 1)[group.real]
        return output


def _tensor(numbers: Numbers, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device)


def _similar(spans: Sequence[Span]) -> list[list[int]]:
    """Group spans whose lengths lie within one power of two, so that at most half of a padded call is padding."""
    groups: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        groups.setdefault((span.count - 1).bit_length(), []).append(index)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class Features:
    """What one layer's attention is like: query heads, the scale of scores, a sliding window in tokens, a soft cap,
    whether it has sinks."""

    heads: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool


@dataclass(slots=True)
class ShapeProbe:
    """Stands in for a plan when a model is first run: records what each layer would store and what its attention is
    like, lets tokens attend causally."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    features: dict[int, Features] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: SpanMath, window: int | None
    ) -> Tensor:
        """See `attend_packed`."""
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.features[layer] = Features(query.shape[1], how.scale, window, how.softcap, how.sinks is not None)
        length = query.shape[0]
        mask = torch.full((length, length), -math.inf, dtype=query.dtype, device=query.device).triu(1)
        first, second, third = (heads.transpose(0, 1)[None] for heads in (query, key, value))
        return how(first, second, third, mask)[0].transpose(0, 1)


_current: ContextVar[Plan | ShapeProbe | None] = ContextVar("proxyserve_attention", default=None)


@contextmanager
def attention_plan(plan: Plan | ShapeProbe) -> Iterator[None]:
    """Make `plan` the one that `paged_attention` uses inside the block."""
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row. `query` [1, heads, tokens, size], `key` and `value` [1, kv heads, tokens, size],
    after rotary embedding -> [1, tokens, heads, value size]. The mask argument is unused: the plan knows who sees
    whom.

    `sliding_window` in tokens (a token sees itself and `sliding_window - 1` before it), `softcap` as in Gemma 2
    (`cap * tanh(score / cap)`), `s_aux` [heads] extra logits that only take probability away (attention sinks).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attend_packed(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        SpanMath(scale, softcap, s_aux),
        sliding_window,
    )
    return output[None], None


def attend_packed(
    layer: int, query: Tensor, key: Tensor, value: Tensor, how: SpanMath, window: int | None
) -> Tensor:
    """Attention of a packed row under the plan of the forward under way. `query` [tokens, heads, size], `key` [tokens,
    kv heads, size] and `value` [tokens, kv heads, value size], after rotary embedding -> [tokens, heads, value size].
    """
    plan = _current.get()
    if plan is None:
        raise RuntimeError("a model in paged mode was run outside an attention plan")
    if isinstance(plan, ShapeProbe):
        return plan.attend(layer, query, key, value, how, window)
    keys, values = plan.storage.keys[layer], plan.storage.values[layer]
    keys.view(-1, *keys.shape[2:]).index_copy_(0, plan.slots, key)
    values.view(-1, *values.shape[2:]).index_copy_(0, plan.slots, value)
    plan.layers.append(layer)
    return plan.attend(layer, query, how, window)


def _attend_group(
    attend: SpanMath, group: SpanGroup, query: Tensor, keys: Tensor, values: Tensor, window: int | None
) -> Tensor:
    """`query` [n, q, heads, size] against the group's blocks -> [n, q, heads, value size]."""
    gathered_keys = keys.index_select(0, group.tables).view(group.count, group.keys, *keys.shape[2:])
    gathered_values = values.index_select(0, group.tables).view(group.count, group.keys, *values.shape[2:])
    mask = group.mask(window, query.dtype)
    attended = attend(
        query.transpose(1, 2), gathered_keys.transpose(1, 2), gathered_values.transpose(1, 2), mask
    )
    return attended.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class SpanMath:
    """softmax(query @ key^T * scale + mask) @ value with grouped heads, soft-capping and sinks."""

    scale: float
    softcap: float | None
    sinks: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[n, heads, q, size], [n, kv heads, k, size] twice, additive mask broadcastable to [n, 1, q, k] -> [n,
        heads, q, value size]."""
        if self.softcap is None and self.sinks is None:
            if query.shape[2] == 1 and query.shape[1] != key.shape[1]:
                # One token per span: its heads that share a key head are as good as several queries of that head.
                folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
                out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=self.scale)
                return out.reshape(query.shape[0], query.shape[1], 1, value.shape[3])
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.transpose(2, 3) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores + mask
        if self.sinks is None:
            return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sinks.to(scores.dtype)], dim=-1).float(), dim=-1)
        return weights[..., :-1].to(query.dtype) @ value


# No mask function is registered under that name, so that model classes make no masks, and do not search position ids
# for packed sequences first (which has the host wait for a GPU): the plan knows who sees whom.
AttentionInterface.register(IMPLEMENTATION, paged_attention)
