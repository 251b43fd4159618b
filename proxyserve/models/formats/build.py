"""A model in memory out of an untuned folder and a change of its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from proxyserve.errors import LoadError
from proxyserve.models.formats.architecture import Architecture
from proxyserve.models.formats.companions import GENERATION
from proxyserve.models.formats.diff import Change, fitted
from proxyserve.models.formats.merge import merged
from proxyserve.models.formats.tensors import FolderTensors
from proxyserve.models.loading import Placement, loading_dtype, own_weights, whole_model
from proxyserve.models.prequantized import refuse_quantized
from proxyserve.models.support import refuse_unsupported_config, refuse_unsupported_module

#: `model.layers.3.mlp...` (Llama and most others), `transformer.h.3...` (GPT-2), `model.decoder.layers.3...` (OPT).
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a weight is part of, None for embeddings, final norm and head."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def layer_factor(layer: int | None, layers: int, first: float, last: float) -> float:
    """LiNeS (arXiv 2410.17146): of layer number `layer` of `layers`, from `first` to `last` in equal steps; `first`
    outside of the layers."""
    if layer is None or layers < 2:
        return first
    return first + (last - first) * layer / (layers - 1)


def scaled(
    change: Change, names: Iterable[str], scale: float = 1.0, first: float = 1.0, last: float = 1.0
) -> Change:
    """`scale * layer_factor * delta`. `names` are those of the model that is changed, and say how many layers it has.
    Raises LoadError if it has none and the factors differ."""
    layers = 1 + max((layer for layer in map(layer_of, names) if layer is not None), default=-1)
    if layers == 0 and first != last:
        raise LoadError(f"{change.path}: no weight's name says its layer; leave the layer scales out")

    def read(name: str) -> Tensor:
        factor = scale * layer_factor(layer_of(name), layers, first, last)
        delta = change.read(name)
        return delta if factor == 1.0 else delta * factor

    return replace(change, read=read)


def build_changed(
    untuned: Path,
    change: Change,
    *,
    scale: float = 1.0,
    first: float = 1.0,
    last: float = 1.0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Tensor]:
    """`untuned + scale * layer_factor * delta`, the whole state of the tuned model in memory of its own. Raises
    LoadError for a change of another model."""
    with FolderTensors(untuned) as tensors:
        change = scaled(fitted(change, tensors), tensors.names, scale, first, last)
        return merged(tensors, [(1.0, change)], dtype=dtype, progress=progress)


def load_changed(
    untuned: Path, state: Mapping[str, Tensor], placement: Placement, *, own: Path | None = None
) -> PreTrainedModel:
    """A model of the untuned folder's configuration with the weights in `state`, which it may go on using as its own.
    `own` may be a folder with a generation_config.json in place of the untuned one's. Raises LoadError."""
    architecture = Architecture.of(untuned)
    config = architecture.config
    refuse_unsupported_config(config, str(untuned))
    refuse_quantized(config, str(untuned), "a model that is changed")
    if any(name in state for name in architecture.ties):
        config.tie_word_embeddings = False
    module = whole_model(
        architecture.model_class,
        None,
        f"{untuned} with its weights changed",
        config=config,
        state_dict=dict(state),
        dtype=loading_dtype(placement),
    )
    try:
        for folder in (untuned, own):
            if folder is not None and (folder / GENERATION).is_file():
                module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder}: {GENERATION} cannot be used: {error}") from error
    module.eval().requires_grad_(False)
    own_weights(module, placement)
    refuse_unsupported_module(module, str(untuned))
    return module
