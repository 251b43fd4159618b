"""The plain Hugging Face reference: one full forward per model and token, no cache, float32, nothing of our engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.models.loading import whole_model


@dataclass(frozen=True)
class NaiveOutput:
    """Greedy tokens, and the fused law (log-probs [vocabulary] float64) that each was chosen from."""

    tokens: list[int]
    laws: list[Tensor]


class NaiveFusion:
    """Proxy-tuning of a base folder with pairs of (tuned, untuned) folders."""

    def __init__(self, base: Path, pairs: Mapping[str, tuple[Path, Path]]) -> None:
        self._loaded: dict[Path, PreTrainedModel] = {}
        self.base = self._load(base)
        self.pairs = {
            name: (self._load(tuned), self._load(untuned)) for name, (tuned, untuned) in pairs.items()
        }

    def _load(self, folder: Path) -> PreTrainedModel:
        if folder not in self._loaded:
            # A server's loader thread may be making a model as well.
            model = whole_model(
                AutoModelForCausalLM, folder, str(folder), dtype=torch.float32, attn_implementation="eager"
            )
            self._loaded[folder] = model.eval()
        return self._loaded[folder]

    @torch.inference_mode()
    def greedy(
        self,
        prompts: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        new_tokens: int,
        width: int,
    ) -> NaiveOutput:
        """`prompts` maps lane names (`base`, `qa.tuned`, `qa.untuned`) to ids; a lane not named gets the base's.
        `width` is the number of real ids that all models share."""
        output: list[int] = []
        laws: list[Tensor] = []

        def law(model: PreTrainedModel, lane: str) -> Tensor:
            ids = [*prompts.get(lane, prompts["base"]), *output]
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :width]
            return torch.log_softmax(logits.double(), dim=0)

        for _ in range(new_tokens):
            scores = law(self.base, "base")
            for name, weight in weights.items():
                tuned, untuned = self.pairs[name]
                scores = scores + weight * (law(tuned, f"{name}.tuned") - law(untuned, f"{name}.untuned"))
            laws.append(torch.log_softmax(scores, dim=0))
            output.append(int(laws[-1].argmax()))
        return NaiveOutput(output, laws)
