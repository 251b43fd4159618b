"""Random models with laws like those of trained ones: peaked, and a tuned model that is close to its untuned one.

How long it takes to solve a weight depends on the laws. Those of random models are nearly uniform and nearly the same,
which no trained pair is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TEXTS, _LENGTH = 4, 16
_HALVINGS = 20


@dataclass(frozen=True, slots=True)
class Peaks:
    """In nats, means over positions of random text: `entropy` of base and untuned, `kl` of tuned from untuned,
    KL(tuned || untuned)."""

    entropy: float = 2.5
    kl: float = 1.0


@torch.inference_mode()
def make_peaked(
    base: PreTrainedModel, untuned: PreTrainedModel, tuned: Sequence[PreTrainedModel], peaks: Peaks
) -> None:
    """Change the models in place. Heads are scaled (in the last norm, since heads may be tied to the embedding), the
    tuned models moved to somewhere between the untuned one and what they were."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, base.config.vocab_size, (_TEXTS, _LENGTH), generator=generator)
    for model in (base, untuned):
        cast(Tensor, model.base_model.norm.weight).mul_(_scale(_logits(model, text), peaks.entropy))
    for model in tuned:
        _move_near(model, untuned, text, peaks.kl)


def _scale(logits: Tensor, entropy: float) -> float:
    """What to multiply the logits with for that mean entropy, in nats."""

    def certainty(scale: float) -> float:
        law = (logits * scale).log_softmax(-1)
        return float((law.exp() * law).sum(-1).mean())

    return _find(certainty, -entropy, most=1000.0)


def _move_near(model: PreTrainedModel, untuned: PreTrainedModel, text: Tensor, kl: float) -> None:
    """Give `model` weights on the way from the untuned model's to its own, at that KL(model || untuned)."""
    start, end = (
        {name: value.clone() for name, value in each.state_dict().items()} for each in (untuned, model)
    )
    end["model.norm.weight"] = start["model.norm.weight"]  # its scale belongs to the head
    law = _logits(untuned, text).log_softmax(-1)

    def distance(share: float) -> float:
        model.load_state_dict({name: start[name].lerp(end[name], share) for name in start})
        moved = _logits(model, text).log_softmax(-1)
        return float((moved.exp() * (moved - law)).sum(-1).mean())

    distance(_find(distance, kl, most=1.0))


def _logits(model: PreTrainedModel, text: Tensor) -> Tensor:
    return cast(Tensor, model(text).logits).float()


def _find(rising: Callable[[float], float], target: float, most: float) -> float:
    """The x in [0, most] where `rising` passes `target`, by bisection."""
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high
