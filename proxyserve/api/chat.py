"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from proxyserve.api.chat_shape import ChatShape
from proxyserve.api.conversation import (
    AskedChat,
    answer_format,
    chat_constraints,
    chat_grammar,
    chat_options,
)
from proxyserve.api.documentation import ENGINE_ERRORS, error_answers, event_stream
from proxyserve.api.generate import Generation
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.prepare import (
    cache_salt,
    check_prompt_logprobs,
    check_shape,
    prepared,
    priority_of,
    resolve_fusion,
    room_for_answer,
    sampling_params,
    with_experts,
)
from proxyserve.api.respond import respond
from proxyserve.api.schemas.chat import ChatCompletion, ChatRequest
from proxyserve.api.schemas.message import rendered
from proxyserve.api.state import ServerState, server_state
from proxyserve.api.structured import compiled, constraints_of
from proxyserve.api.tools import tool_use
from proxyserve.config import Limits
from proxyserve.engine.caller import Caller
from proxyserve.engine.prompts import chat_prompts
from proxyserve.engine.submission import Submission
from proxyserve.errors import InvalidRequest
from proxyserve.grammar.grammar import Grammar
from proxyserve.text.answer import AnswerFormat

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
    salt = cache_salt(request.state.salt, body)
    caller: Caller = request.state.caller

    async def begin(lease: Lease) -> Generation:
        asked = _asked(body, state.config.limits)
        submission, form, grammar = await prepared(
            request, lambda: _submission(state, lease.catalog, body, asked, shape.id, salt, caller)
        )
        shape.form, shape.prompt = form, submission.prompts.default
        ready = await compiled(state, grammar, body.stop_token_ids)
        constraints = chat_constraints(form, asked, state.models.base.tokenizer, ready)
        submission = replace(submission, constraints=constraints)
        return Generation(request, [submission], lease)

    with _chat_field_names(body):
        generation = await with_experts(request, begin, seconds=body.timeout)
    return await respond(request, body, generation, shape)


def _submission(
    state: ServerState,
    catalog: Catalog,
    body: ChatRequest,
    asked: AskedChat,
    request_id: str,
    salt: str,
    caller: Caller,
) -> tuple[Submission, AnswerFormat, Grammar | None]:
    """Also how the answer is to be read, and the form that it must have; the submission knows nothing of that yet.
    Raises InvalidRequest or UnknownModel."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest(
            "'max_completion_tokens' is the newer name of 'max_tokens'; give one of them.",
            param="max_completion_tokens",
        )
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    limits, chat = state.config.limits, state.config.chat
    check_shape(body, limits, top_logprobs=body.top_logprobs, param="top_logprobs")
    fusion = resolve_fusion(body.model, body.fusion, catalog)
    vetted = body.model in catalog.presets
    tokenizer = catalog.models.base.tokenizer
    prompts = chat_prompts(catalog, fusion, rendered(body.messages), chat_options(asked, chat, limits))
    form = answer_format(prompts, asked.tools, chat, tokenizer)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    sampling = sampling_params(
        body,
        limits,
        catalog.models,
        max_tokens=room_for_answer(state.engine.engine, fusion, prompts.lanes, catalog)
        if wanted is None
        else wanted,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    if form.special_marks and sampling.skip_special_tokens:
        sampling = replace(sampling, skip_special_tokens=False)
    elif form.special_marks:  # the client wants to see them all
        form = replace(form, hidden=frozenset())
    submission = Submission(
        request_id,
        prompts.lanes,
        sampling,
        fusion,
        n=body.n or 1,
        salt=salt,
        caller=caller,
        vetted=vetted,
        priority=priority_of(body, caller),
    )
    check_prompt_logprobs([submission], limits, "messages")
    given = constraints_of(body, limits.grammar)
    return submission, form, chat_grammar(asked, form, given, tokenizer, limits.grammar)


def _asked(body: ChatRequest, limits: Limits) -> AskedChat:
    return AskedChat(
        tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, limits),
        template_variables=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        thinking_budget=body.thinking_budget,
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
