"""The slow, obvious generator: plain Hugging Face models in float32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from proxyserve.evaluation.hf_loop import generate_fused
from proxyserve.evaluation.systems import System


class ReferenceGenerator:
    """Keeps the models it has loaded. Prompts of one length form a batch, so that nothing is padded."""

    def __init__(self) -> None:
        self._models: dict[Path, PreTrainedModel] = {}

    def generate(self, prompts: Sequence[str], system: System, max_tokens: int) -> list[str | None]:
        tokenizer = AutoTokenizer.from_pretrained(system.base)
        models, weights = [self._model(system.base)], [1.0]
        for pair, weight in system.experts.values():
            models += [self._model(pair.tuned), self._model(pair.untuned)]
            weights += [weight, -weight]
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(encoded):
            by_length[len(ids)].append(index)
        answers: list[str | None] = [None] * len(prompts)
        for members in by_length.values():
            batch = torch.tensor([encoded[index] for index in members])
            rows = generate_fused(models, weights, batch, max_tokens)
            for index, row in zip(members, rows.tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    answers[index] = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
        return answers

    def _model(self, folder: Path) -> PreTrainedModel:
        if folder not in self._models:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._models[folder] = model.eval()
        return self._models[folder]
