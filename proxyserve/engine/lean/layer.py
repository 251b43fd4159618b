"""One decoder layer: norm, attention, residual, norm, gated MLP, residual.

All tensors are of one packed row: hidden states [1, tokens, size], heads [1, tokens, heads, head size].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from proxyserve.engine.attention import Features, SpanMath, attend_packed
from proxyserve.engine.lean.merged import merge, parts
from proxyserve.engine.lean.norm import LeanNorm


class LeanLayer(nn.Module):
    """Made of a layer of transformers', whose weights it takes over."""

    def __init__(self, layer: Any, features: Features) -> None:
        """`features` are those of the layer's attention."""
        super().__init__()
        self.input_layernorm = LeanNorm(layer.input_layernorm)
        self.self_attn = LeanAttention(layer.self_attn, features)
        self.post_attention_layernorm = LeanNorm(layer.post_attention_layernorm)
        self.mlp = LeanMLP(layer.mlp)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`cos` and `sin` [1, tokens, 1, head size] as `rotate` wants them."""
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, cos, sin)
        output: Tensor = self.mlp(self.post_attention_layernorm(hidden), hidden)
        return output


class LeanAttention(nn.Module):
    """With one product for queries, keys and values; adds the residual."""

    def __init__(self, attention: Any, features: Features) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.heads = features.heads
        self.kv_heads: int = attention.k_proj.out_features // self.head_size
        self.window = features.window
        self.math = SpanMath(features.scale, None, None)
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = merge(layers)
        self.q_proj, self.k_proj, self.v_proj = parts(self, "qkv", layers)
        self.o_proj: nn.Module = attention.o_proj
        # Qwen 3's, over each head.
        normed = hasattr(attention, "q_norm")
        self.q_norm = LeanNorm(attention.q_norm) if normed else None
        self.k_norm = LeanNorm(attention.k_norm) if normed else None

    def forward(self, inputs: Tensor, residual: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = inputs.shape[1]
        heads = self.qkv(inputs).view(1, tokens, -1, self.head_size)
        turned = self.heads + self.kv_heads
        if self.q_norm is None or self.k_norm is None:
            rotated = rotate(heads[:, :, :turned], cos, sin)
            query, key = rotated[:, :, : self.heads], rotated[:, :, self.heads :]
        else:
            query = rotate(self.q_norm(heads[:, :, : self.heads]), cos, sin)
            key = rotate(self.k_norm(heads[:, :, self.heads : turned]), cos, sin)
        attended = attend_packed(
            self.layer_idx, query[0], key[0], heads[0, :, turned:], self.math, self.window
        )
        return add_product(self.o_proj, attended.reshape(1, tokens, -1), residual)


class LeanMLP(nn.Module):
    """act(gate) * up, then down, with one product for gate and up; adds the residual."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        layers = [mlp.gate_proj, mlp.up_proj]
        self.gate_up = merge(layers)
        self.gate_proj, self.up_proj = parts(self, "gate_up", layers)
        self.down_proj: nn.Module = mlp.down_proj
        self.act_fn: nn.Module = mlp.act_fn

    def forward(self, inputs: Tensor, residual: Tensor) -> Tensor:
        gate, up = self.gate_up(inputs).chunk(2, dim=-1)
        return add_product(self.down_proj, self.act_fn(gate) * up, residual)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [1, tokens, heads, size]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of
    each head, where the sines of the first half have their sign changed already."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos, torch.cat((second, first), dim=-1), sin)


def add_product(layer: nn.Module, inputs: Tensor, residual: Tensor) -> Tensor:
    """The residual plus the layer's outputs, a new tensor."""
    takes_it = getattr(layer, "takes_residual", False)
    output: Tensor = layer(inputs, residual) if takes_it else residual + layer(inputs)
    return output
