"""The shapes of log-probabilities in the cases that real models rarely show."""

from __future__ import annotations

import json
import math
from typing import Any

from proxyserve.api.logprobs import CompletionLogprobsBuilder, chat_logprobs
from proxyserve.types import TokenLogprob


class ByteTokenizer:
    """Token ids are indexes into `pieces`."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]


def test_impossible_tokens_are_finite_json() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"b")
    entry = TokenLogprob(0, -math.inf, ((1, 0.0), (0, -math.inf)))
    chat = chat_logprobs([entry], tokenizer).model_dump_json()
    text = CompletionLogprobsBuilder(tokenizer).add([entry]).model_dump_json()
    assert json.loads(chat)["content"][0]["logprob"] == -9999.0
    assert json.loads(chat)["content"][0]["top_logprobs"][1]["logprob"] == -9999.0
    assert json.loads(text)["token_logprobs"] == [-9999.0]
    assert json.loads(text)["top_logprobs"] == [{"b": 0.0, "a": -9999.0}]


def test_parts_of_characters() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    tokenizer: Any = ByteTokenizer(b"a", first, second, b"z")
    entries = [TokenLogprob(token, -1.0, ((token, -1.0),)) for token in range(4)]
    content = chat_logprobs(entries, tokenizer).content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "aéz"
    assert content[1].token == "\ufffd"
    columns = CompletionLogprobsBuilder(tokenizer).add(entries)
    assert columns.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "z"]
    assert columns.text_offset == [0, 1, 1, 2]


def test_equal_texts_do_not_hide_each_other() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"a", b"b")
    entry = TokenLogprob(2, -3.0, ((0, -1.0), (1, -2.0)))
    [top] = CompletionLogprobsBuilder(tokenizer).add([entry]).top_logprobs
    assert top == {"a": -1.0, "token_id:1": -2.0, "b": -3.0}


def test_offsets_go_on_between_pieces() -> None:
    tokenizer: Any = ByteTokenizer(b"ab", "日本".encode())
    builder = CompletionLogprobsBuilder(tokenizer)
    offsets = [builder.add([TokenLogprob(token, -1.0)]).text_offset for token in (0, 1, 0)]
    assert offsets == [[0], [2], [4]]


def test_names_by_id() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"a", b"\xc3")
    entry = TokenLogprob(2, -3.0, ((0, -1.0), (1, -2.0)))
    columns = CompletionLogprobsBuilder(tokenizer, by_id=True).add([entry])
    assert columns.tokens == ["token_id:2"]
    assert columns.top_logprobs == [{"token_id:0": -1.0, "token_id:1": -2.0, "token_id:2": -3.0}]
