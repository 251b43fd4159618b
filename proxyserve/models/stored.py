"""The dtype that a folder's weights are stored in."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_FLOATS = {*_HALVES, "F32", "F64"}


def half_dtype(folder: Path) -> torch.dtype | None:
    """The half-precision dtype that all matrices in the folder's safetensors files have; None where any has more, where
    they differ, or where files cannot be read (loading them says why)."""
    found: set[str] = set()
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the handle is no mapping)
                    if "scale" in name.rpartition(".")[2]:  # of a quantised matrix
                        continue
                    tensor = tensors.get_slice(name)
                    if len(tensor.get_shape()) > 1 and tensor.get_dtype() in _FLOATS:
                        found.add(tensor.get_dtype())
    except (OSError, SafetensorError):
        return None
    return _HALVES.get(found.pop()) if len(found) == 1 else None
