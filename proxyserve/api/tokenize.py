"""POST /tokenize and /detokenize: the base's tokenizer, whose ids all experts share."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from proxyserve.api.body import JsonRoute
from proxyserve.api.documentation import BODY_ERRORS, error_answers
from proxyserve.api.prepare import cap, check_ids, prepared, with_experts
from proxyserve.api.schemas.message import rendered
from proxyserve.api.schemas.other import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from proxyserve.api.state import server_state
from proxyserve.config import Limits, ServerConfig
from proxyserve.engine.caller import Caller
from proxyserve.engine.offer import Lease
from proxyserve.engine.prompts import ChatOptions, chat_prompts
from proxyserve.errors import Forbidden, InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.model_name import parse_model_name
from proxyserve.fusion.permission import may_use
from proxyserve.text.token_names import text_name

router = APIRouter(tags=["text"], route_class=JsonRoute)


@router.post(
    "/tokenize",
    summary="Text or messages to token ids",
    response_model=TokenizeResponse,
    responses=error_answers(*BODY_ERRORS, 403, 404, 503),
)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The ids that the base would be given."""
    config, caller = server_state(request).config, request.state.caller

    async def answer(lease: Lease) -> Response:
        return await prepared(request, lambda: _tokenized(body, lease.catalog, config, caller))

    return await with_experts(request, answer)


@router.post(
    "/detokenize",
    summary="Token ids to text",
    response_model=DetokenizeResponse,
    responses=error_answers(*BODY_ERRORS, 403, 404, 503),
)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    limits, caller = server_state(request).config.limits, request.state.caller

    async def answer(lease: Lease) -> Response:
        return await prepared(request, lambda: _detokenized(body, lease.catalog, limits, caller))

    return await with_experts(request, answer)


def _tokenized(body: TokenizeRequest, catalog: Catalog, config: ServerConfig, caller: Caller) -> Response:
    """With its JSON, which for a long text takes as long as the tokens do."""
    tokens = _tokens(body, catalog, config, caller)
    base = catalog.models.base
    found: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": base.context_length}
    if body.return_token_strs:
        cap("return_token_strs", len(tokens), config.limits.max_tokenized_ids, "names of tokens")
        found["token_strs"] = [text_name(base.tokenizer, token) for token in tokens]
    return _json(TokenizeResponse.model_construct(**found))


def _tokens(body: TokenizeRequest, catalog: Catalog, config: ServerConfig, caller: Caller) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    base = catalog.models.base
    fusion = _usable(body.model, catalog, caller)
    most = config.limits.max_tokenized_characters
    if body.prompt is not None:
        cap("prompt", len(body.prompt), most, "characters to tokenize")
        special = body.add_special_tokens is not False
        return base.tokenizer.encode(body.prompt, add_special_tokens=special)
    if body.add_special_tokens is not None:
        raise InvalidRequest(
            "'add_special_tokens' goes with 'prompt'; a chat template holds its own special tokens.",
            param="add_special_tokens",
        )
    messages = body.messages or ()
    cap("messages", sum(len(message.content or "") for message in messages), most, "characters to tokenize")
    options = ChatOptions(fallback=config.chat.template)
    return list(chat_prompts(catalog, fusion, rendered(messages), options).lanes.default)


def _detokenized(body: DetokenizeRequest, catalog: Catalog, limits: Limits, caller: Caller) -> Response:
    cap("tokens", len(body.tokens), limits.max_tokenized_ids, "token ids to decode")
    _usable(body.model, catalog, caller)
    check_ids(body.tokens, catalog.models, "tokens")
    text = catalog.models.base.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return _json(DetokenizeResponse(prompt=text))


def _usable(model: str | None, catalog: Catalog, caller: Caller) -> Fusion:
    """The fusion that `model` names. Raises UnknownModel, InvalidRequest and Forbidden."""
    fusion = parse_model_name(model or catalog.models.base.name, catalog)
    if not may_use(fusion, catalog, caller.experts):
        raise Forbidden(f"This key may not use model '{model}'.", param="model")
    return fusion


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")
