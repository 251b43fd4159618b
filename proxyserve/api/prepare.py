"""From a request's body to what the engine is asked: fusion and sampling parameters."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from proxyserve.api.deadline import seconds_left, set_deadline
from proxyserve.api.presence import while_present
from proxyserve.api.schemas.common import GenerationRequest
from proxyserve.api.schemas.fusion import FusionObject
from proxyserve.api.state import server_state
from proxyserve.config import Limits
from proxyserve.engine.caller import Caller
from proxyserve.engine.submission import LanePrompts
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
    "ignore_eos",
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


def sampling_params(
    body: GenerationRequest, limits: Limits, models: ModelSet, *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """Raises InvalidRequest for what is above `limits`."""
    stop, stop_ids = body.stop or [], body.stop_token_ids or []
    _cap("stop", len(stop), limits.max_stop, "stop strings")
    _cap("stop", max(map(len, stop), default=0), limits.max_stop_length, "characters in a stop string")
    _cap("stop_token_ids", len(stop_ids), limits.max_stop, "stop token ids")
    _cap("logit_bias", len(body.logit_bias or {}), limits.max_logit_bias, "entries in logit_bias")
    for token in stop_ids:
        if token not in models.base.vocabulary:
            raise InvalidRequest(
                f"Token id {token} is not in the vocabulary of '{models.base.name}'.", param="stop_token_ids"
            )
    given: dict[str, Any] = {
        name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None
    }
    return SamplingParams(
        max_tokens=max_tokens, stop=tuple(stop), stop_token_ids=tuple(stop_ids), logprobs=logprobs, **given
    )


def check_shape(body: GenerationRequest, limits: Limits, *, top_logprobs: int | None, param: str) -> None:
    """What concerns the whole response. `param` is the route's name for the number of top log-probabilities."""
    _cap("n", body.n or 1, limits.max_n, "choices")
    _cap(param, top_logprobs or 0, limits.max_logprobs, "log-probabilities per token")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")


def room_for_answer(engine: Engine, fusion: Fusion, prompts: LanePrompts, catalog: Catalog) -> int:
    """The `max_tokens` of a request that does not say: all that context and KV memory allow; at least 1, which the
    engine then refuses with its reason."""
    return max(1, engine.room_for_output(fusion, prompts, catalog))


def cache_salt(of_key: str, user: str | None) -> str:
    """Separates the prefix-cache entries of different keys and, under one key, of different users."""
    return f"{of_key}/{hashlib.sha256(user.encode()).hexdigest()}" if user else of_key


def _cap(param: str, value: int, most: int, what: str) -> None:
    if value > most:
        raise InvalidRequest(f"{value} {what} are asked for; this server allows {most}.", param=param)
