"""The temperature at which a law has a given entropy, solved per row.

With s the scores, a = 1 / T and Z(a) = sum of exp(a s):  H(a) = log Z - a E_a[s],  dH / d log a = -a^2 Var_a[s].
A learned temperature network (TempNet, Qiu et al. 2024, arXiv 2404.04575) minimises
tau LSE(s / tau) + (rho - log V) tau, whose least point is where H = log V - rho: it learns an entropy target, and this
solves for one.

Plain torch on whatever device the scores are on; both backends use it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxyserve_kernels.torch_backend.tilt import exact_sum

#: Where no temperature in between reaches the target (more than all tokens can have, less than ties leave).
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e5

#: Most evaluations; five to ten are usual, bisection of the whole range would need about thirty.
_STEPS = 60
#: A row is done when its entropy is this close to the target, relative to it, or log a this narrowly bracketed.
_TOLERANCE, _NARROW = 1e-5, 1e-7
#: The largest change of log a in one step: where the law is nearly flat a tangent leads far away.
_LONGEST = math.log(8.0)


def temperatures_for(scores: Tensor, entropies: Tensor) -> Tensor:
    """Temperatures float32 [n] at which `softmax(scores / T)` has entropy `entropies` float32 [n], in nats.

    `scores` float32 [n, V], V whole blocks; -inf takes no part. NaN where the target is NaN or a row has NaN or +inf or
    no finite score."""
    target = entropies.to(scores.device).double()
    found = torch.full_like(target, math.nan)
    asking = (~target.isnan()).nonzero()[:, 0]
    if asking.numel():
        found[asking] = _solve(scores[asking], target[asking])
    return found.float()


def _solve(scores: Tensor, target: Tensor) -> Tensor:
    """Newton's method for log H = log(target) in log a, inside a bracket; float64 [n]. Each row by itself: those that
    have converged leave."""
    first, last = -math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)
    others, found = _others(scores), torch.full_like(target, math.nan)
    rows = torch.arange(target.shape[0], device=target.device)
    position = torch.zeros_like(target)  # log a; temperature 1
    low, high = torch.full_like(target, -math.inf), torch.full_like(target, math.inf)
    for _ in range(_STEPS):
        entropy, slope = _entropy(others, position.exp())
        # Too much entropy: a must grow. H rounds to 0 before the lowest temperature, which a target of 0 asks for.
        grow = (entropy >= target) | (target <= 0)
        low, high = torch.where(grow, position, low), torch.where(grow, high, position)
        gap = entropy.clamp(min=1e-30).log() - target.clamp(min=1e-30).log()
        newton = position + (gap * entropy / slope.clamp(min=1e-30)).clamp(-_LONGEST, _LONGEST)
        newton = newton.clamp(first, last)
        new = torch.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
        at_the_end = torch.where(grow, position >= last, position <= first)
        near = (target > 0) & ((entropy - target).abs() <= _TOLERANCE * target)
        stop = near | at_the_end | (high - low <= _NARROW)
        # The last step is free, and the bracket holds the root.
        found[rows[stop]] = (-torch.where(near, newton.clamp(low, high), position)[stop]).exp()
        left = ~(stop | entropy.isnan())
        if not bool(left.any()):
            break
        if not bool(left.all()):
            others, rows, target = others[left], rows[left], target[left]
            low, high, new = low[left], high[left], new[left]
        position = new
    return found


def _others(scores: Tensor) -> Tensor:
    """Each row's scores less its best one, float32 [n, V], without one best token: its weight would be 1 and its share
    of every moment 0, and rounding the sum of that 1 and the rest would lose an entropy of almost nothing. Ids without
    a score are far below instead of at -inf, for 0 times that must be 0. A row with NaN, +inf or no score is NaN."""
    peak, best = scores.max(dim=1, keepdim=True)
    return (scores - peak).scatter_(1, best, -math.inf).clamp_(min=-1e30).add_(0.0 * peak)


def _entropy(others: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """H(a) and -dH / d log a, float64 [n] each."""
    exponent = others * a.float()[:, None]
    weight = exponent.exp()
    first = weight * exponent
    rest = exact_sum(weight)
    mean = exact_sum(first) / (1 + rest)
    square = exact_sum(first.mul_(exponent)) / (1 + rest)
    return rest.log1p() - mean, (square - mean * mean).clamp(min=0.0)
