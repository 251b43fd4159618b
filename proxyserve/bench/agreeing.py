"""Random models of which an expert drafts what the fused law says, at a chosen share of tokens.

How often drafts stand depends on how alike expert and fused law are, and random models are not alike at all. Here each
token's likeliest follower is written into the models: heads are their embeddings in another order, so that the score of
a follower is the size of the last token's embedding, and layers only add a little to it. The base follows one cycle
through the vocabulary; tuned and untuned leave it at tokens drawn at random, both in the same way, so that their
difference has no say and the fused law follows the base. Shapes are those of other random models, and so is what a
forward costs; heads that are usually tied to their embedding are not, which is more memory and no more time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from proxyserve.bench.models import BASE, EXPERT, VOCABULARY, ModelShape, random_llama, word_tokenizer

#: The score of a follower; those of other tokens are some standard deviations below.
_PEAK = 20.0
#: Of embeddings, beside which what the layers add is small.
_SPREAD = 2.0


@dataclass(frozen=True, slots=True)
class AgreeingFamily:
    """Folders of a base, and of the tuned and the untuned model by the share of tokens at which a draft of the tuned
    one stands in greedy decoding. `follows` [vocabulary] int64 has the fused law's likeliest token after each."""

    base: Path
    experts: Mapping[float, tuple[Path, Path]]
    follows: Tensor


def build_agreeing_family(
    root: Path,
    shares: Iterable[float],
    *,
    base: ModelShape = BASE,
    expert: ModelShape = EXPERT,
    context: int = 1024,
    vocabulary: int = VOCABULARY,
) -> AgreeingFamily:
    """Write the models under `root`. The same every time."""
    generator = torch.Generator().manual_seed(0)
    cycle = torch.randperm(vocabulary, generator=generator)
    follows = torch.empty_like(cycle)
    follows[cycle] = cycle.roll(-1)
    tokenizer = word_tokenizer(vocabulary)

    def write(name: str, seed: int, shape: ModelShape, likeliest: Tensor) -> Path:
        model = random_llama(seed, replace(shape, tied=False), context, vocabulary)
        _follow(model, likeliest, generator)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        return root / name

    folder = write("base", 0, base, follows)
    experts = {}
    for number, share in enumerate(shares):
        left = _leave(follows, share, generator)
        seed = 2 * number + 1
        experts[share] = (
            write(f"tuned-{number}", seed, expert, left),
            write(f"untuned-{number}", seed + 1, expert, left),
        )
    return AgreeingFamily(folder, experts, follows)


def _leave(follows: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Another order of followers, the same as in `follows` after that share of the tokens and after no other."""
    size = len(follows)
    tokens = torch.randperm(size, generator=generator)[: size - round(share * size)]
    left = follows.clone()
    left[tokens] = follows[tokens.roll(1)]
    return left


@torch.no_grad()
def _follow(model: LlamaForCausalLM, likeliest: Tensor, generator: torch.Generator) -> None:
    """Make `likeliest[token]`, a permutation, the likeliest token after each token."""
    embedding = torch.randn(model.model.embed_tokens.weight.shape, generator=generator)
    model.model.embed_tokens.weight.copy_(_SPREAD * embedding)
    head = torch.empty_like(embedding)
    head[likeliest] = embedding * (_PEAK / embedding.shape[1])
    model.lm_head.weight.copy_(head)
