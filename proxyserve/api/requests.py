"""POST /v1/requests/{id}/cancel, and GET /load"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from proxyserve.api.documentation import error_answers
from proxyserve.api.errors import RequestNotFound, shorten
from proxyserve.api.schemas.other import Cancelled, Load
from proxyserve.api.state import server_state
from proxyserve.engine.caller import Caller
from proxyserve.errors import InvalidRequest

router = APIRouter(tags=["operation"])


@router.post(
    "/v1/requests/{request_id}/cancel",
    summary="Cancel a request that is being answered",
    responses=error_answers(400, 401, 404, 413),
)
async def cancel_request(
    request: Request,
    request_id: Annotated[
        str, Path(description="The `id` of the answer (streams tell it at once), or its `x-request-id`.")
    ],
) -> Cancelled:
    """Its lanes are free at once, and whoever waits for the answer gets an error with code `request_cancelled`. A key
    may cancel its own requests, an administrator's all."""
    if await request.body():
        raise InvalidRequest("This route takes no body; send none.", code="invalid_body")
    caller: Caller = request.state.caller
    count = server_state(request).running.cancel(request_id, caller)
    if not count:
        raise RequestNotFound(
            f"There is no request '{shorten(request_id)}' of this key that is being answered."
        )
    return Cancelled(id=request_id, cancelled=count)


@router.get("/load", summary="How busy the server is", responses=error_answers(401))
async def read_load(request: Request) -> Load:
    """For routers that choose between servers. Cheap enough to be asked several times a second."""
    stats = server_state(request).engine.snapshot()
    used = [pool.blocks_in_use / pool.blocks_total for pool in stats.pools.values() if pool.blocks_total]
    return Load(
        running=stats.running,
        waiting=stats.waiting,
        waiting_tokens=stats.waiting_tokens,
        kv_use=max(used, default=0.0),
    )
