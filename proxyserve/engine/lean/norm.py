"""Root mean square norm in one operation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class LeanNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded once at the end. (transformers rounds
    before the weight as well, which is the less exact of the two.)"""

    def __init__(self, norm: nn.Module) -> None:
        """From one of transformers' classes that has `weight` [size] and `variance_epsilon`."""
        super().__init__()
        self.weight: Tensor = norm.weight  # type: ignore[assignment]
        self.eps: float = norm.variance_epsilon  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        """[.., size] -> [.., size]. The weight may also be one for each token (see `Shell`), broadcastable to it."""
        weight = self.weight
        if weight.dim() == 1:
            return rms_norm(inputs, weight.shape, weight, self.eps)
        scaled = rms_norm(inputs.float(), weight.shape[-1:], None, self.eps)
        return (scaled * weight.float()).to(inputs.dtype)
