"""Bodies of the small routes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from proxyserve.api.schemas.base import MAX_PROMPT_IDS, AtMost, RequestModel, exactly_one
from proxyserve.api.schemas.common import ModelName, TokenId
from proxyserve.api.schemas.message import Messages


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["proxyserve"] = "proxyserve"
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class TokenizeRequest(RequestModel):
    """Give `prompt` or `messages`. Messages are rendered with the chat template of the base, or the one that the base
    borrows from an expert named in `model`; they hold their own special tokens."""

    model_config = ConfigDict(json_schema_extra=exactly_one("prompt", "messages"))

    model: ModelName | None = Field(None, description="Default: the base.")
    prompt: str | None = Field(None, description="A text.")
    messages: Messages | None = Field(None, description="A conversation, as for chat.")
    add_special_tokens: bool | None = Field(None, description="For `prompt` only; on unless switched off.")
    return_token_strs: bool | None = Field(
        None, description="Give the tokens' names as well, as in `logprobs`. Default false."
    )


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = Field(default=None, description="With `return_token_strs`.")


class DetokenizeRequest(RequestModel):
    model: ModelName | None = Field(None, description="Default: the base.")
    tokens: Annotated[list[TokenId], AtMost(MAX_PROMPT_IDS)] = Field(description="Token ids of the base.")


class DetokenizeResponse(BaseModel):
    """`prompt` keeps special tokens, so that `/tokenize` without `add_special_tokens` gives the same ids again wherever
    the tokenizer is reversible."""

    prompt: str


class Cancelled(BaseModel):
    id: str
    cancelled: int = Field(description="Requests with this id that were being answered.")


class Load(BaseModel):
    """Choices and their prompts' tokens; `n` choices of one request count `n` times."""

    running: int = Field(description="Choices that hold KV blocks.")
    waiting: int = Field(description="Choices that wait for a place.")
    waiting_tokens: int = Field(description="Prompt tokens of choices that have no token yet.")
    kv_use: float = Field(description="Share of the KV blocks in use, in the pool that is fullest; 0 to 1.")


class TokenizerInfo(BaseModel):
    """The base's tokenizer. Tokens are named as `/tokenize` reads them; null for those that it has none of.
    `eos_token_ids` are all ids that end the base's texts. `vocab_size` counts ids, the added ones too."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    eos_token_ids: list[int]
    chat_template: str | None = Field(
        description="Jinja source of the base's own template, or of the one that this server was started with."
    )
    vocab_size: int
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["loading", "ready", "draining", "dead"]
    reason: str | None = Field(None, description="Why the server cannot serve.")


class Version(BaseModel):
    version: str
