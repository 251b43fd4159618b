"""The published way to decode with proxy-tuning, as the baseline: three Hugging Face models, one forward after
another, each with its own cache, a whole batch in lockstep (as `generate` and the method's own code do it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def generate_fused(
    models: Sequence[PreTrainedModel], weights: Sequence[float], prompts: Tensor, new_tokens: int
) -> Tensor:
    """Greedy tokens of `sum_i weights[i] * logits_i`. `prompts` [batch, length] int64, all of one length (so that
    no padding is needed) -> [batch, new_tokens] int64."""
    caches = [DynamicCache(config=model.config) for model in models]
    step_input = prompts
    produced = []
    for _ in range(new_tokens):
        fused: Tensor | None = None
        for model, weight, cache in zip(models, weights, caches, strict=True):
            output = model(step_input, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1].float() * weight
            fused = logits if fused is None else fused + logits
        assert fused is not None
        step_input = fused.argmax(dim=-1, keepdim=True)
        produced.append(step_input)
    return torch.cat(produced, dim=1)
