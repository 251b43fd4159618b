"""The slow, obvious generator: plain Hugging Face models in float32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from proxyserve.evaluation.hf_loop import generate_fused
from proxyserve.evaluation.systems import Answer, Question, System
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.rules.proxy import Proxy


class ReferenceGenerator:
    """Weighted sums only: rule `proxy` with fixed weights and nothing beside it. Keeps the models it has loaded.
    Prompts of one length form a batch, so that nothing is padded."""

    def __init__(self) -> None:
        self._models: dict[Path, PreTrainedModel] = {}

    def supports(self, fusion: Fusion) -> bool:
        rule = fusion.rule
        return (
            isinstance(rule, Proxy) and fusion.is_bare and not any(entry.schedule for entry in rule.experts)
        )

    def generate(
        self,
        questions: Sequence[Question],
        system: System,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """Raises ValueError for a fusion that it does not support."""
        models, weights = self._sum_of(system)
        tokenizer = AutoTokenizer.from_pretrained(system.base)
        encoded = [tokenizer.encode(question.prompt) for question in questions]
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (ids, question) in enumerate(zip(encoded, questions, strict=True)):
            alike[len(ids), question.max_tokens].append(index)
        answers = [Answer(None, question.max_tokens) for question in questions]
        done = 0
        for (_, max_tokens), members in alike.items():
            batch = torch.tensor([encoded[index] for index in members])
            rows = generate_fused(models, weights, batch, max_tokens)
            for index, row in zip(members, rows.tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    stop = row.index(tokenizer.eos_token_id)
                    answers[index] = Answer(tokenizer.decode(row[:stop]), stop + 1)
            done += len(members)
            progress(done)
        return answers

    def _sum_of(self, system: System) -> tuple[list[PreTrainedModel], list[float]]:
        """The models of a weighted sum of logits, and their weights."""
        rule = system.fusion.rule
        if not self.supports(system.fusion) or not isinstance(rule, Proxy):
            raise ValueError("the reference adds logits with fixed weights and can do nothing else")
        models, weights = [self._model(system.base)], [1.0]
        for entry in rule.experts:
            pair = system.experts[entry.expert]
            models += [self._model(pair.tuned), self._model(pair.untuned)]
            weights += [entry.weight, -entry.weight]
        return models, weights

    def _model(self, folder: Path) -> PreTrainedModel:
        if folder not in self._models:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._models[folder] = model.eval()
        return self._models[folder]
