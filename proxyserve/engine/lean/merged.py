"""Several linear layers of one input as one product."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def merge(layers: Sequence[nn.Linear]) -> nn.Linear:
    """A layer whose outputs are those of all layers side by side. They must have inputs of one size, and all of them a
    bias or none."""
    first = layers[0]
    outputs = sum(layer.out_features for layer in layers)
    merged = nn.Linear(first.in_features, outputs, bias=first.bias is not None, device="meta")
    merged.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if first.bias is not None:
        merged.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return merged


class Part(nn.Module):
    """Stands where a layer was that is a part of a merged one now: under the name that adapters know, with its sizes.
    Hooks on it, which may change the output in place, see its part of the merged layer's."""

    def __init__(self, owner: nn.Module, name: str, rows: slice, in_features: int) -> None:
        """The owner's module `name` makes the features `rows`."""
        super().__init__()
        self.in_features = in_features
        self.out_features = rows.stop - rows.start
        # Found anew each time, since the merged layer itself may be replaced by one that is laid out in another way.
        # Weakly: a tree that shares this part, which has no weights, must not hold the owner's.
        self._owner = weakref.ref(owner)
        self._name = name
        self._rows = rows

    def register_forward_hook(  # type: ignore[override]  # what else a module's own takes, adapters do not need
        self, hook: Callable[[nn.Module, tuple[Any, ...], Tensor], None]
    ) -> RemovableHandle:
        """The hook changes the output in place."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError("the layer that this was a part of is gone")

        def on_part(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            hook(self, inputs, output[..., self._rows])

        return owner.get_submodule(self._name).register_forward_hook(on_part)


def parts(owner: nn.Module, name: str, layers: Sequence[nn.Linear]) -> list[Part]:
    """What stands where each of the merged layers was."""
    found, start = [], 0
    for layer in layers:
        stop = start + layer.out_features
        found.append(Part(owner, name, slice(start, stop), layer.in_features))
        start = stop
    return found
