"""POST /v1/responses"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from proxyserve.api.conversation import AskedChat
from proxyserve.api.converse import Conversation, Conversing, converse
from proxyserve.api.documentation import ENGINE_ERRORS, error_answers, event_stream
from proxyserve.api.explanations import explained, wants_explanations
from proxyserve.api.generate import Generation
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.logprobs import token_logprobs
from proxyserve.api.prepare import cap, renamed_fields, sampling_params, with_experts
from proxyserve.api.presence import while_present
from proxyserve.api.respond import as_json, note_work, unique_id
from proxyserve.api.response_messages import messages_of
from proxyserve.api.response_writer import ResponseWriter
from proxyserve.api.schemas.base import RequestModel
from proxyserve.api.schemas.response_events import AnyEvent, ResponseCompleted, ResponseIncomplete
from proxyserve.api.schemas.response_output import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseObject,
    ResponseUsage,
)
from proxyserve.api.schemas.response_tools import choice_for_chat
from proxyserve.api.schemas.responses import UsageBody
from proxyserve.api.schemas.responses_api import ResponsesRequest
from proxyserve.api.sse import EventStream, event_frame
from proxyserve.api.state import server_state
from proxyserve.api.structured import grammar_report, text_format
from proxyserve.api.tools import tool_use
from proxyserve.config import Limits
from proxyserve.errors import InvalidRequest
from proxyserve.types import TokenExplanation

if TYPE_CHECKING:
    from proxyserve.engine.offer import Lease
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.text.tokenizer import Tokenizer

router = APIRouter(tags=["generation"], route_class=GenerationRoute)

#: What is called something else where routes for conversations share code.
_FIELD_NAMES = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.allowed_tools.tools": "tool_choice.tools",
}


@router.post(
    "/v1/responses",
    summary="Answer the items of a conversation",
    response_model=ResponseObject,
    responses={
        200: event_stream("ResponseStreamEvent", end="the last with the whole response"),
        **error_answers(*ENGINE_ERRORS),
    },
)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """The base answers, fused with the experts that `model` or `fusion` name. Nothing is stored: a conversation goes on
    by sending its items again, those of earlier outputs among them."""
    state = server_state(request)
    response_id = unique_id("resp")

    async def begin(lease: Lease) -> Conversing:
        return await converse(
            request,
            body,
            lease,
            lambda catalog: _conversation(catalog, body, state.config.limits, response_id),
        )

    with renamed_fields(_field_name):
        begun = await with_experts(request, begin, seconds=body.timeout)
    note_work(request, body, begun.generation, response_id)
    tokenizer = state.models.base.tokenizer
    writer = ResponseWriter(
        {"id": response_id, **_as_understood(body)},
        begun.form,
        partial(token_logprobs, tokenizer=tokenizer) if body.wants_logprobs else None,
    )
    events = _events(begun.generation, writer, tokenizer if wants_explanations(body.fusion) else None)
    if body.stream:
        return EventStream(
            _frames(events),
            stopping=state.stopping,
            last="",
            failed=lambda problem: "".join(map(_frame, writer.fail(problem.detail.message))),
        )
    whole = await while_present(_whole(events), request.receive, state.stopping)
    return Response(as_json(whole), media_type="application/json")


def _field_name(shared: str) -> str:
    return _FIELD_NAMES.get(shared, shared).replace(".function.", ".")


def _conversation(catalog: Catalog, body: ResponsesRequest, limits: Limits, request_id: str) -> Conversation:
    """Raises InvalidRequest."""
    if body.top_logprobs and not body.wants_logprobs:
        raise InvalidRequest(
            "'top_logprobs' needs 'include': [\"message.output_text.logprobs\"].", param="top_logprobs"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    cap("top_logprobs", body.top_logprobs or 0, limits.max_logprobs, "log-probabilities per token")
    return Conversation(
        request_id,
        messages_of(body.instructions, body.input),
        _asked(body, limits),
        partial(
            sampling_params,
            body,
            limits,
            catalog.models,
            logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
        ),
        max_tokens=body.max_output_tokens,
        grammar=text_format(body.text, limits.grammar),
    )


def _asked(body: ResponsesRequest, limits: Limits) -> AskedChat:
    tools = [tool.for_chat() for tool in body.tools or ()]
    return AskedChat(
        tool_use(tools, choice_for_chat(body.tool_choice), body.parallel_tool_calls, limits),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
    )


def _as_understood(body: ResponsesRequest) -> dict[str, Any]:
    """The fields of a response that repeat its request's, defaults filled in."""
    form = None if body.text is None else body.text.format
    return {
        "model": body.model,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"} if form is None else _given(form)},
        "tool_choice": _given(body.tool_choice or "auto"),
        "tools": [_given(tool) | {"strict": bool(tool.strict)} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _given(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_unset=True) if isinstance(value, RequestModel) else value


async def _events(
    generation: Generation, writer: ResponseWriter, explain_with: Tokenizer | None
) -> AsyncGenerator[AnyEvent, None]:
    """All events of the response; the last one has it whole."""
    explanations: list[TokenExplanation] = []
    more: dict[str, Any] = {}
    for event in writer.begin():
        yield event
    async with aclosing(generation.events()) as outputs:
        async for _, output in outputs:
            explanations += output.explanations or ()
            more |= {"stop_reason": output.stop_reason, **grammar_report(output.removed_mass)}
            for event in writer.take(output):
                yield event
    more["usage"] = _usage(generation.usage(), writer.reasoning_tokens)
    fusion = generation.fusion()
    if fusion is not None:
        more["fusion"] = fusion
    if explain_with is not None:
        more["explain"] = explained(explanations, explain_with)
    for event in writer.end(**more):
        yield event


def _usage(usage: UsageBody, reasoning_tokens: int) -> ResponseUsage:
    """In OpenAI's names."""
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
        **usage.model_dump(
            exclude_unset=True, include={"total_tokens", "lane_tokens", "gated_tokens", "skipped_lane_tokens"}
        ),
    )


async def _whole(events: AsyncGenerator[AnyEvent, None]) -> ResponseObject:
    """The response at the end. The work ends with this, however it ends."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, ResponseCompleted | ResponseIncomplete):
                return event.response
    raise AssertionError("the last event has the response")


async def _frames(events: AsyncGenerator[AnyEvent, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield _frame(event)


def _frame(event: AnyEvent) -> str:
    return event_frame(as_json(event), event.type)
