"""Contrastive generative exploration: texts that show what tuning added (Isonuma and Titov 2025, arXiv 2410.14765).

A text is drawn from rule `contrast`, `log p_tuned - gamma log p_untuned` among the tokens that the tuned model finds
plausible. The static form draws every text against the same untuned model. The iterative form lets a copy of the
untuned model learn from each text, one gradient step, so that what has been shown once is no longer surprising and the
next text shows something else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.rules.contrast import Contrast
from proxyserve.fusion.weights import ExpertWeight
from proxyserve.models.loaded_model import Expert


@dataclass(frozen=True, slots=True)
class ExploreSettings:
    """`texts` are generated, each of at most `max_tokens`. `gamma` and `alpha` are those of rule `contrast`. With
    `learning_rate` the exploration is iterative: after each text the untuned copy takes a step of AdamW of that size.
    `ignore_eos` suppresses the end of the text, as the paper's runs do."""

    texts: int = 10
    max_tokens: int = 48
    temperature: float = 1.0
    gamma: float = 1.0
    alpha: float = 0.1
    seed: int = 0
    learning_rate: float | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """One text. `contrast` is the mean over its tokens of log p_tuned - log p_untuned, in nats, under the untuned model
    as it was at the start; `current` the same under the one that has learned from the texts before."""

    text: str
    tokens: tuple[int, ...]
    contrast: float
    current: float


def explore(expert: Expert, prompt: Sequence[int], settings: ExploreSettings) -> Iterator[Finding]:
    """Generate and yield one text after the other. Plain Hugging Face forwards, since the weights of one of the models
    change between texts. Nothing is written to disk. Raises InvalidRequest for settings that rule `contrast` refuses,
    for an expert without an untuned model, for an empty prompt and for texts longer than a context."""
    Contrast((ExpertWeight(expert.name),), settings.gamma, settings.alpha)  # checks them
    if expert.untuned is None:
        raise InvalidRequest(f"Expert '{expert.name}' has no untuned model to contrast with.")
    if not prompt:
        raise InvalidRequest("The prompt must have at least one token.", param="prompt")
    context = min(expert.tuned.context_length, expert.untuned.context_length)
    if len(prompt) + settings.max_tokens > context:
        raise InvalidRequest(
            f"Prompt and text are up to {len(prompt) + settings.max_tokens} tokens; the context of expert "
            f"'{expert.name}' is {context}. Lower max_tokens.",
            param="max_tokens",
        )
    tuned, untuned = expert.tuned.module, expert.untuned.module
    learner = copy.deepcopy(untuned) if settings.learning_rate is not None else untuned
    optimizer = None
    if settings.learning_rate is not None:
        learner.requires_grad_(True)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.learning_rate)
    generator = torch.Generator(device=tuned.device).manual_seed(settings.seed)
    width = expert.vocabulary.size
    ends: frozenset[int] = frozenset() if settings.ignore_eos else expert.tuned.eos_ids
    never = expert.vocabulary.holes | (expert.tuned.eos_ids - ends)
    blocked = torch.tensor(sorted(never), dtype=torch.int64, device=tuned.device)
    for _ in range(settings.texts):
        drawn = _draw(tuned, learner, prompt, settings, width, blocked, ends, generator)
        if not drawn:
            continue
        yield Finding(
            text=expert.tuned.tokenizer.decode(drawn),
            tokens=tuple(drawn),
            contrast=mean_contrast(tuned, untuned, prompt, drawn, width),
            current=mean_contrast(tuned, learner, prompt, drawn, width),
        )
        if optimizer is not None:
            _learn(learner, optimizer, prompt, drawn)


@torch.no_grad()
def mean_contrast(
    tuned: PreTrainedModel, untuned: PreTrainedModel, prompt: Sequence[int], text: Sequence[int], width: int
) -> float:
    """Mean over the text's tokens of log p_tuned - log p_untuned, in nats, over the first `width` ids."""
    ids = torch.tensor([[*prompt, *text]], device=tuned.device)
    total = 0.0
    for model, sign in ((tuned, 1.0), (untuned, -1.0)):
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :width].float()
        laws = torch.log_softmax(logits, dim=-1)
        total += sign * float(laws.gather(1, ids[0, len(prompt) :, None]).sum())
    return total / len(text)


@torch.no_grad()
def _draw(
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    prompt: Sequence[int],
    settings: ExploreSettings,
    width: int,
    blocked: Tensor,
    ends: frozenset[int],
    generator: torch.Generator,
) -> list[int]:
    """One text from rule `contrast`, without its end-of-text token."""
    models = (tuned, untuned)
    caches = [DynamicCache(config=model.config) for model in models]
    step = torch.tensor([list(prompt)], device=tuned.device)
    text: list[int] = []
    while len(text) < settings.max_tokens:
        laws = [
            torch.log_softmax(
                model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                .logits[0, -1, :width]
                .float(),
                dim=0,
            )
            for model, cache in zip(models, caches, strict=True)
        ]
        # Barred before the plausible set is formed: where the tuned model is all but sure of the end of the text, the
        # set would otherwise hold nothing that may be drawn.
        allowed = laws[0].index_fill(0, blocked, -torch.inf)
        scores = contrast_scores(allowed, laws[1], settings.gamma, settings.alpha)
        if settings.temperature == 0.0:
            token = int(scores.argmax())
        else:
            law = torch.softmax(scores / settings.temperature, dim=0)
            token = int(torch.multinomial(law, 1, generator=generator))
        if token in ends:
            break
        text.append(token)
        step = torch.tensor([[token]], device=tuned.device)
    return text


def contrast_scores(tuned: Tensor, untuned: Tensor, gamma: float, alpha: float) -> Tensor:
    """Rule `contrast` over log-probs [V]: `tuned - gamma untuned` where p_tuned >= alpha max p_tuned, else -inf."""
    scores = tuned - gamma * untuned
    return scores if alpha == 0.0 else scores.masked_fill(tuned.exp() < alpha * tuned.exp().max(), -torch.inf)


def _learn(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, prompt: Sequence[int], text: Sequence[int]
) -> None:
    """One step on the text's tokens."""
    ids = torch.tensor([[*prompt, *text]], device=model.device)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer.zero_grad()
    model(ids, labels=labels, use_cache=False).loss.backward()
    optimizer.step()
