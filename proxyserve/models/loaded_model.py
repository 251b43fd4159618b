"""A model in memory, and an expert as a pair of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import time

import torch
from transformers import PreTrainedModel

from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One set of weights with its tokenizer. `context_length` is in tokens; `eos_ids` are all ids that end a text
    by this model's own configuration; `vocabulary` are its real ids (its head may be wider). `parameters` and
    `bytes` are those of the weights, tied ones counted once."""

    key: ModelKey
    path: Path
    module: PreTrainedModel
    tokenizer: Tokenizer
    context_length: int
    eos_ids: frozenset[int]
    vocabulary: SharedVocabulary
    parameters: int
    bytes: int
    created: int = field(default_factory=lambda: int(time()))

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device


@dataclass(frozen=True, eq=False)
class Expert:
    """A named pair: the tuned small model and its untuned reference. `untuned` may be shared with other experts and
    may be the base; it is None for an expert that was loaded without one. `vocabulary` are the ids that base, tuned
    and untuned share."""

    name: str
    tuned: LoadedModel
    untuned: LoadedModel | None
    vocabulary: SharedVocabulary
    generation: int = 1
