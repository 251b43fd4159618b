"""What kernels for paged attention ask of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxyserve.engine.attention import Features
from proxyserve.engine.kv_storage import LayerShape

_DTYPES = (torch.bfloat16, torch.float16)
_SIZES = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class Alike:
    """Layers of one kind, with nothing special about them: query heads, KV heads, the size of a head, the scale of
    scores, and the dtype of queries, keys and values."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls, shapes: Sequence[LayerShape], features: Sequence[Features], dtype: torch.dtype
    ) -> Alike | None:
        """None if layers differ, or have what such kernels do not: soft caps, sinks, sliding windows, keys and values
        of different or unusual sizes, float32."""
        if len(set(shapes)) != 1 or len(set(features)) != 1 or dtype not in _DTYPES:
            return None
        shape, layer = shapes[0], features[0]
        if layer.softcap is not None or layer.sinks or layer.window is not None:
            return None
        if shape.key_size != shape.value_size or shape.key_size not in _SIZES:
            return None
        return cls(layer.heads, shape.heads, shape.key_size, layer.scale, dtype)
