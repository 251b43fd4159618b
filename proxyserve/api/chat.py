"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from proxyserve.api.chat_shape import ChatShape
from proxyserve.api.conversation import AskedChat
from proxyserve.api.converse import Conversation, Conversing, converse
from proxyserve.api.documentation import ENGINE_ERRORS, error_answers, event_stream
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.prepare import check_shape, generation_params, renamed_fields, with_experts
from proxyserve.api.respond import respond
from proxyserve.api.schemas.chat import ChatCompletion, ChatRequest
from proxyserve.api.schemas.message import rendered
from proxyserve.api.state import server_state
from proxyserve.api.structured import response_format
from proxyserve.api.tools import tool_use
from proxyserve.config import Limits
from proxyserve.errors import InvalidRequest

if TYPE_CHECKING:
    from proxyserve.engine.offer import Lease
    from proxyserve.fusion.catalog import Catalog

router = APIRouter(tags=["generation"], route_class=GenerationRoute)


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation",
    response_model=ChatCompletion,
    responses={200: event_stream("ChatChunk"), **error_answers(*ENGINE_ERRORS)},
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """The base continues the conversation, fused with the experts that `model` or `fusion` name."""
    state = server_state(request)
    shape = ChatShape(body, state.models.base.tokenizer)

    async def begin(lease: Lease) -> Conversing:
        return await converse(
            request, body, lease, lambda catalog: _conversation(catalog, body, state.config.limits, shape.id)
        )

    with renamed_fields(_field_names(body)):
        begun = await with_experts(request, begin, seconds=body.timeout)
    shape.form, shape.prompt = begun.form, begun.prompt
    return await respond(request, body, begun.generation, shape)


def _conversation(catalog: Catalog, body: ChatRequest, limits: Limits, request_id: str) -> Conversation:
    """Raises InvalidRequest."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest(
            "'max_completion_tokens' is the newer name of 'max_tokens'; give one of them.",
            param="max_completion_tokens",
        )
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    check_shape(body, limits, top_logprobs=body.top_logprobs, param="top_logprobs")
    return Conversation(
        request_id,
        rendered(body.messages),
        _asked(body, limits),
        partial(
            generation_params,
            body,
            limits,
            catalog.models,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        grammar=response_format(body.response_format, limits.grammar),
        n=body.n or 1,
    )


def _asked(body: ChatRequest, limits: Limits) -> AskedChat:
    return AskedChat(
        tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, limits),
        template_variables=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        thinking_budget=body.thinking_budget,
    )


def _field_names(body: ChatRequest) -> Callable[[str], str]:
    """The engine calls things by the field names of /v1/completions."""
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return lambda name: names.get(name, name)
