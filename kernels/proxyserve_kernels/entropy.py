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

#: Most evaluations; Newton's method needs five to ten, bisection of the whole range would need this many.
_STEPS = 60
_TOLERANCE = 1e-6


def temperatures_for(scores: Tensor, entropies: Tensor) -> Tensor:
    """Temperatures float32 [n] at which `softmax(scores / T)` has entropy `entropies` float32 [n], in nats.

    `scores` float32 [n, V], V whole blocks; -inf takes no part. NaN where the target is NaN or a row has NaN or +inf or
    no finite score. Newton's method on log a inside a bracket, each row by itself until it has converged."""
    target = entropies.to(scores.device).double()
    impossible = torch.isneginf(scores)
    centred = (scores - scores.amax(dim=1, keepdim=True)).masked_fill_(impossible, -math.inf)
    values = centred.masked_fill(impossible, 0.0)
    low = torch.full_like(target, -math.log(MAX_TEMPERATURE))
    high = torch.full_like(target, -math.log(MIN_TEMPERATURE))
    position = torch.zeros_like(target)  # log a; temperature 1
    done = target.isnan()
    for _ in range(_STEPS):
        a = position.exp()
        weight = (a.float()[:, None] * centred).exp_()
        mass = exact_sum(weight)
        mean = exact_sum(weight * values) / mass
        second = exact_sum(weight * values * values) / mass
        excess = mass.log() - a * mean - target
        slope = a * a * (second - mean * mean).clamp(min=0.0)
        # Too much entropy: a must grow.
        low, high = torch.where(excess > 0, position, low), torch.where(excess > 0, high, position)
        newton = position + excess / slope.clamp(min=1e-30)
        inside = (newton > low) & (newton < high)
        new = torch.where(inside, newton, 0.5 * (low + high))
        stop = (excess.abs() <= _TOLERANCE * target) | (high - low <= _TOLERANCE) | excess.isnan()
        position = torch.where(done | stop, position, new)
        done |= stop
        if bool(done.all()):
            break
    broken = target.isnan() | scores.isnan().any(dim=1) | scores.amax(dim=1).isinf()
    return torch.where(broken, math.nan, (-position).exp()).float()
