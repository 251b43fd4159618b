"""One model out of several: task arithmetic, and soups as a case of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxyserve.models.formats.diff import Change, difference, fitted
from proxyserve.models.formats.tensors import FolderTensors


def merged(
    untuned: FolderTensors,
    parts: Sequence[tuple[float, Change | FolderTensors]],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Tensor]:
    """`untuned + sum of weight * (source - untuned)` (Ilharco et al., arXiv 2212.04089): the whole state of a model, in
    memory of its own. Summed in float64, rounded to float32 and then to `dtype`, as if a full folder in float32 had
    been loaded. `progress` is told which share of the weights is done. Raises LoadError for parts of other models.

    With weights that sum to 1 this is the weighted mean of the sources (a model soup, arXiv 2203.05482)."""
    changes = [
        (weight, fitted(part if isinstance(part, Change) else difference(part, untuned), untuned))
        for weight, part in parts
    ]
    names = dict.fromkeys([*untuned.names, *(name for _, change in changes for name in change.shapes)])
    total, done = sum(math.prod(untuned.shape(name)) for name in names), 0
    state: dict[str, Tensor] = {}
    for name in names:
        value = untuned.get(name)
        touching = [(weight, change) for weight, change in changes if name in change.shapes]
        if touching:
            value = value.double()
            for weight, change in touching:
                value.add_(change.delta(name), alpha=weight)
        state[name] = value.to(torch.float32, copy=True).to(dtype)
        done += value.numel()
        progress(done / total)
    for name in names:
        twin = untuned.twin(name)
        if twin is not None and torch.equal(state[name], state[twin]):
            del state[name]  # the changes leave it tied
    return state
