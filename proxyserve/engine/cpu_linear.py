"""Linear layers with weights laid out for oneDNN, for models on a CPU.

A plain float32 linear layer gets two to four times slower from one row to eight; with the weight reordered once it
hardly does, and bfloat16 gains as well. Measured on a 2-core AVX-512 machine, 512 x 32000, one thread, plain / packed,
in ms: float32 1 row 3.6 / 1.2, 8 rows 6.5 / 2.3, 32 rows 13.5 / 5.1; bfloat16 1.8 / 0.6, 2.0 / 1.1, 3.6 / 2.7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: oneDNN chooses the layout for this many rows. 32 was as good as or better than 1 at every batch size.
_EXPECTED_ROWS = 32
#: Below this many weights plain float32 is faster at any number of rows.
_SMALLEST_FLOAT32 = 2**17
#: Below this many it is faster for few rows (the call overhead is smaller): such layers keep both layouts. 512 x 512,
#: us, plain / packed: 1 row 22 / 37, 2 rows 36 / 37, 8 rows 71 / 47, 32 rows 194 / 92.
_SMALL_FLOAT32 = 2**19
_FEW_ROWS = 2


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear`. In bfloat16 the results are the same bits; in float32 sums are added in
    another order (about 1e-6 relative)."""

    #: Whether `forward` adds a second argument.
    takes_residual = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._run_and_add = torch.ops.mkldnn._linear_pointwise.binary
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        self._plain = weight if weight.dtype == torch.float32 and weight.numel() < _SMALL_FLOAT32 else None

    @property
    def doubled_bytes(self) -> int:
        """What keeping both layouts costs."""
        return 0 if self._plain is None else self._plain.numel() * self._plain.element_size()

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        """[.., in] -> [.., out], plus a residual of that shape, before anything is rounded."""
        result: Tensor
        if self._plain is not None and inputs.numel() <= _FEW_ROWS * self.in_features:
            result = nn.functional.linear(inputs, self._plain, self.bias)
            return result if residual is None else result + residual
        if residual is None:
            result = self._run(inputs, self._packed, self.bias, "none", [], "")
        else:
            result = self._run_and_add(inputs, residual, self._packed, self.bias, "add")
        return result


@torch.no_grad()
def pack_linears(module: nn.Module) -> int:
    """Replace, in place, the linear layers that gain. Returns how many; 0 where oneDNN is missing. The plain
    weights are dropped unless something else holds them (tied embeddings). Only for models on a CPU that are never
    trained again."""
    if not torch.backends.mkldnn.is_available():
        return 0
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _gains(child.weight):
                setattr(parent, name, PackedLinear(child))
                replaced += 1
    return replaced


def _gains(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):  # quantised
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and weight.numel() >= _SMALLEST_FLOAT32


def doubled_bytes(module: nn.Module) -> int:
    """What the module's packed layers take beyond its own weights."""
    return sum(layer.doubled_bytes for layer in module.modules() if isinstance(layer, PackedLinear))


def expected_doubled_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """The same of a module that is not in memory yet and will be packed in `dtype`; only shapes are looked at."""
    if dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return 0
    sizes = (layer.weight.numel() for layer in module.modules() if type(layer) is nn.Linear)
    return sum(4 * size for size in sizes if _SMALLEST_FLOAT32 <= size < _SMALL_FLOAT32)
