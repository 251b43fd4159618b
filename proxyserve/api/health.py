"""GET /health, /ready and /version, which need no key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from proxyserve import __version__
from proxyserve.api.documentation import error_answers
from proxyserve.api.schemas.other import Health, Readiness, Version
from proxyserve.api.state import server_state

router = APIRouter(tags=["operation"], responses=error_answers())

_REASONS = {
    "loading": "The engine has not been started yet.",
    "draining": "The server is shutting down and takes no new requests.",
    "dead": "The engine died; the log says why. Restart the server.",
}


@router.get("/health", summary="The process lives")
async def read_health() -> Health:
    return Health()


@router.get(
    "/ready",
    summary="The server can serve",
    responses={503: {"model": Readiness, "description": "It cannot, for the reason given."}},
)
async def read_readiness(request: Request, response: Response) -> Readiness:
    """For load balancers: 503 takes the server out of rotation while what runs goes on."""
    state = server_state(request).engine.state
    if state != "ready":
        response.status_code = 503
    return Readiness.model_validate({"status": state, "reason": _REASONS.get(state)})


@router.get("/version", summary="Which proxyserve this is")
async def read_version() -> Version:
    return Version(version=__version__)
