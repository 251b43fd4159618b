"""Alike models in one forward beside one after the other: what the small models of fused requests take of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from proxyserve.bench.models import EXPERT, LARGE_EXPERT, ModelShape, random_llama, word_tokenizer
from proxyserve.engine.grouped.trial import Trial
from proxyserve.engine.runner import Runner
from proxyserve.models.loading import Placement, load_model
from proxyserve.types import ModelKey

SHAPES: Mapping[str, ModelShape] = {"5M": EXPERT, "15M": LARGE_EXPERT}
#: How many models, and tokens of each in a step: an expert with its untuned model, and eight experts.
SITUATIONS = ((2, 1), (2, 8), (2, 32), (8, 1), (8, 4))
TURNS = 30
_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class PairRow:
    """`models` of about `size` parameters with `tokens` each; seconds of the median turn."""

    size: str
    models: int
    tokens: int
    apart: float
    together: float

    @property
    def ratios(self) -> dict[str, float]:
        return {"together / apart": self.apart / self.together}


def measure_pairs(
    placement: Placement,
    *,
    shapes: Mapping[str, ModelShape] = SHAPES,
    turns: int = TURNS,
    progress: Callable[[str], None] = lambda message: None,
) -> list[PairRow]:
    """Turns alternate."""
    rows = []
    tokenizer = word_tokenizer()
    for size, shape in shapes.items():
        runners = []
        for seed in range(max(models for models, _ in SITUATIONS)):
            with TemporaryDirectory() as folder:
                random_llama(seed, shape, _CONTEXT).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                runners.append(Runner(load_model(Path(folder), ModelKey(f"{size}-{seed}"), placement)))
        for models, tokens in SITUATIONS:
            progress(f"{models} models of {size} together, {tokens} tokens of each")
            trial = Trial(runners[:models])
            trial.verify()
            apart, together = trial.times(tokens, turns, math.inf)
            rows.append(PairRow(size, models, tokens, median(apart), median(together)))
    return rows
