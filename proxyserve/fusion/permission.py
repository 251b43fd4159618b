"""Which experts a caller may use, whatever the rule that uses them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from proxyserve.errors import Forbidden
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.names import catalog_of_names
from proxyserve.fusion.program import BASE_LANE, Program


def check_experts(
    program: Program, catalog: Catalog, allowed: Collection[str] | None, *, param: str | None = None
) -> None:
    """Raise Forbidden if `program` speaks of a model, if only with weight 0, that is not of an expert in `allowed`
    (None: all are). The error names `param`, or the field that the model came from."""
    if allowed is None:
        return
    untuned = _untuned_names(catalog)
    own = {untuned[name] for name in allowed if name in untuned}
    fields = {lane: term.param for term in program.terms for lane in (term.lane, term.minus) if lane}
    for lane in (*program.lanes, *program.idle_lanes):
        model = lane.partition("@")[0]
        expert, _, role = model.partition(".")
        if model == BASE_LANE or (expert in allowed if role else model in own):
            continue
        what = f"expert '{expert}'" if role else f"model '{model}'"
        raise Forbidden(f"This key may not use {what}.", param=param or fields.get(lane, "fusion"))


def may_use(fusion: Fusion, catalog: Catalog, allowed: Collection[str] | None) -> bool:
    """Whether a caller who may use the experts in `allowed` may ask for this fusion. Experts whose weights are not in
    memory are looked at as well. Raises InvalidRequest for a fusion that cannot be asked for at all."""
    if allowed is None:
        return True
    names = catalog_of_names(catalog.models.base.name, _untuned_names(catalog), catalog.presets)
    names = replace(names, calibrations=catalog.calibrations)
    try:
        check_experts(fusion.compile(names), names, allowed)
    except Forbidden:
        return False
    return True


def _untuned_names(catalog: Catalog) -> Mapping[str, str | None]:
    """Of every expert, in memory or not; None for those without an untuned model."""
    models = catalog.models
    loaded = {
        name: expert.untuned.name if expert.untuned else None for name, expert in models.experts.items()
    }
    return {**{name: parked.untuned for name, parked in models.parked.items()}, **loaded}
