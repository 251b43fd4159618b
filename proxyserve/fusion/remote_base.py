"""What fusion may ask of a base that only shows its likeliest tokens.

A remote base returns ids K with log-probs, and a bound that no other id exceeds. A sum over raw log-probs needs no more
of it at the ids of K; what needs a sum over the base's whole law (a solved weight, a power mean, a nucleus, an entropy)
is not to be had.
"""

from __future__ import annotations

from dataclasses import replace

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.program import BASE_LANE, FUSED_LAW, Program
from proxyserve.fusion.sums import as_sum
from proxyserve.models.remote import RemoteModel


def over_remote_base(program: Program, fusion: Fusion, catalog: Catalog) -> Program:
    """`program`, compiled from `fusion`, as one that a remote base can serve: its origin is the base, so that what the
    base did not return is ruled out. The same program where the base is local or takes no part. Raises InvalidRequest
    for what needs the base's whole law."""
    base = catalog.models.base
    if not isinstance(base, RemoteModel) or not any(map(_is_base, program.lanes)):
        return program
    _refuse_what_needs_the_whole_law(program, fusion, base.name)
    weights = {program.origin: program.origin_weight}
    for term in program.terms:
        weights[term.lane] = weights.get(term.lane, 0.0) + term.weight
        if term.minus is not None:
            weights[term.minus] = weights.get(term.minus, 0.0) - term.weight
    added = [lane for lane, weight in weights.items() if _is_base(lane) and weight > 0.0]
    if not added:
        raise InvalidRequest(
            f"The fusion only subtracts the base, and '{base.name}' is on another server, which shows its likeliest "
            "tokens alone: which ones it finds unlikely is unknown. Give the base a positive coefficient.",
            param="fusion.rule",
        )
    if program.origin in added:
        return program
    origin = BASE_LANE if BASE_LANE in added else added[0]
    kept = {lane: weight for lane, weight in weights.items() if weight != 0.0}
    return replace(as_sum(kept, origin, "fusion.rule"), support=program.support)


def _is_base(lane: str) -> bool:
    return lane.partition("@")[0] == BASE_LANE


def _refuse_what_needs_the_whole_law(program: Program, fusion: Fusion, base: str) -> None:
    why = f"needs the base's whole law, and '{base}' is on another server, which shows its likeliest tokens alone"
    if fusion.gate is not None:
        raise InvalidRequest(f"'gate' {why}; leave it out.", param="fusion.gate")
    if fusion.target_entropy is not None:
        raise InvalidRequest(f"'target_entropy' {why}; use 'temperature'.", param="fusion.target_entropy")
    if fusion.support is not None:
        masked = fusion.support.outside == "mask"
        laws = () if program.support is None else program.support.of
        if not masked or any(name == FUSED_LAW or _is_base(name) for name in laws):
            raise InvalidRequest(
                f"A support that names the base or the fused law, or puts the base outside, {why}; name tuned models, "
                "with 'outside': 'mask'.",
                param="fusion.support",
            )
    elif program.support is not None:
        raise InvalidRequest(
            f"Rule '{fusion.rule.name}' with a support of its own {why}; for 'upscale' use 'top_p' 1.",
            param="fusion.rule",
        )
    if program.power is not None or program.law is not None or program.one_sided:
        raise InvalidRequest(
            f"Rule '{fusion.rule.name}' {why}; use a sum of log-probs: proxy, arm, edit, guidance, formula, or upscale "
            "with 'top_p' 1.",
            param="fusion.rule",
        )
