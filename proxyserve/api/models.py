"""GET /v1/models and /v1/models/{id}"""

from __future__ import annotations

from fastapi import APIRouter, Request

from proxyserve.api.documentation import error_answers
from proxyserve.api.errors import shorten
from proxyserve.api.schemas.other import ModelBody, ModelList
from proxyserve.api.state import server_state
from proxyserve.engine.caller import Caller
from proxyserve.errors import ExpertParked, Forbidden
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.model_name import parse_model_name
from proxyserve.fusion.permission import may_use

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List models", responses=error_answers(401))
async def list_models(request: Request) -> ModelList:
    """The base, the base with each expert at weight 1 (those with an untuned model), and the presets, as far as
    the key may use them."""
    state = server_state(request)
    catalog = state.catalog  # once: another one may be offered at any time
    models = catalog.models
    base = models.base.name
    everyone = {**{name: expert.as_parked for name, expert in models.experts.items()}, **models.parked}
    pairs = [name for name, expert in sorted(everyone.items()) if expert.untuned is not None]
    names = [base, *(f"{base}+{name}" for name in pairs), *catalog.presets]
    names = [name for name in names if _may_use(request, catalog, name)]
    return ModelList(data=[_model(catalog, name) for name in names])


@router.get(
    "/v1/models/{model_id:path}", summary="Look a model up", responses=error_answers(400, 401, 403, 404)
)
async def read_model(request: Request, model_id: str) -> ModelBody:
    """Any name that can be called, listed or not: `atlas+qa:0.8+arith`."""
    catalog = server_state(request).catalog
    if not _may_use(request, catalog, model_id):
        raise Forbidden(f"This key may not use model '{shorten(model_id)}'.", param="model")
    return _model(catalog, model_id)


def _may_use(request: Request, catalog: Catalog, name: str) -> bool:
    """Raises UnknownModel or InvalidRequest."""
    caller: Caller = request.state.caller
    try:
        return may_use(parse_model_name(name, catalog), catalog, caller.experts)
    except ExpertParked as error:  # the first in the name; the others are looked at when it is called
        return caller.may_use(error.name)


def _model(catalog: Catalog, name: str) -> ModelBody:
    """Raises UnknownModel or InvalidRequest."""
    base = catalog.models.base
    try:
        program = parse_model_name(name, catalog).compile(catalog)
    except ExpertParked as error:  # looking is no reason to load it
        parked = catalog.models.parked[error.name]
        return ModelBody(
            id=name,
            created=max(base.created, parked.created),
            max_model_len=min(base.context_length, parked.context_length),
        )
    lanes = [base, *(catalog.model(lane) for lane in program.lanes)]
    return ModelBody(
        id=name,
        created=max(model.created for model in lanes),
        max_model_len=min(model.context_length for model in lanes),
    )
