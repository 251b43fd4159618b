"""A model in memory, and an expert as a pair of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from proxyserve.models.quantization import Quantized
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

if TYPE_CHECKING:
    from proxyserve.models.formats.lora import LoraWeights


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One set of weights with its tokenizer. `context_length` is in tokens; `eos_ids` are all ids that end a text
    by this model's own configuration; `vocabulary` are its real ids (its head may be wider). `parameters` and
    `bytes` are those of the weights, tied ones counted once.

    A model may be `over` another one: an `adapter` over its weights, or, without an adapter, the same weights under
    another name. `module` is then the other's; `parameters` and `bytes` are what is added to it.

    `quantized` says how linear layers are stored that are not in the model's `dtype`."""

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
    over: LoadedModel | None = None
    adapter: LoraWeights | None = None
    quantized: Quantized | None = None

    @property
    def trunk(self) -> LoadedModel:
        """The model whose weights and KV blocks its lanes use."""
        return self.over or self

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device


@dataclass(frozen=True, slots=True)
class ParkedExpert:
    """What is known of an expert whose weights are on disk only: its untuned model's name, and when it was made and how
    long its context is, as `LoadedModel` has them."""

    untuned: str | None
    context_length: int
    created: int


@dataclass(frozen=True, eq=False)
class Expert:
    """A named pair: the tuned small model and its untuned reference. `untuned` may be shared with other experts and
    may be the base; it is None for an expert that was loaded without one. `vocabulary` are the ids that base, tuned
    and untuned share. `protected`: only administrators may weigh against it."""

    name: str
    tuned: LoadedModel
    untuned: LoadedModel | None
    vocabulary: SharedVocabulary
    generation: int = 1
    protected: bool = False

    @property
    def as_parked(self) -> ParkedExpert:
        pair = [model for model in (self.tuned, self.untuned) if model is not None]
        return ParkedExpert(
            None if self.untuned is None else self.untuned.name,
            min(model.context_length for model in pair),
            max(model.created for model in pair),
        )
