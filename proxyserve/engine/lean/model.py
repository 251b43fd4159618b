"""Which models can be made lean, and making them so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from proxyserve.engine.attention import Features
from proxyserve.engine.lean.layer import LeanLayer
from proxyserve.engine.lean.norm import LeanNorm

#: Families of transformers whose decoders are those of Llama, with a window, biases or norms over heads in addition.
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_MERGED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
_ALONE = (("self_attn", ("o_proj",)), ("mlp", ("down_proj",)))


class LeanDecoder(nn.Module):
    """Takes the place of the decoder below the head, with its names."""

    def __init__(self, decoder: Any, features: Sequence[Features]) -> None:
        """Takes over the decoder's weights, layer by layer, so that those of one are in memory twice at most."""
        super().__init__()
        self.embed_tokens: nn.Module = decoder.embed_tokens
        self.rotary_emb: nn.Module = decoder.rotary_emb
        self.layers: nn.ModuleList = decoder.layers
        for number, its in enumerate(features):
            self.layers[number] = LeanLayer(self.layers[number], its)
        self.norm = LeanNorm(decoder.norm)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        """Both [1, tokens] -> hidden states [1, tokens, size]. What else the class's own takes is for callers that this
        has none of: caches, masks, embeddings."""
        hidden = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(hidden, position_ids)
        cos, sin = cos[:, :, None], sin[:, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def can_be_lean(model: PreTrainedModel, features: Sequence[Features]) -> bool:
    """Whether this is a decoder of a known family on a CPU, with plain linear layers that nothing hooks on to."""
    name = type(model).__name__.removesuffix("ForCausalLM")
    family = next((family for family, prefix in _FAMILIES.items() if prefix == name), None)
    if family is None or type(model).__module__ != f"transformers.models.{family}.modeling_{family}":
        return False
    if model.device.type != "cpu" or any(its.softcap is not None or its.sinks for its in features):
        return False
    return all(_is_plain(layer) for layer in model.model.layers)


def make_lean(model: PreTrainedModel, features: Sequence[Features]) -> None:
    """Replace the decoder in place. `can_be_lean` must have said yes."""
    model.model = LeanDecoder(model.model, features)


def _is_plain(layer: Any) -> bool:
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
        return False
    for owner, names in (*_MERGED, *_ALONE):
        linears = [getattr(getattr(layer, owner), name) for name in names]
        if not all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears):
            return False
        if len({linear.bias is None for linear in linears}) > 1:
            return False
    return True
