"""From coefficients of lanes to a program."""

from __future__ import annotations

from collections.abc import Mapping

from proxyserve.fusion.program import Program, Term


def as_sum(coefficients: Mapping[str, float], origin: str, param: str) -> Program:
    """The sum as the lane `origin` and differences. Lanes of opposite signs are paired, so that what they share cancels
    before anything is rounded; what cannot be paired stands alone. `param` is the field that the coefficients come
    from."""
    left = {lane: coefficient for lane, coefficient in coefficients.items() if lane != origin}
    terms = []
    for lane in [lane for lane, coefficient in left.items() if coefficient > 0.0]:
        for other in [other for other, coefficient in left.items() if coefficient < 0.0]:
            weight = min(left[lane], -left[other])
            if weight > 0.0:
                terms.append(Term(lane, other, weight, param=param, bounded=True))
                left[lane] -= weight
                left[other] += weight
    terms += [
        Term(lane, None, coefficient, param=param, bounded=True)
        for lane, coefficient in left.items()
        if coefficient != 0.0
    ]
    return Program(origin, coefficients[origin], tuple(terms))
