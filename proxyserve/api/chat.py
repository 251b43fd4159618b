"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from proxyserve.api.documentation import ENGINE_ERRORS, error_answers, event_stream
from proxyserve.api.explanations import explained, wants_explanations
from proxyserve.api.generate import Answer, Generation
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.logprobs import chat_logprobs
from proxyserve.api.prepare import (
    cache_salt,
    check_shape,
    prepared,
    resolve_fusion,
    room_for_answer,
    sampling_params,
    with_experts,
)
from proxyserve.api.respond import respond, response_head
from proxyserve.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
)
from proxyserve.api.schemas.responses import finish_name
from proxyserve.api.state import ServerState, server_state
from proxyserve.engine.caller import Caller
from proxyserve.engine.prompts import chat_prompts
from proxyserve.engine.submission import Submission
from proxyserve.errors import InvalidRequest
from proxyserve.types import OutputEvent, TokenExplanation, TokenLogprob

if TYPE_CHECKING:
    from proxyserve.engine.offer import Lease
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.text.tokenizer import Tokenizer

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
    shape = _ChatShape(body, state.models.base.tokenizer)
    salt = cache_salt(request.state.salt, body.user)
    caller: Caller = request.state.caller

    async def begin(lease: Lease) -> Generation:
        submission = await prepared(
            request, lambda: _submission(state, lease.catalog, body, shape.id, salt, caller)
        )
        return Generation(request, [submission], lease)

    with _chat_field_names(body):
        generation = await with_experts(request, begin, seconds=body.timeout)
    return await respond(request, body, generation, shape)


def _submission(
    state: ServerState, catalog: Catalog, body: ChatRequest, request_id: str, salt: str, caller: Caller
) -> Submission:
    """Raises InvalidRequest or UnknownModel."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest(
            "'max_completion_tokens' is the newer name of 'max_tokens'; give one of them.",
            param="max_completion_tokens",
        )
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    limits = state.config.limits
    check_shape(body, limits, top_logprobs=body.top_logprobs, param="top_logprobs")
    fusion = resolve_fusion(body.model, body.fusion, catalog)
    vetted = body.model in catalog.presets
    prompts = chat_prompts(catalog, fusion, [message.rendered() for message in body.messages])
    sampling = sampling_params(
        body,
        limits,
        catalog.models,
        max_tokens=body.max_tokens
        or body.max_completion_tokens
        or room_for_answer(state.engine.engine, fusion, prompts, catalog),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Submission(
        request_id, prompts, sampling, fusion, n=body.n or 1, salt=salt, caller=caller, vetted=vetted
    )


@contextmanager
def _chat_field_names(body: ChatRequest) -> Iterator[None]:
    """The engine calls things by the field names of /v1/completions."""
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise


class _ChatShape:
    """Chat's `ResponseShape`: the first delta of each choice has its role, the last its finish reason."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self._head = response_head("chatcmpl", body.model)
        self.id: str = self._head["id"]
        self._wants_logprobs = bool(body.logprobs)
        self._wants_explanations = wants_explanations(body.fusion)
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def chunk(self, events: Sequence[tuple[int, OutputEvent]], **more: Any) -> ChatChunk:
        choices = [
            ChatChunkChoice(
                index=number,
                delta=self._delta(number, event),
                logprobs=self._logprobs(event.logprobs or ()),
                finish_reason=finish_name(event.finish_reason),
                **self._explain(event.explanations or ()),
            )
            for number, event in events
        ]
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=choices, **more)

    def whole(self, answers: Sequence[Answer], **more: Any) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=number,
                message=AssistantMessage(role="assistant", content=answer.text, refusal=None),
                logprobs=self._logprobs(answer.logprobs),
                finish_reason=finish_name(answer.finish_reason),
                **self._explain(answer.explanations),
            )
            for number, answer in enumerate(answers)
        ]
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, **more)

    def _delta(self, number: int, event: OutputEvent) -> ChatDelta:
        if number not in self._begun:
            self._begun.add(number)
            return ChatDelta(role="assistant", content=event.text)
        return ChatDelta(content=event.text) if event.text else ChatDelta()

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self._tokenizer) if self._wants_logprobs else None

    def _explain(self, entries: Sequence[TokenExplanation]) -> dict[str, Any]:
        """Nothing at all for a request that did not ask."""
        return {"explain": explained(entries, self._tokenizer)} if self._wants_explanations else {}
