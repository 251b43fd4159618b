"""The weights of a model that is another one, changed: by a diff, a compressed diff or a merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from proxyserve.experts.recipe import Ingredient
from proxyserve.models.formats.build import build_changed, scaled
from proxyserve.models.formats.compressed import read_compressed
from proxyserve.models.formats.diff import Change, difference, fitted, read_diff
from proxyserve.models.formats.lora import read_lora
from proxyserve.models.formats.merge import merged
from proxyserve.models.formats.tensors import FolderTensors


def changed_state(
    ingredient: Ingredient,
    origin: Path,
    trunk: nn.Module,
    dtype: torch.dtype,
    progress: Callable[[float], None],
) -> dict[str, Tensor]:
    """The whole state that `ingredient` makes of the model in folder `origin`, which is `trunk` in memory, in memory of
    its own. `progress` is told which share is done. Raises LoadError."""
    if ingredient.kind != "merge":
        source = ingredient.source
        first, last = (1.0, 1.0) if source.layers is None else (source.layers.first, source.layers.last)
        return build_changed(
            origin,
            _diff(ingredient),
            scale=source.scale,
            first=first,
            last=last,
            dtype=dtype,
            progress=progress,
        )
    with ExitStack() as stack:
        untuned = stack.enter_context(FolderTensors(origin))
        parts: list[tuple[float, Change | FolderTensors]] = []
        for weight, part in ingredient.parts:
            if part.kind == "folder":
                assert part.path is not None
                parts.append((weight, stack.enter_context(FolderTensors(part.path))))
                continue
            layers = part.source.layers
            first, last = (1.0, 1.0) if layers is None else (layers.first, layers.last)
            change = fitted(_adapter(part, trunk) if part.kind == "lora" else _diff(part), untuned)
            parts.append((weight, scaled(change, untuned.names, part.source.scale, first, last)))
        return merged(untuned, parts, dtype=dtype, progress=progress)


def changed_bytes(ingredient: Ingredient, origin: Path, itemsize: int) -> int:
    """Bytes that this state takes at most at `itemsize` bytes per weight, by the headers of the files. Raises LoadError
    for changes of another model."""
    with ExitStack() as stack:
        untuned = stack.enter_context(FolderTensors(origin))
        names = set(untuned.names)
        for _, part in ingredient.parts or ((1.0, ingredient),):
            if part.kind == "folder":
                assert part.path is not None
                names.update(difference(stack.enter_context(FolderTensors(part.path)), untuned).shapes)
            elif part.kind != "lora":
                names.update(fitted(_diff(part), untuned).shapes)  # also weights that were tied to others
        return itemsize * sum(math.prod(untuned.shape(name)) for name in names)


def _adapter(ingredient: Ingredient, trunk: nn.Module) -> Change:
    """What an adapter adds to each weight."""
    assert ingredient.path is not None
    weights = read_lora(ingredient.path, trunk, dtype=torch.float32, device=torch.device("cpu"))
    modules = {f"{name}.weight": module for name, module in weights.modules.items()}
    return Change(
        ingredient.path,
        {name: module.shape for name, module in modules.items()},
        lambda name: modules[name].delta(),
    )


def _diff(ingredient: Ingredient) -> Change:
    assert ingredient.path is not None
    return read_compressed(ingredient.path) if ingredient.kind == "compressed" else read_diff(ingredient.path)
