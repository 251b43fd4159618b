"""From a request's body to what the engine is asked: fusion and sampling parameters."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from proxyserve.api.deadline import seconds_left, set_deadline
from proxyserve.api.presence import while_present
from proxyserve.api.schemas.common import EngineRequest, GenerationRequest, SampledRequest
from proxyserve.api.schemas.fusion import FusionObject
from proxyserve.api.state import server_state
from proxyserve.config import Limits
from proxyserve.engine.caller import Caller
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.errors import ExpertParked, Forbidden, InvalidRequest, NotReady
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.model_name import parse_model_name
from proxyserve.fusion.rules.proxy import Proxy
from proxyserve.types import SamplingParams

if TYPE_CHECKING:
    from proxyserve.engine.engine import Engine
    from proxyserve.engine.offer import Lease
    from proxyserve.models.model_set import ModelSet
    from proxyserve.text.tokenizer import Tokenizer

T = TypeVar("T")

#: Fields that go into `SamplingParams` under their own names.
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)

#: Bodies above this are prepared on another thread: encoding so much text would hold up everybody's streams.
_LARGE_BODY = 32 * 1024


async def prepared(request: Request, work: Callable[[], T]) -> T:
    """Run `work` (validation, chat templates, tokenizers) where it holds up nobody."""
    if len(await request.body()) > _LARGE_BODY:
        return await run_in_threadpool(work)
    return work()


async def with_experts(
    request: Request, begin: Callable[[Lease], Awaitable[T]], *, seconds: float | None = None
) -> T:
    """Run `begin` with the current offer leased. If that finds that an expert must be loaded first, wait for it, for
    `ServerConfig.load_wait_seconds` in all, and run it again. `seconds` is the timeout that the request asks for.
    Raises NotReady if loading takes too long or fails, QueueFull, DeadlineExceeded, Forbidden and ClientDisconnect."""
    set_deadline(request, seconds)
    state = server_state(request)
    patience = asyncio.get_running_loop().time() + state.config.load_wait_seconds
    while True:
        try:
            with state.engine.engine.offers.lease() as lease:
                return await begin(lease)
        except ExpertParked as parked:
            if state.experts is None:
                raise
            caller: Caller = request.state.caller
            if not caller.may_use(parked.name):
                raise Forbidden(f"This key may not use expert '{parked.name}'.", param="model") from None
            left = patience - asyncio.get_running_loop().time()
            most = seconds_left(request)
            await request.body()  # so that the next message is that the client has left
            waking = state.experts.wake(parked.name, left if most is None else min(left, most))
            try:
                await while_present(waking, request.receive, state.stopping)
            except NotReady:
                seconds_left(request)  # that it took too long may be the request's own wish
                raise


@contextmanager
def renamed_fields(name: Callable[[str], str]) -> Iterator[None]:
    """What is refused in here under the engine's name of a field is refused under the route's own `name` of it."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            error.param = name(error.param)
        raise


#: What a request may add to a preset.
_BESIDE_PRESETS = {"explain", "prompts"}


def resolve_fusion(model: str, given: FusionObject | None, catalog: Catalog) -> Fusion:
    """The fusion that `model` and the `fusion` object ask for together. Raises UnknownModel or InvalidRequest."""
    named = parse_model_name(model, catalog)
    if given is None:
        return named
    if model in catalog.presets:
        return _with_preset(model, named, given)
    experts = named.rule.experts if isinstance(named.rule, Proxy) else ()
    if not experts:
        return given.fusion()
    if not hasattr(given, "experts"):
        raise InvalidRequest(
            f"'model' ('{model}') names experts, and rule '{given.rule_class.name}' takes none; use model "
            f"'{catalog.models.base.name}'.",
            param="model",
        )
    if given.experts is not None:
        raise InvalidRequest(
            f"Experts are named both in 'model' ('{model}') and in 'fusion.experts'; use one of them, "
            f"such as model '{catalog.models.base.name}' with 'fusion.experts'.",
            param="fusion.experts",
        )
    return given.fusion(experts)


def _with_preset(name: str, preset: Fusion, given: FusionObject) -> Fusion:
    wanted = {field for field in given.model_fields_set if getattr(given, field) is not None}
    for field in sorted(wanted - _BESIDE_PRESETS):
        raise InvalidRequest(
            f"Model '{name}' is a preset, which fixes the fusion; with it 'fusion' takes only 'explain' and 'prompts'.",
            param=f"fusion.{field}",
        )
    beside = given.fusion_beside()
    return replace(preset, explain=beside.explain, prompts={**preset.prompts, **beside.prompts})


def generation_params(
    body: GenerationRequest,
    limits: Limits,
    models: ModelSet,
    *,
    max_tokens: int,
    logprobs: int | None,
    echoed: int | None = None,
) -> SamplingParams:
    """`logprobs` and, for a prompt that is echoed with them, `echoed` are the route's own wishes for the answer's and
    the prompt's tokens. Raises InvalidRequest for what is above `limits`."""
    listed = body.logprob_token_ids or []
    check_listed(listed, limits, "logprob_token_ids")
    check_ids(listed, models, "logprob_token_ids")
    if listed and logprobs is None:
        logprobs = 0
    wished = [count for count in (body.prompt_logprobs, echoed) if count is not None]
    return sampling_params(
        body,
        limits,
        models,
        max_tokens=max_tokens,
        logprobs=logprobs,
        logprob_token_ids=tuple(listed),
        prompt_logprobs=max(wished, default=None),
    )


def sampling_params(
    body: SampledRequest,
    limits: Limits,
    models: ModelSet,
    *,
    max_tokens: int,
    logprobs: int | None,
    **more: Any,
) -> SamplingParams:
    """`more` are fields that not every route has. Raises InvalidRequest for what is above `limits`."""
    stop, stop_ids = body.stop or [], body.stop_token_ids or []
    allowed = body.allowed_token_ids
    cap("stop", len(stop), limits.max_stop, "stop strings")
    cap("stop", max(map(len, stop), default=0), limits.max_stop_length, "characters in a stop string")
    cap("stop_token_ids", len(stop_ids), limits.max_stop, "stop token ids")
    cap("logit_bias", len(body.logit_bias or {}), limits.max_logit_bias, "entries in logit_bias")
    cap("bad_words", len(body.bad_words or []), limits.max_bad_words, "bad words")
    longest = max(map(len, body.bad_words or []), default=0)
    cap("bad_words", longest, limits.max_stop_length, "characters in a bad word")
    check_ids(stop_ids, models, "stop_token_ids")
    check_ids(allowed or (), models, "allowed_token_ids")
    given: dict[str, Any] = {
        name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None
    }
    return SamplingParams(
        max_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(stop_ids),
        logprobs=logprobs,
        bad_words=bad_word_ids(body.bad_words or (), models.base.tokenizer),
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        **given,
        **more,
    )


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The sequences of ids that must not come: each word as it is written at the beginning of a text, and after a space
    where that is not the same ids after others. Raises InvalidRequest for a word that no ids are written for."""
    found: dict[tuple[int, ...], None] = {}
    for number, word in enumerate(words):
        bare = word.lstrip(" ") or word
        first = tuple(tokenizer.encode(bare, add_special_tokens=False))
        later = tuple(tokenizer.encode(f" {bare}", add_special_tokens=False))
        if not first:
            raise InvalidRequest(
                f"The tokenizer writes bad_words[{number}] with no token; leave it out.", param="bad_words"
            )
        found[first] = None
        if later[-len(first) :] != first:
            found[later] = None
    return tuple(found)


def check_ids(ids: Iterable[int], models: ModelSet, param: str) -> None:
    """Raises InvalidRequest for an id that the base does not have."""
    for token in ids:
        if token not in models.base.vocabulary:
            raise InvalidRequest(
                f"Token id {token} is not in the vocabulary of '{models.base.name}'.", param=param
            )


def check_listed(ids: Sequence[int], limits: Limits, param: str) -> None:
    """Raises InvalidRequest for more ids than may be listed at each position, and for one that is there twice."""
    cap(param, len(ids), limits.max_logprob_token_ids, "listed token ids")
    if len(set(ids)) < len(ids):
        raise InvalidRequest("It names a token twice; name each once.", param=param)


def check_prompt_logprobs(submissions: Sequence[Submission], limits: Limits, param: str = "prompt") -> None:
    """Raises InvalidRequest if the prompts' log-probabilities would be more than a response may have."""
    values = 0
    for submission in submissions:
        sampling = submission.sampling
        if sampling.prompt_logprobs is not None:
            tokens = len(submission.prompts.default) - sampling.prompt_logprobs_from
            values += submission.n * tokens * (1 + sampling.prompt_logprobs + len(sampling.logprob_token_ids))
    if values > limits.max_prompt_logprobs:
        raise InvalidRequest(
            f"The response would have {values} log-probabilities of prompt tokens; this server allows "
            f"{limits.max_prompt_logprobs}. Send fewer prompts at a time, or ask for fewer tokens per position.",
            param=param,
        )


def check_shape(
    body: GenerationRequest, limits: Limits, *, top_logprobs: int | None, param: str, prompts: int = 1
) -> None:
    """What concerns the whole response. `param` is the route's name for the number of top log-probabilities."""
    cap("n", body.n or 1, limits.max_n, "choices")
    cap("n", (body.n or 1) * prompts, limits.max_choices, "choices, over all prompts,")
    cap(param, top_logprobs or 0, limits.max_logprobs, "log-probabilities per token")
    cap("prompt_logprobs", body.prompt_logprobs or 0, limits.max_logprobs, "log-probabilities per token")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")


def priority_of(body: EngineRequest, caller: Caller) -> int:
    """The key's, for a request that does not say. Raises Forbidden for a lower one, which only administrators may
    take."""
    if body.priority is None:
        return caller.priority
    if body.priority < caller.priority and not caller.admin:
        raise Forbidden(
            f"A priority below {caller.priority} is not for this key; use {caller.priority} or more.",
            param="priority",
        )
    return body.priority


def room_for_answer(engine: Engine, fusion: Fusion, prompts: LanePrompts, catalog: Catalog) -> int:
    """The `max_tokens` of a request that does not say: all that context and KV memory allow; at least 1, which the
    engine then refuses with its reason."""
    return max(1, engine.room_for_output(fusion, prompts, catalog))


def cache_salt(of_key: str, body: EngineRequest) -> str:
    """Separates the prefix-cache entries of different keys and, under one key, of requests that differ in a field by
    which a client keeps them apart."""
    apart = [body.user, body.safety_identifier, body.prompt_cache_key, body.cache_salt]
    if not any(apart):
        return of_key
    return f"{of_key}/{hashlib.sha256(json.dumps(apart).encode()).hexdigest()}"


def cap(param: str, value: int, most: int, what: str) -> None:
    """Raises InvalidRequest if `value` is above `most`."""
    if value > most:
        raise InvalidRequest(f"{value} {what} are asked for; this server allows {most}.", param=param)
