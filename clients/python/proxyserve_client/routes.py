"""The small routes: tokens of the base, what the server is doing, and ending what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from proxyserve_client.call import Call
from proxyserve_client.options import Message


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text in ids of the base. `names` are there where they were asked for; `max_model_len` is what prompt and answer
    may be long together."""

    ids: tuple[int, ...]
    max_model_len: int
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Tokens:
        names = body.get("token_strs")
        return cls(tuple(body["tokens"]), body["max_model_len"], None if names is None else tuple(names))


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The base's tokenizer, whose ids all experts share. A special token that it does not have is None."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    vocab_size: int
    max_model_len: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> TokenizerInfo:
        known = {name: body[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "eos_token_ids": tuple(body["eos_token_ids"])})


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a server is: choices that run and that wait, tokens of the prompts that wait, and the share of the KV
    blocks in use in the pool that is fullest."""

    running: int
    waiting: int
    waiting_tokens: int
    kv_use: float

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Load:
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})


def tokenize(
    text: str | Sequence[Message], model: str | None, add_special_tokens: bool | None, names: bool
) -> Call:
    what = {"prompt": text} if isinstance(text, str) else {"messages": list(text)}
    given = {
        "model": model,
        "add_special_tokens": add_special_tokens,
        "return_token_strs": names or None,
    }
    return Call("post", "/tokenize", {**what, **{k: v for k, v in given.items() if v is not None}})


def detokenize(ids: Sequence[int]) -> Call:
    return Call("post", "/detokenize", {"tokens": list(ids)})


def tokenizer_info() -> Call:
    return Call("get", "/tokenizer_info")


def load() -> Call:
    return Call("get", "/load")


def cancel(request_id: str) -> Call:
    if request_id in ("", ".", ".."):
        raise ValueError(f"'{request_id}' cannot be the id of a request")
    return Call("post", f"/v1/requests/{quote(request_id, safe='')}/cancel", once=True)
