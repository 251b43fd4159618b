"""The published way to decode with proxy-tuning, as the baseline: three Hugging Face models, one forward after
another, each with its own cache, a whole batch in lockstep (as `generate` and the method's own code do it)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def generate_fused(
    models: Sequence[PreTrainedModel],
    weights: Sequence[float],
    prompts: Tensor,
    new_tokens: int,
    top_p: float | None = None,
) -> Tensor:
    """Tokens of `sum_i weights[i] * logits_i`: the best, or drawn from the nucleus `top_p`. `prompts` [batch, length]
    int64, all of one length (so that no padding is needed) -> [batch, new_tokens] int64."""
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
        step_input = fused.argmax(dim=-1, keepdim=True) if top_p is None else _draw(fused, top_p)
        produced.append(step_input)
    return torch.cat(produced, dim=1)


def _draw(scores: Tensor, top_p: float) -> Tensor:
    """As transformers' `TopPLogitsWarper` and `generate` do it: everything is sorted. [batch, vocabulary] -> [batch,
    1] int64."""
    ordered, ids = scores.sort(descending=False)
    unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    unlikely[:, -1] = False
    removed = unlikely.scatter(1, ids, unlikely)
    return torch.multinomial(scores.masked_fill(removed, -math.inf).softmax(dim=-1), num_samples=1)
