"""POST /tokenize and /detokenize: the base's tokenizer, whose ids all experts share."""

from __future__ import annotations

from fastapi import APIRouter, Request

from proxyserve.api.body import JsonRoute
from proxyserve.api.documentation import BODY_ERRORS, error_answers
from proxyserve.api.prepare import prepared, with_experts
from proxyserve.api.schemas.message import rendered
from proxyserve.api.schemas.other import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from proxyserve.api.state import server_state
from proxyserve.config import ChatConfig
from proxyserve.engine.caller import Caller
from proxyserve.engine.offer import Lease
from proxyserve.engine.prompts import ChatOptions, chat_prompts
from proxyserve.errors import Forbidden, InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.model_name import parse_model_name
from proxyserve.fusion.permission import may_use
from proxyserve.text.token_names import text_name

router = APIRouter(tags=["text"], route_class=JsonRoute)


@router.post(
    "/tokenize",
    summary="Text or messages to token ids",
    response_model_exclude_unset=True,
    responses=error_answers(*BODY_ERRORS, 403, 404, 503),
)
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
    """The ids that the base would be given."""
    state = server_state(request)

    async def encode(lease: Lease) -> list[int]:
        return await prepared(
            request, lambda: _tokens(body, lease.catalog, state.config.chat, request.state.caller)
        )

    tokens = await with_experts(request, encode)
    base = state.models.base
    answer = TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=base.context_length)
    if body.return_token_strs:
        answer.token_strs = [text_name(base.tokenizer, token) for token in tokens]
    return answer


@router.post("/detokenize", summary="Token ids to text", responses=error_answers(*BODY_ERRORS, 404, 503))
async def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:

    async def decode(lease: Lease) -> str:
        return await prepared(request, lambda: _text(body, lease.catalog))

    return DetokenizeResponse(prompt=await with_experts(request, decode))


def _tokens(body: TokenizeRequest, catalog: Catalog, chat: ChatConfig, caller: Caller) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    base = catalog.models.base
    fusion = parse_model_name(body.model or base.name, catalog)
    if not may_use(fusion, catalog, caller.experts):
        raise Forbidden(f"This key may not use model '{body.model}'.", param="model")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return base.tokenizer.encode(body.prompt, add_special_tokens=special)
    if body.add_special_tokens is not None:
        raise InvalidRequest(
            "'add_special_tokens' goes with 'prompt'; a chat template holds its own special tokens.",
            param="add_special_tokens",
        )
    options = ChatOptions(fallback=chat.template)
    return list(chat_prompts(catalog, fusion, rendered(body.messages or ()), options).lanes.default)


def _text(body: DetokenizeRequest, catalog: Catalog) -> str:
    models = catalog.models
    parse_model_name(body.model or models.base.name, catalog)
    for token in body.tokens:
        if token not in models.base.vocabulary:
            raise InvalidRequest(
                f"Token id {token} is not in the vocabulary of '{models.base.name}'.", param="tokens"
            )
    return models.base.tokenizer.decode(body.tokens, skip_special_tokens=False)
