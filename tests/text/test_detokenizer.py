"""Streamed text equals decoded text, whole characters only, and stop strings cut it wherever tokens end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyserve.text.detokenizer import Detokenizer
from proxyserve.text.tokenizer import Tokenizer
from tests.tiny import EOS, make_sentencepiece, make_tokenizer

TOKENIZER = Tokenizer(make_tokenizer())
SENTENCEPIECE = Tokenizer(make_sentencepiece())


def stream(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(TOKENIZER, stop)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped_by:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped_by


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(min_size=0, max_size=40))
def test_pieces_make_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, _ = stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert all("�" not in piece for piece in pieces) or "�" in text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, TOKENIZER.vocabulary_size - 1), max_size=30))
def test_any_ids_make_the_decoded_text(ids: list[int]) -> None:
    pieces, _ = stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text("abc \n", max_size=30),
    st.lists(st.text("abc \n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings(text: str, stop: list[str]) -> None:
    pieces, stopped_by = stream(TOKENIZER.encode(text), tuple(stop))
    found = [text.find(entry) for entry in stop if entry in text]
    # The first stop string that is complete ends the text; what a single token completes at once counts by position.
    assert (stopped_by is not None) == bool(found)
    produced = "".join(pieces)
    assert text.startswith(produced)
    if stopped_by is None:
        assert produced == text
    else:
        assert text[len(produced) :].startswith(stopped_by)
        assert not any(entry in produced for entry in stop)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=3), st.integers(0, 12))
def test_before_a_least_length_a_stop_string_is_text(text: str, stop: str, least: int) -> None:
    """One letter a token: the text ends at the first place where a stop string ends, `least` letters in or later."""
    detokenizer = Detokenizer(TOKENIZER, (stop,))
    produced = ""
    for count, letter in enumerate(text, start=1):
        produced += detokenizer.push(TOKENIZER.encode(letter)[0], may_stop=count >= least)
        if detokenizer.stopped_by:
            break
    produced += detokenizer.finish()
    ends = [end for end in range(max(1, least), len(text) + 1) if text[:end].endswith(stop)]
    assert produced == (text[: ends[0] - len(stop)] if ends else text)
    assert (detokenizer.stopped_by == stop) == bool(ends)


def test_text_of_special_tokens() -> None:
    """Left out, or text like any other, that a stop string may begin in."""
    ids = [*TOKENIZER.encode("a"), *TOKENIZER.encode(EOS), *TOKENIZER.encode("é b")]
    assert "".join(stream(ids)[0]) == "aé b"
    kept = Detokenizer(TOKENIZER, skip_special_tokens=False)
    pieces = [kept.push(token) for token in ids]
    assert "".join(pieces) + kept.finish() == f"a{EOS}é b" and EOS in pieces
    stopped = Detokenizer(TOKENIZER, ("text|>é",), skip_special_tokens=False)
    assert "".join(stopped.push(token) for token in ids[:-1]) == "a<|endof" and stopped.stopped_by


def answer(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    return "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab é🙂", min_size=1, max_size=20), st.data())
@pytest.mark.parametrize("tokenizer", [TOKENIZER, SENTENCEPIECE], ids=["byte-level", "SentencePiece"])
def test_prompt_and_answer_make_the_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Wherever the prompt ends, but inside a character, which is then in no text whole."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer.decode(ids[:cut])
    after = answer(tokenizer, ids[:cut], ids[cut:])
    if text.startswith(before):
        assert before + after == text
    else:
        assert after == tokenizer.decode(ids[cut:])


def test_first_word_keeps_its_space() -> None:
    ids = SENTENCEPIECE.encode("a b")
    assert SENTENCEPIECE.decode(ids[2:]) == "b", "what makes the prompt matter"
    assert answer(SENTENCEPIECE, ids[:2], ids[2:]) == " b"
    assert answer(SENTENCEPIECE, [*ids[:2], 2], ids[2:]) == " b", "a special token at the prompt's end"
    assert answer(SENTENCEPIECE, ids[:1], ids[1:]) == "a b", "the answer is the beginning of the text"


def test_a_possible_beginning_is_held_back_and_then_released() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("xyz",))
    pieces = [detokenizer.push(TOKENIZER.encode(letter)[0]) for letter in "axya"]
    assert pieces == ["a", "", "", "xya"]
    assert detokenizer.finish() == ""


def test_split_characters() -> None:
    ids = TOKENIZER.encode("é🙂")
    assert len(ids) > 2, "the characters are split over tokens"
    pieces, _ = stream(ids)
    assert "".join(pieces) == "é🙂"
    assert set(pieces) <= {"", "é", "🙂"}


@pytest.mark.parametrize("text", ["plain", " leading", "é🙂", "\n"])
def test_token_bytes(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert b"".join(TOKENIZER.token_bytes(token) for token in ids) == text.encode()


def test_special_tokens() -> None:
    end = TOKENIZER.encode(EOS)[0]
    assert TOKENIZER.eos_ids == {end}
    assert TOKENIZER.token_text(end) == EOS and TOKENIZER.token_bytes(end) == EOS.encode()
    assert TOKENIZER.decode([end]) == ""
