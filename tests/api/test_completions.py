"""Text completions: every form of prompt, indexes, log-probabilities; and what each sampling field changes."""

from __future__ import annotations

from typing import Any

import pytest

from proxyserve.models.model_set import ModelSet
from tests.api.live import Live

PATH = "/v1/completions"


def ask(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post(PATH, **{"model": "atlas+qa", "prompt": "The quick", "max_tokens": 12, **body})
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_answer_has_openai_shape(live: Live) -> None:
    answer = ask(live)
    assert answer["object"] == "text_completion"
    assert answer["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert answer["fusion"]["generations"] == {"qa": 1}


def test_default_length_is_openais(live: Live) -> None:
    assert ask(live, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_forms_of_prompt_agree(live: Live, tiny_models: ModelSet) -> None:
    prompts = ["The quick", "name: Ada"]
    ids = [tiny_models.base.tokenizer.encode(prompt) for prompt in prompts]
    each = [texts(ask(live, prompt=prompt, temperature=0))[0] for prompt in prompts]
    assert texts(ask(live, prompt=prompts, temperature=0)) == each
    assert texts(ask(live, prompt=ids, temperature=0)) == each
    assert texts(ask(live, prompt=ids[0], temperature=0)) == each[:1]
    assert each[0] != each[1]


def test_several_prompts_and_choices_are_in_order(live: Live) -> None:
    prompts = ["The quick", "name: Ada", "Question:"]
    body = {"n": 2, "seed": 5, "temperature": 1.0}
    answer = ask(live, prompt=prompts, **body)
    assert texts(answer) == [text for prompt in prompts for text in texts(ask(live, prompt=prompt, **body))]
    assert len(set(texts(answer))) == 6
    assert answer["usage"]["completion_tokens"] == sum(
        ask(live, prompt=prompt, **body)["usage"]["completion_tokens"] for prompt in prompts
    )
    assert answer["usage"]["prompt_tokens"] == sum(
        ask(live, prompt=prompt)["usage"]["prompt_tokens"] for prompt in prompts
    )


def test_stream_joins_to_the_whole_answer(live: Live) -> None:
    body = {
        "model": "atlas+qa",
        "prompt": ["The quick", "日本"],
        "n": 2,
        "seed": 1,
        "logprobs": 2,
        "max_tokens": 10,
    }
    whole = ask(live, **body)
    chunks = live.stream(PATH, **body, stream_options={"include_usage": True})
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for key, value in choice["logprobs"].items():
            assert [entry for part in parts for entry in part["logprobs"][key]] == value, key
    assert chunks[-1]["choices"] == []
    lanes = chunks[-1]["usage"]
    assert lanes["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[-1]["fusion"] == whole["fusion"]


def test_logprobs(live: Live) -> None:
    choice = ask(live, temperature=0, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {12}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 3
        assert logprob == max(top.values())  # the same float, which evaluation harnesses compare
        assert top[token] == logprob
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


def test_logprobs_zero_is_the_chosen_token_only(live: Live) -> None:
    logprobs = ask(live, logprobs=0)["choices"][0]["logprobs"]
    assert [[*top.items()] for top in logprobs["top_logprobs"]] == [
        [pair] for pair in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    ]


def test_unlikely_choice_is_added_to_the_top(live: Live) -> None:
    forced = ask(live, logit_bias={"77": 100}, temperature=0, logprobs=1, max_tokens=4)["choices"][0][
        "logprobs"
    ]
    assert all(len(top) == 2 for top in forced["top_logprobs"])


GREEDY = {"temperature": 0}
LONG = GREEDY | {"max_tokens": 64, "ignore_eos": True}
WARM = {"temperature": 1.5, "seed": 11}


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (WARM, {"temperature": 0.5}),
        (WARM, {"seed": 12}),
        (WARM, {"top_p": 0.2}),
        (WARM, {"top_k": 2}),
        (WARM, {"min_p": 0.5}),
        (GREEDY, {"logit_bias": {"77": 100}}),
        (LONG, {"presence_penalty": 2.0}),
        (LONG, {"frequency_penalty": 2.0}),
        (LONG, {"repetition_penalty": 3.0}),
        (GREEDY, {"max_tokens": 5}),
        (GREEDY, {"model": "atlas"}),
        (GREEDY, {"model": "atlas", "fusion": {"experts": {"record": 1}}}),
        (GREEDY, {"model": "atlas", "fusion": {"experts": {"qa": -1}}}),
        (WARM, {"n": 2}),
    ],
    ids=str,
)
def test_field_changes_the_answer(live: Live, before: dict[str, Any], change: dict[str, Any]) -> None:
    assert texts(ask(live, **before)) == texts(ask(live, **before)), "not reproducible, so it shows nothing"
    assert texts(ask(live, **before)) != texts(ask(live, **{**before, **change}))


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_tightest_filter_is_greedy(live: Live, filters: dict[str, Any]) -> None:
    assert texts(ask(live, **WARM, **filters)) == texts(ask(live, **GREEDY))


def test_stop_string_ends_the_text(live: Live) -> None:
    full = texts(ask(live, **GREEDY))[0]
    stop = full[4:6]
    for value in (stop, ["never there", stop]):
        choice = ask(live, **GREEDY, stop=value)["choices"][0]
        assert choice["text"] == full[: full.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_stop_token_ends_the_text(live: Live) -> None:
    forced = {"logit_bias": {"77": 100}, **GREEDY}
    answer = ask(live, **forced, stop_token_ids=[77])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1
    assert ask(live, **forced)["usage"]["completion_tokens"] == 12


def test_end_of_text_can_be_ignored(live: Live) -> None:
    forced = {"logit_bias": {"0": 100}, **GREEDY}
    assert ask(live, **forced)["choices"][0]["finish_reason"] == "stop"
    ignored = ask(live, **forced, ignore_eos=True)
    assert ignored["choices"][0]["finish_reason"] == "length"
    assert ignored["usage"]["completion_tokens"] == 12


def test_users_do_not_share_the_prefix_cache(live: Live) -> None:
    prompt = "The quick brown fox jumps over the lazy dog, twice, and says: nobody knows; 日本語." * 2

    def cached(**body: Any) -> int:
        usage = ask(live, prompt=prompt, max_tokens=1, **body)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(user="ann") == 0
    assert cached(user="ann") > 0
    assert cached(user="bob") == 0
    assert cached() == 0


def test_tokens_are_named_by_id_where_asked(live: Live, tiny_models: ModelSet) -> None:
    """As vLLM does, so that one server can be the base of another."""
    body = {"model": "atlas+qa", "prompt": "The quick", "max_tokens": 4, "temperature": 0, "logprobs": 3}
    by_text = ask(live, **body)["choices"][0]
    by_id = ask(live, **body, return_tokens_as_token_ids=True)["choices"][0]
    assert by_id["text"] == by_text["text"]
    ids = [int(name.removeprefix("token_id:")) for name in by_id["logprobs"]["tokens"]]
    assert tiny_models.base.tokenizer.decode(ids) == by_text["text"]
    for key in ("token_logprobs", "text_offset"):
        assert by_id["logprobs"][key] == by_text["logprobs"][key]
    for named, other in zip(
        by_id["logprobs"]["top_logprobs"], by_text["logprobs"]["top_logprobs"], strict=True
    ):
        assert all(name.startswith("token_id:") for name in named)
        assert list(named.values()) == list(other.values())
    chunks = live.stream(PATH, **body, return_tokens_as_token_ids=True)
    streamed = [name for chunk in chunks for name in chunk["choices"][0]["logprobs"]["tokens"]]
    assert streamed == by_id["logprobs"]["tokens"]
