"""A model in memory, and an expert as a pair of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedModel

from proxyserve.models.quantization import Quantized
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

if TYPE_CHECKING:
    from proxyserve.models.formats.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Together:
    """What the processes of a divided model do together for one layer: `sum` its outputs over the ranks, take each its
    part of the inputs first (`split and sum`), `gather` the columns of its outputs, or `look up` rows of a table that
    another rank may have. `whole` is the undivided number of its outputs (to gather), inputs (to split) or rows (to
    look up)."""

    how: Literal["sum", "split and sum", "gather", "look up"]
    whole: int


@dataclass(frozen=True, slots=True)
class Sharding:
    """The module holds part `rank` of `size`; `layers` are those that need the other ranks, by name. Its forward ends
    only if all ranks run it, on the same tokens."""

    rank: int
    size: int
    layers: Mapping[str, Together]

    def part(self, whole: int) -> tuple[int, int]:
        """Where this rank's part of so many columns or rows begins and ends; the last one may be shorter."""
        most = -(-whole // self.size)
        return min(whole, self.rank * most), min(whole, (self.rank + 1) * most)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One set of weights with its tokenizer. `context_length` is in tokens; `eos_ids` are all ids that end a text
    by this model's own configuration; `vocabulary` are its real ids (its head may be wider). `parameters` and
    `bytes` are those of the weights, tied ones counted once.

    A model may be `over` another one: an `adapter` over its weights, or, without an adapter, the same weights under
    another name. `module` is then the other's; `parameters` and `bytes` are what is added to it.

    `quantized` says how linear layers are stored that are not in the model's `dtype`. `sharding` says which part of the
    weights is here, of a model that several processes have together: then `bytes` are those of this part, and
    `parameters` those of all."""

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
    sharding: Sharding | None = None

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
