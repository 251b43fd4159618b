"""POST /v1/score: fused log-likelihoods of given texts and tokens; nothing is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from proxyserve.api.documentation import ENGINE_ERRORS, error_answers
from proxyserve.api.generate import Generation, collect
from proxyserve.api.generation_route import GenerationRoute
from proxyserve.api.prepare import (
    cache_salt,
    cap,
    check_ids,
    check_listed,
    check_prompt_logprobs,
    prepared,
    priority_of,
    resolve_fusion,
    with_experts,
)
from proxyserve.api.presence import while_present
from proxyserve.api.record import RequestRecord
from proxyserve.api.respond import response_head, written
from proxyserve.api.schemas.completions import Prompt
from proxyserve.api.schemas.score import Score, ScoreRequest
from proxyserve.api.scored import Scored
from proxyserve.api.state import server_state
from proxyserve.engine.caller import Caller
from proxyserve.engine.prompts import text_prompts, token_prompts
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.errors import Forbidden, InvalidRequest
from proxyserve.types import SamplingParams

if TYPE_CHECKING:
    from proxyserve.config import Limits
    from proxyserve.engine.offer import Lease
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.fusion.fusion import Fusion
    from proxyserve.text.tokenizer import Tokenizer

router = APIRouter(tags=["scoring"], route_class=GenerationRoute)

#: A context of at least this many tokens is computed for one continuation before the others begin, which find it in the
#: prefix cache then. For shorter ones that would take longer than computing them again.
_SHARED_FROM = 64


@router.post(
    "/v1/score",
    summary="Score given texts or tokens",
    response_model=Score,
    responses=error_answers(*ENGINE_ERRORS),
)
async def create_score(request: Request, body: ScoreRequest) -> Response:
    """Log-probabilities of what follows a prompt, or of whole texts, under the base fused with the experts that `model`
    or `fusion` name."""
    _check_fields(body)
    state = server_state(request)
    head = response_head("score", body.model)
    salt = cache_salt(request.state.salt, body)
    caller: Caller = request.state.caller
    record: RequestRecord = request.state.record
    record.metadata = body.metadata or {}

    async def begin(lease: Lease) -> Scored:
        submissions = await prepared(
            request,
            lambda: [
                replace(submission, salt=salt, caller=caller, priority=priority_of(body, caller))
                for submission in _submissions(body, head["id"], lease.catalog, state.config.limits)
            ],
        )
        scored = Scored()
        alone = 1 if _shares_context(submissions) else 0
        for part in (submissions[:alone], submissions[alone:]):
            if part:
                generation = Generation(request, part, lease, record.work)
                record.work = generation.work
                answers = await while_present(collect(generation), request.receive, state.stopping)
                scored.add(part, answers, generation)
        return scored

    with _score_field_names(body):
        scored = await with_experts(request, begin, seconds=body.timeout)
    tokenizer = state.models.base.tokenizer

    def write() -> str:
        score = Score(**head, object="score", **scored.fields(body, tokenizer), **scored.totals())
        return score.model_dump_json(exclude_unset=True)

    return Response(await written(write, long=True), media_type="application/json")


@contextmanager
def _score_field_names(body: ScoreRequest) -> Iterator[None]:
    """The engine calls things by the field names of /v1/completions."""
    names = {
        "prompt": "prompt" if body.texts is None else "texts",
        "max_tokens": "prompt",
        "prompt_logprobs": "model",
        "logprob_token_ids": "label_token_ids",
    }
    try:
        yield
    except Forbidden as error:  # more log-probabilities per token than the key may have
        error.param = {**names, "prompt_logprobs": "logprobs"}.get(error.param or "", error.param)
        if error.param == "logprobs" and not body.logprobs:
            error.message = (
                "Scoring looks at the likeliest token's log-probability, and this key may have none: its max_logprobs "
                "is 0."
            )
        raise
    except InvalidRequest as error:
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise


def _submissions(body: ScoreRequest, request_id: str, catalog: Catalog, limits: Limits) -> list[Submission]:
    """One per continuation or text, or one for all labels. Raises InvalidRequest or UnknownModel."""
    cap("logprobs", body.logprobs or 0, limits.max_logprobs, "log-probabilities per token")
    fusion = resolve_fusion(body.model, body.fusion, catalog)
    _check_fusion(fusion)
    if body.label_token_ids is not None:
        check_listed(body.label_token_ids, limits, "label_token_ids")
        check_ids(body.label_token_ids, catalog.models, "label_token_ids")
        sampling = SamplingParams(
            1, temperature=0.0, ignore_eos=True, logprobs=0, logprob_token_ids=tuple(body.label_token_ids)
        )
        assert body.prompt is not None  # `_check_fields`
        found = [(_rendered(catalog, fusion, body.prompt), sampling)]
    else:
        # The likeliest token of each position says whether the text is greedy.
        sampling = SamplingParams(0, prompt_logprobs=max(1, body.logprobs or 0))
        texts = body.texts or body.continuations or ()
        cap("texts" if body.texts else "continuations", len(texts), limits.max_choices, "texts")
        if body.texts:
            found = [(_text(catalog, fusion, text, number), sampling) for number, text in enumerate(texts)]
        else:
            found = _continuations(body, catalog, fusion, sampling)
    submissions = [
        Submission(f"{request_id}-{number}", prompts, wanted, fusion, vetted=body.model in catalog.presets)
        for number, (prompts, wanted) in enumerate(found)
    ]
    check_prompt_logprobs(submissions, limits, "texts" if body.texts else "continuations")
    return submissions


def _check_fields(body: ScoreRequest) -> None:
    """Raises InvalidRequest where it is not clear what is to be scored, or a field would say nothing."""
    fields = ("continuations", "label_token_ids", "texts")
    given = [name for name in fields if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            "Give exactly one of 'continuations', 'label_token_ids' and 'texts'.",
            param=given[1] if given else fields[0],
        )
    (kind,) = given
    if (kind == "texts") == (body.prompt is not None):
        raise InvalidRequest(
            "'texts' are scored as they are; leave 'prompt' out, or give 'continuations' of it."
            if kind == "texts"
            else f"'{kind}' are scored as what follows a prompt; give 'prompt'.",
            param="prompt",
        )
    if kind == "label_token_ids" and body.logprobs is not None:
        raise InvalidRequest(
            "'logprobs' goes with 'continuations' and 'texts'; leave it out.", param="logprobs"
        )
    if kind != "label_token_ids" and body.normalize:
        raise InvalidRequest("'normalize' goes with 'label_token_ids'; leave it out.", param="normalize")


def _check_fusion(fusion: Fusion) -> None:
    """Raises InvalidRequest for what would change nothing."""
    if fusion.target_entropy is not None:
        raise InvalidRequest(
            "Log-probabilities are those before any temperature; leave 'target_entropy' out to score a text.",
            param="fusion.target_entropy",
        )
    if fusion.explain:
        raise InvalidRequest(
            "Scores are not explained; leave 'explain' out, or ask /v1/completions with 'echo'.",
            param="fusion.explain",
        )


def _rendered(catalog: Catalog, fusion: Fusion, prompt: Prompt) -> LanePrompts:
    if isinstance(prompt, str):
        return text_prompts(catalog, fusion, prompt)
    return token_prompts(catalog, fusion, prompt)


def _text(catalog: Catalog, fusion: Fusion, text: Prompt, number: int) -> LanePrompts:
    prompts = _rendered(catalog, fusion, text)
    if min(map(len, prompts.by_lane.values())) < 2:
        raise InvalidRequest(
            f"texts[{number}] is a single token, which nothing comes before; give a longer text, or score it as a "
            "continuation of a prompt.",
            param=f"texts[{number}]",
        )
    return prompts


def _continuations(
    body: ScoreRequest, catalog: Catalog, fusion: Fusion, sampling: SamplingParams
) -> list[tuple[LanePrompts, SamplingParams]]:
    """Each continuation after the context, in every lane."""
    tokenizer = catalog.models.base.tokenizer
    rendered: dict[Prompt, LanePrompts] = {}
    found = []
    assert body.prompt is not None  # `_check_fields`
    for number, continuation in enumerate(body.continuations or ()):
        context, ids = split_pair(tokenizer, body.prompt, continuation)
        if not ids:
            raise InvalidRequest(
                f"The tokenizer writes continuations[{number}] with no token; give another text, or token ids.",
                param=f"continuations[{number}]",
            )
        if context not in rendered:
            rendered[context] = _rendered(catalog, fusion, context)
        before = rendered[context]
        whole = LanePrompts(
            (*before.default, *ids), {lane: (*prompt, *ids) for lane, prompt in before.by_lane.items()}
        )
        found.append((whole, replace(sampling, prompt_logprobs_from=len(before.default))))
    return found


def split_pair(tokenizer: Tokenizer, prompt: Prompt, continuation: Prompt) -> tuple[Prompt, tuple[int, ...]]:
    """The context, and the ids of the continuation after it. Two texts are encoded together, so that words at the seam
    get the tokens that they have in running text; unless a token would run across it."""
    if not isinstance(continuation, str):
        return prompt, continuation
    if not isinstance(prompt, str):
        return prompt, tuple(tokenizer.encode(continuation, add_special_tokens=False))
    context = prompt.rstrip() or prompt
    first = tokenizer.encode(context, add_special_tokens=False)
    whole = tokenizer.encode(prompt + continuation, add_special_tokens=False)
    if whole[: len(first)] == first:
        return context, tuple(whole[len(first) :])
    apart = prompt[len(context) :] + continuation
    return context, tuple(tokenizer.encode(apart, add_special_tokens=False))


def _shares_context(submissions: Sequence[Submission]) -> bool:
    return len(submissions) > 1 and submissions[0].sampling.prompt_logprobs_from >= _SHARED_FROM
