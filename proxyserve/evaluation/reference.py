"""The slow, obvious generator: plain Hugging Face models in float32, each with its own cache, a batch in lockstep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from proxyserve.evaluation.systems import System


class ReferenceGenerator:
    """Keeps the models it has loaded. Prompts of one length form a batch, so that nothing is padded."""

    def __init__(self) -> None:
        self._models: dict[Path, PreTrainedModel] = {}

    def generate(self, prompts: Sequence[str], system: System, max_tokens: int) -> list[str | None]:
        tokenizer = AutoTokenizer.from_pretrained(system.base)
        terms = [(self._model(system.base), 1.0)]
        for pair, weight in system.experts.values():
            terms += [(self._model(pair.tuned), weight), (self._model(pair.untuned), -weight)]
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(encoded):
            by_length[len(ids)].append(index)
        answers: list[str | None] = [None] * len(prompts)
        for members in by_length.values():
            rows = _greedy(terms, torch.tensor([encoded[index] for index in members]), max_tokens)
            for index, row in zip(members, rows.tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    answers[index] = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
        return answers

    def _model(self, folder: Path) -> PreTrainedModel:
        if folder not in self._models:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._models[folder] = model.eval()
        return self._models[folder]


@torch.inference_mode()
def _greedy(terms: Sequence[tuple[PreTrainedModel, float]], prompts: Tensor, max_tokens: int) -> Tensor:
    """Argmax of `sum weight * logits`. [batch, length] int64 -> [batch, max_tokens] int64."""
    caches = [DynamicCache(config=model.config) for model, _ in terms]
    inputs, produced = prompts, []
    for _ in range(max_tokens):
        fused = torch.zeros(())
        for (model, weight), cache in zip(terms, caches, strict=True):
            logits = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            fused = fused + weight * logits[:, -1].float()
        inputs = fused.argmax(dim=-1, keepdim=True)
        produced.append(inputs)
    return torch.cat(produced, dim=1)
