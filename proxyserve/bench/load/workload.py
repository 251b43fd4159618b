"""What is asked: models by their shares, prompts and answers by their lengths. The n-th request is the same in every
run of a seed, whatever the load, the round and the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from proxyserve.bench.load.lengths import Lengths
from proxyserve.bench.load.prompts import Prompts


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `prompt` has `prompt_tokens` tokens, its answer may have `max_tokens`."""

    model: str
    prompt: list[int] | str
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """`models` are names with their shares of the requests, which need not sum to 1."""

    models: Mapping[str, float]
    prompt: Lengths
    output: Lengths
    prompts: Prompts
    seed: int = 0

    def ask(self, number: int) -> Ask:
        """The request of that number."""
        random = Random(f"{self.seed}/{number}")
        (model,) = random.choices(list(self.models), list(self.models.values()))
        prompt_tokens, max_tokens = self.prompt.draw(random), self.output.draw(random)
        return Ask(model, self.prompts.draw(prompt_tokens, random), prompt_tokens, max_tokens)

    def describe(self) -> dict[str, Any]:
        """For the record of a run."""
        return {
            "models": dict(self.models),
            "prompt_tokens": self.prompt.text,
            "output_tokens": self.output.text,
            "seed": self.seed,
        }
