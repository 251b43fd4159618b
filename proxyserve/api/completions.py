"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from proxyserve.api.choice_extras import prompt_extras, token_extras
from proxyserve.api.documentation import ENGINE_ERRORS, error_answers, event_stream
from proxyserve.api.echo import Echo
from proxyserve.api.explanations import explained, explained_prompt, wants_explanations
from proxyserve.api.generate import Answer, Generation
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.logprobs import CompletionLogprobsBuilder, TokenNames
from proxyserve.api.prepare import (
    cache_salt,
    check_prompt_logprobs,
    check_shape,
    generation_params,
    prepared,
    priority_of,
    resolve_fusion,
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
from proxyserve.api.structured import compiled, constraints_of, grammar_report
from proxyserve.engine.caller import Caller
from proxyserve.engine.prompts import text_prompts, token_prompts
from proxyserve.engine.submission import Submission
from proxyserve.errors import InvalidRequest
from proxyserve.types import OutputEvent

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
    salt = cache_salt(request.state.salt, body)
    caller: Caller = request.state.caller
    constraints = await compiled(
        state, constraints_of(body, state.config.limits.grammar), body.stop_token_ids
    )

    async def begin(lease: Lease) -> Generation:
        submissions = await prepared(
            request, lambda: _submissions(state, lease.catalog, body, shape, salt, caller)
        )
        submissions = [replace(submission, constraints=constraints) for submission in submissions]
        return Generation(request, submissions, lease)

    return await respond(request, body, await with_experts(request, begin, seconds=body.timeout), shape)


def _submissions(
    state: ServerState,
    catalog: Catalog,
    body: CompletionRequest,
    shape: _CompletionShape,
    salt: str,
    caller: Caller,
) -> list[Submission]:
    """One per prompt; tells `shape` of them. Raises InvalidRequest or UnknownModel."""
    limits = state.config.limits
    if len(body.prompt) > limits.max_batched_prompts:
        raise InvalidRequest(
            f"{len(body.prompt)} prompts are given; this server allows {limits.max_batched_prompts} per request.",
            param="prompt",
        )
    check_shape(body, limits, top_logprobs=body.logprobs, param="logprobs", prompts=len(body.prompt))
    _check_fields(body)
    fusion = resolve_fusion(body.model, body.fusion, catalog)
    sampling = generation_params(
        body,
        limits,
        catalog.models,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        echoed=_echoed(body),
    )
    submissions = [
        Submission(
            f"{shape.id}-{number}",
            text_prompts(catalog, fusion, prompt)
            if isinstance(prompt, str)
            else token_prompts(catalog, fusion, prompt),
            sampling,
            fusion,
            n=body.n or 1,
            salt=salt,
            caller=caller,
            vetted=body.model in catalog.presets,
            priority=priority_of(body, caller),
        )
        for number, prompt in enumerate(body.prompt)
    ]
    check_prompt_logprobs(submissions, limits)
    shape.answers(submissions)
    return submissions


def _check_fields(body: CompletionRequest) -> None:
    """Raises InvalidRequest for fields that say nothing without others."""
    if body.return_tokens_as_token_ids and body.logprobs is None:
        raise InvalidRequest(
            "'return_tokens_as_token_ids' is about the names in 'logprobs', which is not asked for; give both or none.",
            param="return_tokens_as_token_ids",
        )
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest(
            f"All answers are returned, so 'best_of' must be 'n' ({body.n or 1}); leave it out.",
            param="best_of",
            code="unsupported_parameter",
        )
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise InvalidRequest(
            "'max_tokens' 0 asks for nothing unless the prompt is asked about; give 'echo' or 'prompt_logprobs', or at "
            "least 1.",
            param="max_tokens",
        )


def _echoed(body: CompletionRequest) -> int | None:
    """The number of likely tokens that the echo of a prompt needs at each position, None where it is text alone."""
    if body.echo and (body.logprobs is not None or body.logprob_token_ids):
        return body.logprobs or 0
    # A prompt that is only repeated runs all the same, so that it is refused for the same reasons as any other.
    return 0 if body.max_tokens == 0 else None


class _CompletionShape:
    """The `ResponseShape` of completions: whole responses and chunks look alike."""

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._head = response_head("cmpl", body.model)
        self.id: str = self._head["id"]
        self._body = body
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, by_id=bool(body.return_tokens_as_token_ids))
        self._wants_explanations = wants_explanations(body.fusion)
        self._submissions: Sequence[Submission] = ()
        self._echoes: Sequence[Echo] = ()
        self._builders: dict[int, CompletionLogprobsBuilder] = {}
        self._begun: set[int] = set()

    def answers(self, submissions: Sequence[Submission]) -> None:
        """Choice `prompt * n + i` will be the i-th answer to that prompt."""
        self._submissions = submissions
        if self._body.echo:
            self._echoes = [
                Echo.of(submission, given, self._tokenizer)
                for submission, given in zip(submissions, self._body.prompt, strict=True)
            ]

    def chunks(self, number: int, event: OutputEvent, *, each: Fields, last: Fields) -> list[Completion]:
        if not self._tells(event):
            return []
        choice = self._choice(number, event)
        return [Completion(**self._head, object="text_completion", choices=[choice], **each, **last)]

    def closing(self, **more: Any) -> Completion:
        return Completion(**self._head, object="text_completion", choices=[], **more)

    def whole(self, answers: Sequence[Answer], **more: Any) -> Completion:
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return Completion(**self._head, object="text_completion", choices=choices, **more)

    def _tells(self, event: OutputEvent) -> bool:
        """Whether there is anything to send: text may be held back, and ids are sent only where they are asked for."""
        return bool(
            event.text
            or event.logprobs
            or event.explanations
            or event.prompt_logprobs
            or (self._body.return_token_ids and event.token_ids)
            or event.finish_reason
        )

    def _choice(self, number: int, part: OutputEvent | Answer) -> CompletionChoice:
        """A choice, or the next piece of it."""
        first = number not in self._begun
        self._begun.add(number)
        echo = self._echoes[number // (self._body.n or 1)] if first and self._echoes else None
        return CompletionChoice(
            index=number,
            text=part.text if echo is None else echo.text + part.text,
            logprobs=self._logprobs(number, part, echo),
            finish_reason=finish_name(part.finish_reason),
            **_ended(part),
            **grammar_report(part.removed_mass),
            **token_extras(self._body, part, echoed=echo is not None),
            **(self._of_prompt(number, part) if first else {}),
            **self._explain(part),
        )

    def _logprobs(
        self, number: int, part: OutputEvent | Answer, echo: Echo | None
    ) -> CompletionLogprobs | None:
        body = self._body
        if body.logprobs is None:
            return None
        builder = self._builders.get(number)
        if builder is None:
            builder = self._builders[number] = CompletionLogprobsBuilder(
                self._tokenizer,
                self._names,
                body.logprobs,
                skip_special=body.skip_special_tokens is not False,
            )
        of_prompt = None if echo is None else builder.begin(echo, part.prompt_logprobs or ())
        return builder.add(part.logprobs or (), after=of_prompt)

    def _of_prompt(self, number: int, part: OutputEvent | Answer) -> dict[str, Any]:
        """What a choice's first piece says of its prompt."""
        submission = self._submissions[number // (self._body.n or 1)]
        return prompt_extras(self._body, submission.prompts.default, part, self._tokenizer)

    def _explain(self, part: OutputEvent | Answer) -> dict[str, Any]:
        """Nothing at all for a request that did not ask."""
        if not self._wants_explanations:
            return {}
        fields: dict[str, Any] = {"explain": explained(part.explanations or (), self._tokenizer)}
        if part.prompt_explanations is not None:
            fields["prompt_explain"] = explained_prompt(part.prompt_explanations, self._tokenizer)
        return fields


def _ended(part: OutputEvent | Answer) -> dict[str, Any]:
    return {} if part.finish_reason is None else {"stop_reason": part.stop_reason}
