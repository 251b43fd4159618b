"""The shapes of log-probabilities in the cases that real models rarely show."""

from __future__ import annotations

import json
import math
from typing import Any

from proxyserve.api.generate import _PromptsFirst
from proxyserve.api.logprobs import (
    CompletionLogprobsBuilder,
    TokenNames,
    chat_logprobs,
    listed_logprobs,
    prompt_logprobs,
    text_offsets,
)
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.types import FinishReason, OutputEvent, SamplingParams, TokenLogprob


class ByteTokenizer:
    """Token ids are indexes into `pieces`."""

    def __init__(self, *pieces: bytes, special: frozenset[int] = frozenset()) -> None:
        self._pieces = pieces
        self._special = special

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def is_special(self, token: int) -> bool:
        return token in self._special


def builder_of(
    tokenizer: Any, *, by_id: bool = False, skip_special: bool = True
) -> CompletionLogprobsBuilder:
    names = TokenNames(tokenizer, by_id=by_id)
    return CompletionLogprobsBuilder(tokenizer, names, 2, skip_special=skip_special)


def test_impossible_tokens_are_finite_json() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"b")
    entry = TokenLogprob(0, -math.inf, ((1, 0.0), (0, -math.inf)))
    chat = chat_logprobs([entry], tokenizer).model_dump_json()
    text = builder_of(tokenizer).add([entry]).model_dump_json()
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
    columns = builder_of(tokenizer).add(entries)
    assert columns.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "z"]
    assert columns.text_offset == [0, 1, 1, 2]


def test_equal_texts_do_not_hide_each_other() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"a", b"b")
    entry = TokenLogprob(2, -3.0, ((0, -1.0), (1, -2.0)))
    [top] = builder_of(tokenizer).add([entry]).top_logprobs
    assert top == {"a": -1.0, "token_id:1": -2.0, "b": -3.0}


def test_offsets_go_on_between_pieces() -> None:
    tokenizer: Any = ByteTokenizer(b"ab", "日本".encode())
    builder = builder_of(tokenizer)
    offsets = [builder.add([TokenLogprob(token, -1.0)]).text_offset for token in (0, 1, 0)]
    assert offsets == [[0], [2], [4]]


def test_names_by_id() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"a", b"\xc3")
    entry = TokenLogprob(2, -3.0, ((0, -1.0), (1, -2.0)))
    columns = builder_of(tokenizer, by_id=True).add([entry])
    assert columns.tokens == ["token_id:2"]
    assert columns.top_logprobs == [{"token_id:0": -1.0, "token_id:1": -2.0, "token_id:2": -3.0}]


def test_characters_that_do_not_go_on_belong_to_their_beginning() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"\xe6\x97", b"z", b"\xa5")
    entries = [TokenLogprob(token, -1.0) for token in (0, 1, 2, 1, 3, 2)]
    assert builder_of(tokenizer).add(entries).text_offset == [0, 1, 2, 3, 3, 4]
    assert text_offsets(tokenizer, [0, 1, 2, 1, 3, 2], "a\ufffdz日z") == [0, 1, 2, 3, 3, 4]


def test_special_tokens_count_where_the_text_has_them() -> None:
    tokenizer: Any = ByteTokenizer(b"<s>", b"ab", special=frozenset({0}))
    assert text_offsets(tokenizer, [0, 1, 0, 1], "abab") == [0, 0, 2, 2]
    assert text_offsets(tokenizer, [0, 1, 0, 1], "ab<s>ab") == [0, 0, 2, 5]
    entries = [TokenLogprob(token, -1.0) for token in (1, 0, 1)]
    assert builder_of(tokenizer).add(entries).text_offset == [0, 2, 2]
    assert builder_of(tokenizer, skip_special=False).add(entries).text_offset == [0, 2, 5]


def test_space_that_begins_every_text_is_not_in_it() -> None:
    tokenizer: Any = ByteTokenizer(b" The", b" cat")
    assert text_offsets(tokenizer, [0, 1], "The cat") == [0, 3]
    assert text_offsets(tokenizer, [0, 1], " The cat") == [0, 4]


def test_offsets_never_leave_the_text() -> None:
    tokenizer: Any = ByteTokenizer("ﬁ".encode(), b"long")  # a tokenizer that rewrote what it was given
    assert text_offsets(tokenizer, [0, 1, 0], "f") == [0, 1, 1]


def test_ranks_are_known_whatever_is_listed() -> None:
    tokenizer: Any = ByteTokenizer(b"a", b"b", b"c")
    inside = TokenLogprob(1, -2.0, ((0, -1.0), (1, -2.0)), rank=2)
    outside = TokenLogprob(1, -2.0, ((0, -1.0),), rank=7)
    impossible = TokenLogprob(2, -math.inf, ((0, -1.0), (1, -2.0)))
    first, second, other, third = prompt_logprobs([None, inside, outside, impossible], tokenizer, 1)
    assert first is None
    assert second is not None and third is not None and other is not None
    assert [(token, entry.rank) for token, entry in other.items()] == [(1, 7), (0, 1)]
    assert {token: (entry.logprob, entry.rank) for token, entry in second.items()} == {
        1: (-2.0, 2),
        0: (-1.0, 1),
    }
    assert {token: (entry.logprob, entry.rank) for token, entry in third.items()} == {
        2: (-9999.0, None),
        0: (-1.0, 1),
    }


def test_listed_logprobs_keep_their_order() -> None:
    entry = TokenLogprob(2, -3.0, listed=((7, -1.0), (3, -math.inf)))
    assert [list(found.items()) for found in listed_logprobs([entry, None]) if found] == [
        [(7, -1.0), (3, -9999.0)]
    ]


def test_choices_wait_for_the_log_probabilities_of_their_prompt() -> None:
    """The engine reports them with choice 0, and another choice may be faster."""

    def submission(name: str, wanted: int | None) -> Submission:
        return Submission(name, LanePrompts((1, 2)), SamplingParams(3, prompt_logprobs=wanted), n=2)

    scores = (None, TokenLogprob(2, -1.0))
    first = _PromptsFirst([submission("p", 0), submission("q", 0), submission("r", None)])
    other = OutputEvent("r", 1, (5,), "x")
    assert first.take(other) == [other]
    early = [OutputEvent("p", 1, (5,), "x"), OutputEvent("p", 1, (6,), "y", finish_reason=FinishReason.STOP)]
    assert [first.take(event) for event in early] == [[], []]
    assert first.take(OutputEvent("q", 0, (5,), "z", prompt_logprobs=scores))[0].prompt_logprobs == scores
    released = first.take(OutputEvent("p", 0, prompt_logprobs=scores))
    assert [(event.index, event.text, event.prompt_logprobs) for event in released] == [
        (0, "", scores),
        (1, "x", scores),
        (1, "y", None),
    ]
    assert first.take(OutputEvent("p", 0, (5,), "x"))[0].prompt_logprobs is None
