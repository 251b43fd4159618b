"""Echo and log-probabilities of prompts over HTTP, against plain Hugging Face forwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from proxyserve.models.model_set import ModelSet
from tests.api.live import Live
from tests.naive import NaiveFusion
from tests.tiny import EOS, TinyFamily

PATH = "/v1/completions"
PROMPT = "The quick Zwölf: 日本語 🙂 name"
ECHO = {"model": "atlas+qa", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "echo": True}


def ask(live: Live, path: str = PATH, **body: Any) -> dict[str, Any]:
    response = live.post(path, **body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def naive(tiny_family: TinyFamily) -> NaiveFusion:
    pairs = {name: (tuned, tiny_family.untuned) for name, tuned in tiny_family.experts.items()}
    return NaiveFusion(tiny_family.base, pairs)


@torch.inference_mode()
def laws(naive: NaiveFusion, ids: Sequence[int], width: int) -> Tensor:
    """Fused log-probs float64 [positions, width]: row i is the law of what follows ids[: i + 1]."""

    def law(model: Any) -> Tensor:
        return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0, :, :width].double(), dim=-1)

    tuned, untuned = naive.pairs["qa"]
    return torch.log_softmax(law(naive.base) + law(tuned) - law(untuned), dim=-1)


def test_echo_is_the_prompt_before_the_answer(live: Live) -> None:
    plain = ask(live, **{**ECHO, "echo": False})
    answer = ask(live, **ECHO)
    assert answer["choices"][0]["text"] == PROMPT + plain["choices"][0]["text"]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"] == plain["usage"] | {
        key: answer["usage"][key] for key in ("prompt_tokens_details", "lane_tokens")
    }


@pytest.mark.parametrize("max_tokens", [5, 0])
def test_logprobs_are_those_of_plain_forwards(
    live: Live, naive: NaiveFusion, tiny_models: ModelSet, max_tokens: int
) -> None:
    answer = ask(live, **{**ECHO, "max_tokens": max_tokens}, logprobs=3, return_token_ids=True)
    choice, logprobs = answer["choices"][0], answer["choices"][0]["logprobs"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["prompt_token_ids"] == tiny_models.base.tokenizer.encode(PROMPT)
    assert len(choice["token_ids"]) == max_tokens
    assert {len(column) for column in logprobs.values()} == {answer["usage"]["total_tokens"]} == {len(ids)}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    law = laws(naive, ids, tiny_models.base.vocabulary.size)
    for place, token in enumerate(ids[1:], 1):
        expected = law[place - 1]
        assert logprobs["token_logprobs"][place] == pytest.approx(float(expected[token]), abs=1e-4)
        top = logprobs["top_logprobs"][place]
        likeliest = expected.topk(3)
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        # One rounding path: what evaluation harnesses call greedy is a comparison of these very floats.
        greedy = logprobs["token_logprobs"][place] == max(top.values())
        assert greedy == (token == int(likeliest.indices[0]))
        assert top[logprobs["tokens"][place]] == logprobs["token_logprobs"][place]


def test_offsets_cut_the_text_into_tokens(live: Live) -> None:
    choice = ask(live, **ECHO, logprobs=0)["choices"][0]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    for name, start, end in zip(
        choice["logprobs"]["tokens"], offsets, [*offsets[1:], len(text)], strict=True
    ):
        if not name.startswith("bytes:"):
            assert text[start:end] == name
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


def test_stream_begins_with_the_prompt(live: Live) -> None:
    body = ECHO | {
        "prompt": [PROMPT, "name: Ada"],
        "n": 2,
        "seed": 3,
        "temperature": 1.0,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "return_token_ids": True,
    }
    whole = ask(live, **body)
    chunks = live.stream(PATH, **body)
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        prompt = body["prompt"][choice["index"] // 2]
        assert parts[0]["text"].startswith(prompt)
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        for key in ("prompt_token_ids", "prompt_logprobs"):
            assert rounded(parts[0][key]) == rounded(choice[key])
            assert all(key not in part for part in parts[1:])
        for key, column in choice["logprobs"].items():
            assert rounded([entry for part in parts for entry in part["logprobs"][key]]) == rounded(column)
        assert [("stop_reason" in part) for part in parts] == [*[False] * (len(parts) - 1), True]


def rounded(value: Any) -> Any:
    """The same prompt is computed in other chunks when it is in the prefix cache, which is not the same to the bit."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def test_echo_of_ids_is_their_text(live: Live, tiny_models: ModelSet) -> None:
    ids = [0, *tiny_models.base.tokenizer.encode("The quick")]
    body = {**ECHO, "prompt": [ids], "logprobs": 0}
    hidden = ask(live, **body)["choices"][0]
    assert hidden["text"].startswith("The quick")
    assert hidden["logprobs"]["text_offset"][:3] == [0, 0, 3]
    assert hidden["logprobs"]["tokens"][0] == EOS
    shown = ask(live, **body, skip_special_tokens=False)["choices"][0]
    assert shown["text"].startswith(f"{EOS}The quick")
    assert shown["logprobs"]["text_offset"][:3] == [0, len(EOS), len(EOS) + 3]
    written = ask(live, **{**body, "prompt": f"{EOS}The quick"})["choices"][0]
    assert written["text"].startswith(f"{EOS}The quick")
    assert written["logprobs"]["text_offset"][:3] == [0, len(EOS), len(EOS) + 3]


def test_prompt_logprobs_are_shaped_as_vllms(live: Live) -> None:
    body = {**ECHO, "echo": False, "logprobs": 3}
    (choice,) = ask(live, **body, prompt_logprobs=2, return_token_ids=True)["choices"]
    (echoed,) = ask(live, **{**body, "echo": True})["choices"]
    assert choice["text"] == echoed["text"].removeprefix(PROMPT)
    assert choice["prompt_logprobs"][0] is None
    for place, token in enumerate(choice["prompt_token_ids"][1:], 1):
        entries = choice["prompt_logprobs"][place]
        assert next(iter(entries)) == str(token)
        own = entries[str(token)]
        assert own.keys() == {"logprob", "rank", "decoded_token"}
        assert own["logprob"] == pytest.approx(echoed["logprobs"]["token_logprobs"][place], abs=1e-4)
        ranked = sorted(
            (entry["rank"], -entry["logprob"]) for entry in entries.values() if entry["rank"] in (1, 2)
        )
        assert [rank for rank, _ in ranked] == [1, 2]
        assert ranked[0][1] <= ranked[1][1]
        assert len(entries) == (2 if own["rank"] in (1, 2) else 3)


def test_chat_gives_them_once(live: Live) -> None:
    body = {
        "model": "atlas+qa",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3,
        "n": 2,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = ask(live, "/v1/chat/completions", **body)
    assert (
        len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    )
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [3, 3]
    chunks = live.stream("/v1/chat/completions", **body)
    assert rounded(chunks[0]["prompt_logprobs"]) == rounded(answer["prompt_logprobs"])
    assert all("prompt_logprobs" not in chunk for chunk in chunks[1:])
    nothing = ask(live, "/v1/chat/completions", **{**body, "max_tokens": 0, "n": 1})
    assert rounded(nothing["prompt_logprobs"]) == rounded(answer["prompt_logprobs"])
    assert nothing["usage"]["completion_tokens"] == 0


def test_prompts_are_explained(live: Live) -> None:
    body = {**ECHO, "fusion": {"explain": 1}, "logprobs": 0}
    choice = ask(live, **body)["choices"][0]
    assert choice["prompt_explain"][0] is None
    assert len(choice["explain"]) == 5
    for entry, logprob in zip(
        choice["prompt_explain"][1:], choice["logprobs"]["token_logprobs"][1:], strict=False
    ):
        assert entry["fused"]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert math.isfinite(entry["push"]["qa"])
    assert "prompt_explain" not in ask(live, **{**body, "echo": False})["choices"][0]


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"echo": False, "max_tokens": 0}, "max_tokens", "'echo' or 'prompt_logprobs'"),
    ({"best_of": 2}, "best_of", "must be 'n' (1)"),
    ({"best_of": 1, "n": 2}, "best_of", "must be 'n' (2)"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "allows 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", ""),
    ({"min_tokens": 6}, "min_tokens", "max_tokens"),
    ({"logprob_token_ids": []}, "logprob_token_ids", ""),
    ({"logprob_token_ids": [5, 5]}, "logprob_token_ids", "twice"),
    ({"logprob_token_ids": list(range(129))}, "logprob_token_ids", "allows 128"),
    ({"logprob_token_ids": [99_999]}, "logprob_token_ids", "vocabulary"),
    ({"allowed_token_ids": [99_999]}, "allowed_token_ids", "vocabulary"),
    ({"allowed_token_ids": []}, "allowed_token_ids", ""),
    ({"bad_words": [""]}, "bad_words[0]", ""),
    ({"bad_words": ["x"] * 129}, "bad_words", "allows 128"),
    ({"bad_words": ["x" * 201]}, "bad_words", "allows 200"),
    ({"prompt": ["a"] * 200, "n": 2}, "n", "over all prompts"),
    (
        {"fusion": {"prompts": {"qa.tuned": {"text": "Something else"}}}, "logprobs": 1},
        "fusion.prompts.qa.tuned",
        "",
    ),
]


@pytest.mark.parametrize(("change", "param", "words"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refusals(live: Live, change: dict[str, Any], param: str, words: str) -> None:
    response = live.post(PATH, **{**ECHO, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]
