"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from proxyserve.api.documentation import ENGINE_ERRORS, error_answers, event_stream
from proxyserve.api.explanations import explained, wants_explanations
from proxyserve.api.generate import Answer, Generation
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.logprobs import CompletionLogprobsBuilder
from proxyserve.api.prepare import (
    cache_salt,
    check_shape,
    prepared,
    resolve_fusion,
    sampling_params,
    with_experts,
)
from proxyserve.api.respond import Fields, respond, response_head
from proxyserve.api.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from proxyserve.api.schemas.responses import finish_name
from proxyserve.api.state import ServerState, server_state
from proxyserve.engine.caller import Caller
from proxyserve.engine.prompts import text_prompts, token_prompts
from proxyserve.engine.submission import Submission
from proxyserve.errors import InvalidRequest
from proxyserve.types import OutputEvent, TokenExplanation, TokenLogprob

if TYPE_CHECKING:
    from proxyserve.engine.offer import Lease
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.text.tokenizer import Tokenizer

router = APIRouter(tags=["generation"], route_class=GenerationRoute)


@router.post(
    "/v1/completions",
    summary="Continue a text",
    response_model=Completion,
    responses={200: event_stream("Completion"), **error_answers(*ENGINE_ERRORS)},
)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """The base continues each prompt, fused with the experts that `model` or `fusion` name."""
    state = server_state(request)
    shape = _CompletionShape(body, state.models.base.tokenizer)
    salt = cache_salt(request.state.salt, body.user)
    caller: Caller = request.state.caller

    async def begin(lease: Lease) -> Generation:
        submissions = await prepared(
            request, lambda: _submissions(state, lease.catalog, body, shape.id, salt, caller)
        )
        return Generation(request, submissions, lease)

    return await respond(request, body, await with_experts(request, begin, seconds=body.timeout), shape)


def _submissions(
    state: ServerState,
    catalog: Catalog,
    body: CompletionRequest,
    request_id: str,
    salt: str,
    caller: Caller,
) -> list[Submission]:
    """One per prompt. Raises InvalidRequest or UnknownModel."""
    limits = state.config.limits
    if len(body.prompt) > limits.max_batched_prompts:
        raise InvalidRequest(
            f"{len(body.prompt)} prompts are given; this server allows {limits.max_batched_prompts} per request.",
            param="prompt",
        )
    check_shape(body, limits, top_logprobs=body.logprobs, param="logprobs")
    if body.return_tokens_as_token_ids and body.logprobs is None:
        raise InvalidRequest(
            "'return_tokens_as_token_ids' is about the names in 'logprobs', which is not asked for; give both or none.",
            param="return_tokens_as_token_ids",
        )
    fusion = resolve_fusion(body.model, body.fusion, catalog)
    vetted = body.model in catalog.presets
    sampling = sampling_params(
        body, limits, catalog.models, max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS, logprobs=body.logprobs
    )
    return [
        Submission(
            f"{request_id}-{number}",
            text_prompts(catalog, fusion, prompt)
            if isinstance(prompt, str)
            else token_prompts(catalog, fusion, prompt),
            sampling,
            fusion,
            n=body.n or 1,
            salt=salt,
            caller=caller,
            vetted=vetted,
        )
        for number, prompt in enumerate(body.prompt)
    ]


class _CompletionShape:
    """The `ResponseShape` of completions: whole responses and chunks look alike."""

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._head = response_head("cmpl", body.model)
        self.id: str = self._head["id"]
        self._wants_logprobs = body.logprobs is not None
        self._names_by_id = bool(body.return_tokens_as_token_ids)
        self._wants_explanations = wants_explanations(body.fusion)
        self._tokenizer = tokenizer
        self._builders: dict[int, CompletionLogprobsBuilder] = {}

    def chunks(self, number: int, event: OutputEvent, *, each: Fields, last: Fields) -> list[Completion]:
        if not (event.text or event.logprobs or event.explanations or event.finish_reason):
            return []
        choice = CompletionChoice(
            index=number,
            text=event.text,
            logprobs=self._logprobs(number, event.logprobs or ()),
            finish_reason=finish_name(event.finish_reason),
            **self._explain(event.explanations or ()),
        )
        return [Completion(**self._head, object="text_completion", choices=[choice], **each, **last)]

    def closing(self, **more: Any) -> Completion:
        return Completion(**self._head, object="text_completion", choices=[], **more)

    def whole(self, answers: Sequence[Answer], **more: Any) -> Completion:
        choices = [
            CompletionChoice(
                index=number,
                text=answer.text,
                logprobs=self._logprobs(number, answer.logprobs),
                finish_reason=finish_name(answer.finish_reason),
                **self._explain(answer.explanations),
            )
            for number, answer in enumerate(answers)
        ]
        return Completion(**self._head, object="text_completion", choices=choices, **more)

    def _logprobs(self, number: int, entries: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        builder = self._builders.get(number)
        if builder is None:
            builder = self._builders[number] = CompletionLogprobsBuilder(
                self._tokenizer, by_id=self._names_by_id
            )
        return builder.add(entries)

    def _explain(self, entries: Sequence[TokenExplanation]) -> dict[str, Any]:
        """Nothing at all for a request that did not ask."""
        return {"explain": explained(entries, self._tokenizer)} if self._wants_explanations else {}
