"""`/v1/score` against plain Hugging Face forwards: continuations, labels, whole texts; and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from proxyserve.api.score import split_pair
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live
from tests.naive import NaiveFusion
from tests.tiny import TinyFamily

PATH = "/v1/score"
CONTEXT = "Question: who was born where? Answer:"


def ask(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post(PATH, **{"model": "atlas+qa:0.7", **body})
    assert response.status_code == 200, response.text
    return response.json()


class Reference:
    """Fused laws of whole texts, and the tokenizer that says what they are made of."""

    def __init__(self, family: TinyFamily, models: ModelSet) -> None:
        self.naive = NaiveFusion(family.base, {"qa": (family.experts["qa"], family.untuned)})
        self.width = models.base.vocabulary.size
        self.tokenizer = models.base.tokenizer

    @torch.inference_mode()
    def laws(self, ids: Sequence[int], weight: float = 0.7) -> Tensor:
        """Log-probs float64 [positions, width]: row i is the law of what follows ids[: i + 1]."""

        def law(model: Any) -> Tensor:
            return torch.log_softmax(
                model(torch.tensor([list(ids)])).logits[0, :, : self.width].double(), dim=-1
            )

        tuned, untuned = self.naive.pairs["qa"]
        return torch.log_softmax(law(self.naive.base) + weight * (law(tuned) - law(untuned)), dim=-1)


@pytest.fixture(scope="module")
def reference(tiny_family: TinyFamily, tiny_models: ModelSet) -> Reference:
    return Reference(tiny_family, tiny_models)


def check(score: dict[str, Any], ids: Sequence[int], start: int, reference: Reference) -> None:
    """`score` is that of ids[start:] after ids[:start]."""
    laws = reference.laws(ids)
    assert score["token_ids"] == list(ids[start:])
    expected = [float(laws[place - 1, ids[place]]) for place in range(max(1, start), len(ids))]
    found = [value for value in score["token_logprobs"] if value is not None]
    assert found == pytest.approx(expected, abs=1e-4)
    assert score["num_tokens"] == len(expected)
    assert score["logprob"] == pytest.approx(sum(expected), abs=1e-4 * len(expected))
    assert score["mean_logprob"] == pytest.approx(score["logprob"] / len(expected))
    assert score["perplexity"] == pytest.approx(math.exp(-score["mean_logprob"]))
    assert score["is_greedy"] == all(
        int(laws[place - 1].argmax()) == ids[place] for place in range(max(1, start), len(ids))
    )
    assert len(score["tokens"]) == len(score["token_ids"])


@pytest.mark.parametrize("context", [CONTEXT, CONTEXT * 6], ids=["short", "shared"])
def test_continuations(live: Live, reference: Reference, context: str) -> None:
    texts = [" London", " nobody knows", "; 日本"]
    answer = ask(live, prompt=context, continuations=texts)
    before = reference.tokenizer.encode(context)
    assert [score["index"] for score in answer["continuations"]] == [0, 1, 2]
    for score, text in zip(answer["continuations"], texts, strict=True):
        check(score, [*before, *reference.tokenizer.encode(text)], len(before), reference)
    assert answer["object"] == "score"
    assert answer["fusion"]["rule"] == "proxy" and answer["fusion"]["mean_kl"] is None
    assert answer["usage"]["completion_tokens"] == 0
    if len(before) >= 64:  # computed once, up to whole blocks
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 2 * (len(before) // 16 - 1) * 16
    ids = [reference.tokenizer.encode(text) for text in texts]
    by_ids = ask(live, prompt=before, continuations=ids)
    assert [score["logprob"] for score in by_ids["continuations"]] == pytest.approx(
        [score["logprob"] for score in answer["continuations"]], abs=1e-3
    )


def test_greedy_continuation(live: Live, reference: Reference) -> None:
    ids = reference.tokenizer.encode(CONTEXT)
    follow: list[int] = []
    for _ in range(3):
        follow.append(int(reference.laws([*ids, *follow])[-1].argmax()))
    right, wrong = ask(live, prompt=ids, continuations=[follow, [*follow[:2], follow[2] ^ 1]])[
        "continuations"
    ]
    assert right["is_greedy"] and not wrong["is_greedy"]


def test_a_schedule_counts_from_the_continuation(live: Live, reference: Reference) -> None:
    """The score of an answer is the log-probs that it was generated with."""
    fusion = {"experts": {"qa": {"weight": 1, "schedule": [[0, 1.0], [2, 0.0]]}}}
    ids = reference.tokenizer.encode(CONTEXT)
    wish = {"model": "atlas", "prompt": ids, "fusion": fusion}
    (answer,) = live.post(
        "/v1/completions",
        **wish,
        max_tokens=5,
        temperature=0,
        logprobs=0,
        ignore_eos=True,
        return_token_ids=True,
    ).json()["choices"]
    (score,) = ask(live, **wish, continuations=[answer["token_ids"]])["continuations"]
    assert score["token_logprobs"] == pytest.approx(answer["logprobs"]["token_logprobs"], abs=1e-4)


def test_usage_has_what_a_gate_saved(live: Live) -> None:
    """As in other answers; labels have a token that a gate may leave to the base, others have none."""
    body = {"prompt": CONTEXT, "fusion": {"gate": {"confidence": 0.000001}}}
    usage = ask(live, **body, label_token_ids=[70, 75])["usage"]
    assert usage["gated_tokens"] == usage["completion_tokens"] == 1
    assert usage["skipped_lane_tokens"]["small"] > 0
    texts = ask(live, **body, continuations=[" London", " nobody"])["usage"]
    assert texts["gated_tokens"] == 0
    assert texts["prompt_tokens"] == texts["total_tokens"] > usage["prompt_tokens"]


def test_top_of_each_position(live: Live, reference: Reference) -> None:
    body = {"prompt": CONTEXT, "continuations": [" London"]}
    (plain,) = ask(live, **body)["continuations"]
    assert "top_logprobs" not in plain
    (score,) = ask(live, **body, logprobs=2)["continuations"]
    for top, name, value in zip(score["top_logprobs"], score["tokens"], score["token_logprobs"], strict=True):
        assert len(top) in (2, 3)
        assert top[name] == value


def test_labels(live: Live, reference: Reference) -> None:
    labels = [70, 75, 80, 5]
    answer = ask(live, prompt=CONTEXT, label_token_ids=labels, normalize=True)
    law = reference.laws(reference.tokenizer.encode(CONTEXT))[-1]
    assert [score["token_id"] for score in answer["labels"]] == labels
    assert [score["logprob"] for score in answer["labels"]] == pytest.approx(law[labels].tolist(), abs=1e-4)
    shares = torch.softmax(law[labels], dim=0).tolist()
    assert [score["probability"] for score in answer["labels"]] == pytest.approx(shares, abs=1e-4)
    assert "probability" not in ask(live, prompt=CONTEXT, label_token_ids=labels)["labels"][0]


def test_whole_texts(live: Live, reference: Reference) -> None:
    texts = ["name: Ada Lovelace", reference.tokenizer.encode("The quick brown fox")]
    answer = ask(live, texts=texts)
    for score, text in zip(answer["texts"], texts, strict=True):
        assert score["token_logprobs"][0] is None
        check(score, reference.tokenizer.encode(text) if isinstance(text, str) else text, 0, reference)


def test_words_at_the_seam_are_those_of_running_text(tiny_models: ModelSet) -> None:
    tokenizer = tiny_models.base.tokenizer
    for prompt, continuation, context in (
        ("The quick", " brown fox", "The quick"),
        ("The quick ", "brown fox", "The quick"),
        ("The quick \n", "brown fox", "The quick"),
        (" ", "brown", " "),  # together they would be one token and a bit
        ("The quick brow", "n fox", "The quick brow"),
        ("The q", "uick fox", "The q"),
    ):
        found, ids = split_pair(tokenizer, prompt, continuation)
        assert found == context
        assert tokenizer.decode([*tokenizer.encode(context), *ids]) == prompt + continuation
    running = split_pair(tokenizer, "The quick ", "brown fox")[1]
    assert [*tokenizer.encode("The quick"), *running] == tokenizer.encode("The quick brown fox")
    assert split_pair(tokenizer, (1, 2), " brown") == ((1, 2), tuple(tokenizer.encode(" brown")))
    assert split_pair(tokenizer, "x", (3, 4)) == ("x", (3, 4))


def test_prompts_of_lanes_come_before_the_continuation(live: Live) -> None:
    body = {"prompt": CONTEXT, "continuations": [" London"]}
    (plain,) = ask(live, **body)["continuations"]
    fusion = {"prompts": {"qa.tuned": {"text": "Another prompt:"}}}
    (other,) = ask(live, **body, fusion=fusion)["continuations"]
    assert other["token_ids"] == plain["token_ids"]
    assert other["logprob"] != pytest.approx(plain["logprob"], abs=1e-3)


TEXTS = {"texts": ["The quick"]}
PAIR = {"prompt": "a", "continuations": [" b"]}
LABELS = {"prompt": "a", "label_token_ids": [5]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "continuations", "exactly one"),
        (PAIR | TEXTS, "texts", "exactly one"),
        (PAIR | LABELS, "label_token_ids", "exactly one"),
        ({"continuations": [" b"]}, "prompt", "give 'prompt'"),
        (TEXTS | {"prompt": "a"}, "prompt", "leave 'prompt' out"),
        (LABELS | {"logprobs": 1}, "logprobs", ""),
        (PAIR | {"normalize": True}, "normalize", ""),
        (PAIR | {"logprobs": 21}, "logprobs", "allows 20"),
        (PAIR | {"continuations": []}, "continuations", ""),
        (PAIR | {"continuations": [""]}, "continuations[0]", ""),
        (PAIR | {"continuations": [[True]]}, "continuations[0]", ""),
        (PAIR | {"continuations": ["x"] * 257}, "continuations", "allows 256"),
        (PAIR | {"prompt": ["a", "b"]}, "prompt", ""),
        ({"texts": ["a"]}, "texts[0]", "single token"),
        ({"texts": ["word " * 2000]}, "texts", ""),
        ({"prompt": "a", "label_token_ids": [99_999]}, "label_token_ids", "vocabulary"),
        ({"prompt": "a", "label_token_ids": [5, 5]}, "label_token_ids", "twice"),
        (PAIR | {"temperature": 1}, "temperature", "no field"),
        (PAIR | {"fusion": {"explain": 1}}, "fusion.explain", "not explained"),
        (PAIR | {"fusion": {"target_entropy": 1.0}}, "fusion.target_entropy", "temperature"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refusals(live: Live, body: dict[str, Any], param: str, words: str) -> None:
    response = live.post(PATH, model="atlas+qa", **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]
