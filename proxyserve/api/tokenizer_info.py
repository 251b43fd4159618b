"""GET /tokenizer_info"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request

from proxyserve.api.documentation import error_answers
from proxyserve.api.schemas.other import TokenizerInfo
from proxyserve.api.state import server_state
from proxyserve.errors import InvalidRequest

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer

router = APIRouter(tags=["text"])


@router.get("/tokenizer_info", summary="Special tokens and chat template", responses=error_answers(401))
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """What lm-evaluation-harness and others must know to use `/tokenize` as their tokenizer."""
    state = server_state(request)
    base = state.models.base
    return TokenizerInfo(
        eos_token=base.tokenizer.eos_token,
        bos_token=base.tokenizer.bos_token,
        pad_token=base.tokenizer.pad_token,
        eos_token_ids=sorted(base.eos_ids),
        chat_template=own_template(base.tokenizer) or state.config.chat.template,
        vocab_size=base.tokenizer.vocabulary_size,
        max_model_len=base.context_length,
    )


def own_template(tokenizer: Tokenizer) -> str | None:
    """The source of the template for plain conversations that the tokenizer came with."""
    try:
        found = tokenizer.chat_template()
    except InvalidRequest:  # of several that it has, none is for plain conversations
        return None
    return None if found is None else found.source
