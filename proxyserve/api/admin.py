"""The control plane under `/admin/v1`: experts and presets that come and go while the server runs. For administrators
only."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from proxyserve.api.body import JsonRoute
from proxyserve.api.documentation import error_answers
from proxyserve.api.errors import shorten
from proxyserve.api.presence import while_present
from proxyserve.api.schemas.admin import (
    ChangeBody,
    Draining,
    ExpertBody,
    ExpertList,
    ExpertRequest,
    PresetBody,
    PresetDeleted,
    PresetFusion,
    PresetList,
    WaitQuery,
)
from proxyserve.api.schemas.errors import ErrorBody
from proxyserve.api.state import server_state
from proxyserve.errors import Forbidden, InvalidRequest, LoadError, UnknownModel
from proxyserve.experts.generation import Phase
from proxyserve.experts.status import Change, ExpertStatus
from proxyserve.types import NAME

if TYPE_CHECKING:
    from proxyserve.experts.manager import ExpertManager

Answers = dict[int | str, dict[str, Any]]

_ERRORS = (400, 401, 403, 404, 413, 500)
_CONFLICT: Answers = {
    409: {
        "model": ErrorBody,
        "description": "It does not go together with what there is: another change of this expert is under way, there "
        "is no earlier generation, the name is taken, a preset needs what is to go, or the memory plan has no room. "
        "`code` says which.",
    }
}
_BEGUN: Answers = {
    202: {
        "model": ChangeBody,
        "description": "It has begun; poll the URL in `Location`.",
        "headers": {"Location": {"description": "Of the expert.", "schema": {"type": "string"}}},
    }
}


class AdminRoute(JsonRoute):
    """A route for administrators, with a JSON body if it declares one and without any if not. Others are refused before
    anything of their request is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        takes_body = self.body_field is not None
        handle = super().get_route_handler() if takes_body else super(JsonRoute, self).get_route_handler()

        async def admit_and_handle(request: Request) -> Response:
            if not request.state.caller.admin:
                raise Forbidden("The control plane takes an administrator's key.")
            if not takes_body and await request.body():
                raise InvalidRequest("This route takes no body; send none.", code="invalid_body")
            return await handle(request)

        return admit_and_handle


router = APIRouter(prefix="/admin/v1", tags=["control plane"], route_class=AdminRoute)

# The pattern is for the document alone: what is told of a bad name is in `_named`.
Name = Annotated[
    str,
    Path(
        description="Letters, digits, `_` and `-`, at most 64.",
        json_schema_extra={"pattern": f"^{NAME.pattern}$"},
    ),
]
Wait = Annotated[WaitQuery, Query()]


@router.get("/experts", summary="List experts", responses=error_answers(*_ERRORS))
def list_experts(request: Request) -> ExpertList:
    """Every expert by name, with its generations."""
    return ExpertList(data=[ExpertBody.of(status) for status in _manager(request).experts()])


@router.get("/experts/{name}", summary="Look an expert up", responses=error_answers(*_ERRORS))
def read_expert(request: Request, name: Name) -> ExpertBody:
    """Also how to follow a change: the newest generation comes first, with its phase and progress."""
    with _named(name):
        return ExpertBody.of(_manager(request).expert(name))


@router.put(
    "/experts/{name}",
    summary="Load an expert or swap it",
    response_model=ExpertBody,
    responses={**_BEGUN, **error_answers(*_ERRORS, 415, 503), **_CONFLICT},
)
async def put_expert(request: Request, name: Name, body: ExpertRequest, query: Wait) -> Response:
    """Load a new generation, verify it, warm it up and publish it. Requests that run keep theirs. A generation that
    fails leaves the one before it serving; with `wait` that is a 400 with code `load_failed`."""
    with _named(name):
        manager, spec = _manager(request), body.spec()
        change = await run_in_threadpool(manager.put, name, spec, actor=_actor(request))
    return await _followed(request, change, query)


@router.post(
    "/experts/{name}/rollback",
    summary="Go back to the previous generation",
    response_model=ExpertBody,
    responses={**_BEGUN, **error_answers(*_ERRORS, 503), **_CONFLICT},
)
async def rollback_expert(request: Request, name: Name, query: Wait) -> Response:
    """Nothing is loaded again where the previous generation is still in memory."""
    with _named(name):
        change = await run_in_threadpool(_manager(request).rollback, name, actor=_actor(request))
    return await _followed(request, change, query)


@router.delete(
    "/experts/{name}",
    summary="Take an expert away",
    response_model=ChangeBody,
    responses={**_BEGUN, **error_answers(*_ERRORS, 503), **_CONFLICT},
)
async def delete_expert(request: Request, name: Name, query: Wait) -> Response:
    """No new requests; what runs finishes, then the weights go. With `wait` the expert is gone when the answer comes;
    without, when looking it up gives a 404."""
    with _named(name):
        change = await run_in_threadpool(_manager(request).delete, name, actor=_actor(request))
    if not query.wait:
        return await _begun(request, change)
    with suppress(UnknownModel):  # gone before anybody could wait
        await _settled(request, change)
    return _answer(ChangeBody.of(change, None))


@router.get("/presets", summary="List presets", responses=error_answers(*_ERRORS))
def list_presets(request: Request) -> PresetList:
    presets = _manager(request).presets()
    return PresetList(data=[PresetBody(name=name, fusion=dict(presets[name])) for name in sorted(presets)])


@router.get("/presets/{name}", summary="Look a preset up", responses=error_answers(*_ERRORS))
def read_preset(request: Request, name: Name) -> PresetBody:
    with _named(name):
        presets = _manager(request).presets()
        if name not in presets:
            known = ", ".join(sorted(presets)) or "none"
            raise UnknownModel(f"There is no preset '{name}' here. Presets: {known}.")
        return PresetBody(name=name, fusion=dict(presets[name]))


@router.put(
    "/presets/{name}",
    summary="Save a fusion under a name",
    responses={**error_answers(*_ERRORS, 415), **_CONFLICT},
)
async def put_preset(request: Request, name: Name, body: Annotated[PresetFusion, Body()]) -> PresetBody:
    """The body is a fusion object, as in requests; `param` of errors begins with `fusion`, as there. The name can be
    called as a model from then on, and an older preset of that name is replaced."""
    with _named(name):
        await run_in_threadpool(_manager(request).put_preset, name, body, actor=_actor(request))
    return PresetBody(name=name, fusion=dict(body))


@router.delete(
    "/presets/{name}",
    summary="Delete a preset",
    responses={**error_answers(*_ERRORS), **_CONFLICT},
)
async def delete_preset(request: Request, name: Name) -> PresetDeleted:
    """Requests that run are not touched."""
    with _named(name):
        await run_in_threadpool(_manager(request).delete_preset, name, actor=_actor(request))
    return PresetDeleted(name=name)


@router.post(
    "/drain",
    summary="Refuse new work",
    status_code=202,
    responses=error_answers(*_ERRORS),
)
async def drain(request: Request) -> Draining:
    """What runs finishes; `/ready` answers 503 from now on. There is no way back but a restart."""
    await run_in_threadpool(_manager(request).drain, actor=_actor(request))
    return Draining()


def _manager(request: Request) -> ExpertManager:
    """Without one, the server has no control plane: these routes are not there."""
    manager = server_state(request).experts
    if manager is None:
        raise HTTPException(404)
    return manager


def _actor(request: Request) -> str:
    """Who changes something, for the audit log. A server without keys cannot tell, whatever its clients send."""
    name: str = request.state.caller.name
    return name or "operator"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Raises InvalidRequest if nothing can be called that. What is unknown in here is what the path names, unless the
    error names a field itself; files that cannot be served are the request's fault."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{shorten(name)}' cannot be a name; use letters, digits, '_' and '-', at most 64, and begin with a "
            "letter or a digit.",
            param="name",
        )
    try:
        yield
    except UnknownModel as error:
        if error.param in (None, "model"):
            error.param = "name"
        raise
    except LoadError as error:
        raise InvalidRequest(error.message, code="load_failed") from error


async def _followed(request: Request, change: Change, query: WaitQuery) -> Response:
    """The answer to a change that publishes a generation. Raises InvalidRequest if it is waited for and fails."""
    if not query.wait:
        return await _begun(request, change)
    status = await _settled(request, change)
    reason = _failure(status, change.generation)
    if reason is not None:
        serving = (
            "No generation serves."
            if status.generation is None
            else f"Generation {status.generation} goes on serving."
        )
        raise InvalidRequest(
            f"Generation {change.generation} of expert '{change.expert}' failed: {reason.rstrip('.')}. {serving}",
            code="load_failed",
        )
    return _answer(ExpertBody.of(status))


async def _settled(request: Request, change: Change) -> ExpertStatus:
    """Waits for the change. Cancelling the wait leaves the change alone. Raises ClientDisconnect or ServerStopping."""
    state = server_state(request)
    return await while_present(_manager(request).settled(change), request.receive, state.stopping)


def _failure(status: ExpertStatus, generation: int) -> str | None:
    """Why that generation could not be published; one that was parked and could not be loaded again is not FAILED."""
    for entry in status.generations:
        if entry.generation == generation and (entry.phase is Phase.FAILED or entry.error is not None):
            return entry.error or "no reason is known"
    return None


async def _begun(request: Request, change: Change) -> Response:
    try:
        status = await run_in_threadpool(_manager(request).expert, change.expert)
    except UnknownModel:  # deleted, with nothing left to wait for
        status = None
    return _answer(
        ChangeBody.of(change, status), 202, {"Location": f"{router.prefix}/experts/{change.expert}"}
    )


def _answer(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status, headers, media_type="application/json")
