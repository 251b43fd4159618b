"""Each rule as its paper writes it, in float64, over log-probs [V] of whole models. Nothing of ours is used here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Laws = Mapping[str, Tensor]
#: From the lanes' laws and the number of the generated token to the fused law.
PaperRule = Callable[[Laws, int], Tensor]


def normalised(scores: Tensor) -> Tensor:
    return torch.log_softmax(scores, dim=0)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats, of log-probs; tokens that p rules out add nothing."""
    possible = p > -math.inf
    return float((p[possible].exp() * (p[possible] - q[possible])).sum())


def nucleus(law: Tensor, mass: float) -> Tensor:
    """The fewest most likely tokens with at least this mass, bool [V]."""
    values, order = law.exp().sort(descending=True, stable=True)
    size = int((values.cumsum(0) < mass).sum()) + 1
    inside = torch.zeros_like(law, dtype=torch.bool)
    inside[order[:size]] = True
    return inside


def likely(law: Tensor, share: float) -> Tensor:
    """Tokens with at least this share of the largest probability, bool [V]."""
    return law >= law.max() + math.log(share)


def best(law: Tensor, count: int) -> Tensor:
    return law >= law.topk(count).values[-1]


def masked(scores: Tensor, inside: Tensor) -> Tensor:
    return normalised(scores.masked_fill(~inside, -math.inf))


def proxy(base: Tensor, *weighted: tuple[float, Tensor, Tensor]) -> Tensor:
    """base + sum of weight * (tuned - untuned)."""
    return normalised(base + sum(weight * (tuned - untuned) for weight, tuned, untuned in weighted))


def upscale(base: Tensor, tuned: Tensor, untuned: Tensor, beta: float, top_p: float) -> Tensor:
    inside = nucleus(tuned, top_p) if top_p < 1 else torch.ones_like(tuned, dtype=torch.bool)
    return normalised(torch.where(inside, tuned + beta * (base - untuned), tuned))


def contrast(tuned: Tensor, untuned: Tensor, gamma: float, alpha: float) -> Tensor:
    return masked(tuned - gamma * untuned, likely(tuned, alpha))


def unlearn(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    return normalised(base - alpha * torch.relu(reinforced - base))


def guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    return normalised(negative + scale * (positive - negative))


def mixture(r: float, *weighted: tuple[float, Tensor]) -> Tensor:
    laws = torch.stack([law for _, law in weighted])
    weights = torch.tensor([weight for weight, _ in weighted], dtype=torch.float64)[:, None]
    if r == 0:
        return normalised((weights * laws).sum(0))
    if math.isinf(r):
        return normalised(laws.amax(0) if r > 0 else laws.amin(0))
    return normalised(((weights * (r * laws).exp()).sum(0)).log() / r)


Pair = tuple[Tensor, Tensor]


def _direction(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[Tensor, float, float]:
    """The joint delta, and the two divergences to match, means weighted by the weights."""
    total = sum(weights)
    delta = torch.stack(
        [w * (tuned - untuned) for w, (tuned, untuned) in zip(weights, pairs, strict=True)]
    ).sum(0)
    forward = sum(w / total * kl(tuned, untuned) for w, (tuned, untuned) in zip(weights, pairs, strict=True))
    reverse = sum(w / total * kl(untuned, tuned) for w, (tuned, untuned) in zip(weights, pairs, strict=True))
    return delta, forward, reverse


def dynamic(
    base: Tensor,
    pairs: Sequence[Pair],
    weights: Sequence[float],
    match: str,
    max_weight: float,
    budget: float = 0.0,
) -> tuple[Tensor, float]:
    """(fused law, multiplier) by bisection, or for `both` by a scan and golden sections."""
    delta, forward_target, reverse_target = _direction(pairs, weights)

    def forward(a: float) -> float:
        return kl(normalised(base + a * delta), base)

    def reverse(a: float) -> float:
        return kl(base, normalised(base + a * delta))

    if match == "both":
        a = _least(
            lambda a: (forward(a) - forward_target) ** 2 + (reverse(a) - reverse_target) ** 2, max_weight
        )
    elif match == "reverse":
        a = _bisect(reverse, reverse_target, max_weight)
    else:
        a = _bisect(forward, budget if match == "budget" else forward_target, max_weight)
    return normalised(base + a * delta), a


def paper_search(base: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, int, float]:
    """The published brute force, one expert at a time, the objective summed over all: (fused law, which expert, its
    weight)."""
    targets = [(kl(tuned, untuned), kl(untuned, tuned)) for tuned, untuned in pairs]
    found, least = (base, 0, 0.0), math.inf
    for number, (tuned, untuned) in enumerate(pairs):
        for step in range(21):
            law = normalised(base + step / 10 * (tuned - untuned))
            forward, reverse = kl(law, base), kl(base, law)
            objective = sum((forward - f) ** 2 + (reverse - r) ** 2 for f, r in targets)
            if objective < least:
                found, least = (law, number, step / 10), objective
    return found


def _bisect(function: Callable[[float], float], target: float, most: float) -> float:
    if function(most) < target:
        return most
    low, high = 0.0, most
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2


def _least(objective: Callable[[float], float], most: float) -> float:
    grid = torch.linspace(0, most, 201).tolist()
    place = min(range(201), key=lambda index: objective(grid[index]))
    low, high = grid[max(0, place - 1)], grid[min(200, place + 1)]
    for _ in range(50):
        left, right = low + 0.381966 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, right) if objective(left) < objective(right) else (left, high)
    return (low + high) / 2
