"""Models, tokenizing, metrics, health, version, and the OpenAPI document."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import proxyserve
from proxyserve.config import Limits
from proxyserve.models.model_set import ModelSet
from proxyserve.text.tokenizer import Tokenizer
from tests.api.live import Live
from tests.tiny import EOS

TEXT = "Zwölf Boxkämpfer: 日本語 🙂"


def test_models_are_listed(live: Live) -> None:
    listing = live.http.get("/v1/models").json()
    assert listing["object"] == "list"
    assert [model["id"] for model in listing["data"]] == ["atlas", "atlas+qa", "atlas+record"]
    for model in listing["data"]:
        assert live.http.get(f"/v1/models/{model['id']}").json() == model
        assert model["max_model_len"] == 256


@pytest.mark.parametrize("name", ["atlas%2Bqa%3A0.5", "atlas+qa:0.5+record"])
def test_model_names_in_urls(live: Live, name: str) -> None:
    response = live.http.get(f"/v1/models/{name}")
    assert response.status_code == 200
    assert response.json()["id"].startswith("atlas+qa:0.5")


@pytest.mark.parametrize("name", ["", "gpt-5", "atlas+ghost", "org/model", "atlas+"])
def test_unknown_models(live: Live, name: str) -> None:
    response = live.http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_tokens_round_trip(live: Live, tiny_models: ModelSet) -> None:
    answer = live.post("/tokenize", prompt=TEXT).json()
    assert answer["tokens"] == tiny_models.base.tokenizer.encode(TEXT)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert live.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": TEXT}
    assert live.post("/tokenize", prompt="", add_special_tokens=False).json()["tokens"] == []
    assert live.post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_names_of_tokens(live: Live, tiny_models: ModelSet) -> None:
    names = live.post("/tokenize", prompt="The quick 日", return_token_strs=True).json()["token_strs"]
    assert names[:3] == ["The", " qu", "ick"]
    assert all(name.startswith("bytes:") for name in names[3:])
    assert "token_strs" not in live.post("/tokenize", prompt="The quick").json()


def test_the_tokenizer_is_given_so_much_at_most(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    state = live.server.config.app.state.proxyserve  # type: ignore[union-attr]
    limits = Limits(max_tokenized_characters=8, max_tokenized_ids=4)
    monkeypatch.setattr(
        "proxyserve.api.tokenize.server_state",
        lambda _: replace(state, config=replace(state.config, limits=limits)),
    )
    ids = live.post("/tokenize", prompt="12345678").json()["tokens"]
    assert len(ids) > 4
    say = {"messages": [{"role": "user", "content": "123456789"}]}
    for path, body, param in (
        ("/tokenize", {"prompt": "123456789"}, "prompt"),
        ("/tokenize", say, "messages"),
        ("/tokenize", {"prompt": "12345678", "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {"tokens": ids}, "tokens"),
    ):
        refused = live.post(path, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert "this server allows" in refused.json()["error"]["message"]


def test_large_texts_are_named_on_another_thread(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that goes into the answer; the event loop's thread only sends it."""
    threads = set()

    def name(tokenizer: Tokenizer, token: int) -> str:
        threads.add(threading.current_thread().name)
        return "x"

    monkeypatch.setattr("proxyserve.api.tokenize.text_name", name)
    answer = live.post("/tokenize", prompt="The quick " * 4000, return_token_strs=True).json()
    assert set(answer["token_strs"]) == {"x"} and len(answer["token_strs"]) == answer["count"]
    assert len(threads) == 1 and "worker" in threads.pop().lower()


def test_special_tokens_can_be_left_out(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that adds one; the tiny ones add none."""

    def encode(self: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0, 70] if add_special_tokens else [70]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert live.post("/tokenize", prompt="f").json()["tokens"] == [0, 70]
    assert live.post("/tokenize", prompt="f", add_special_tokens=False).json()["tokens"] == [70]


def test_tokenizer_info(live: Live, tiny_models: ModelSet) -> None:
    """What lm-evaluation-harness asks before it uses a server as its tokenizer."""
    info = live.http.get("/tokenizer_info").json()
    assert info == {
        "eos_token": EOS,
        "bos_token": None,
        "pad_token": EOS,
        "eos_token_ids": [0],
        "chat_template": None,
        "vocab_size": tiny_models.base.tokenizer.vocabulary_size,
        "max_model_len": 256,
    }
    assert live.post("/tokenize", prompt=EOS, add_special_tokens=False).json()["tokens"] == [0]


def test_detokenize_keeps_special_tokens(live: Live) -> None:
    assert live.post("/detokenize", tokens=[0]).json() == {"prompt": EOS}


def test_messages_are_rendered_as_for_chat(live: Live) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tokens = live.post("/tokenize", model="atlas+qa", messages=messages).json()["tokens"]
    assert live.post("/detokenize", tokens=tokens).json()["prompt"] == "[user] Hi\n[assistant] "
    usage = live.post("/v1/chat/completions", model="atlas+qa", messages=messages, max_tokens=1).json()[
        "usage"
    ]
    assert usage["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "param", "status"),
    [
        ("/tokenize", {}, "prompt", 400),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", 400),
        ("/tokenize", {"prompt": ["a"]}, "prompt", 400),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", 400),
        ("/tokenize", {"prompt": "a", "model": "gpt-5"}, "model", 404),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "messages", 400),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs", 400),
        ("/detokenize", {}, "tokens", 400),
        ("/detokenize", {"tokens": "a"}, "tokens", 400),
        ("/detokenize", {"tokens": [True]}, "tokens[0]", 400),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", 400),
        ("/detokenize", {"tokens": [100_000]}, "tokens", 400),
        ("/detokenize", {"tokens": [1], "model": "gpt-5"}, "model", 404),
        (
            "/tokenize",
            {"model": "atlas+qa", "messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
            400,
        ),
    ],
    ids=str,
)
def test_tokenizing_refusals(live: Live, path: str, body: dict[str, Any], param: str, status: int) -> None:
    response = live.post(path, **body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def read_metrics(live: Live) -> dict[tuple[str, ...], float]:
    """Sample name and label values -> value."""
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(live: Live) -> None:
    before = read_metrics(live)
    live.post("/v1/completions", model="atlas+qa", prompt="The quick", max_tokens=5, n=2, ignore_eos=True)
    live.post("/v1/completions", model="atlas", prompt="The quick", max_tokens=4, logit_bias={"0": 100})
    live.post("/v1/completions", model="atlas", prompt="")
    live.post("/v1/completions", model="gpt-5", prompt="a")
    after = read_metrics(live)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("proxyserve_generation_tokens_total") == 11
    assert grown("proxyserve_fused_tokens_total") == 10
    assert grown("proxyserve_request_success_total", "length") == 2
    assert grown("proxyserve_request_success_total", "stop") == 1
    assert grown("proxyserve_requests_rejected_total", "invalid") == 1
    assert grown("proxyserve_requests_rejected_total", "not_found") == 1
    assert grown("proxyserve_time_to_first_token_seconds_count") == 3
    assert grown("proxyserve_inter_token_latency_seconds_count") == 8
    assert grown("proxyserve_e2e_request_latency_seconds_count") == 3
    assert grown("proxyserve_prompt_tokens_total") > 0
    for model in ("atlas", "qa.tuned", "small"):
        assert grown("proxyserve_lane_tokens_total", model) > 0
        assert grown("proxyserve_lane_seconds_total", model) > 0
    assert grown("proxyserve_lane_tokens_total", "record.tuned") == 0
    assert after["proxyserve_num_requests_running",] == 0
    assert after["proxyserve_kv_blocks", "atlas"] > 0
    assert after["proxyserve_kv_blocks_in_use", "atlas"] == 0
    assert ("proxyserve_flips_total",) in after
    assert ("proxyserve_num_preemptions_total",) in after


def test_first_token_is_not_slower_than_the_request(live: Live) -> None:
    before = read_metrics(live)
    live.post("/v1/completions", model="atlas", prompt="The quick", max_tokens=50, ignore_eos=True)
    after = read_metrics(live)

    def grown(name: str) -> float:
        return after[name,] - before[name,]

    first, whole = (
        grown("proxyserve_time_to_first_token_seconds_sum"),
        grown("proxyserve_e2e_request_latency_seconds_sum"),
    )
    between = grown("proxyserve_inter_token_latency_seconds_sum")
    assert 0 < first < whole < 20
    assert first + between == pytest.approx(whole, abs=0.05)


def test_health_and_version(live: Live) -> None:
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.http.get("/ready").json() == {"status": "ready", "reason": None}
    assert live.http.get("/version").json() == {"version": proxyserve.__version__}


def test_the_page_of_routes_needs_no_other_host(live: Live) -> None:
    page = live.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for path in live.http.get("/openapi.json").json()["paths"]:
        assert f" {path}</h3>" in page.text
    assert "://" not in page.text and "<script" not in page.text
    targets = re.findall(r'href="#([^"]*)"', page.text)
    assert targets and set(targets) <= set(re.findall(r' id="([^"]*)"', page.text))


def test_openapi_is_complete(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    text = live.http.get("/openapi.json").text
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(re.findall(r'"\$ref": ?"([^"]+)"', text)) <= defined
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation["summary"], (path, method)
            answers = operation["responses"]
            assert "422" not in answers, "FastAPI's own validation answer is never sent"
            if "requestBody" in operation:
                assert {"400", "401", "413", "415"} <= set(answers)
                assert answers["400"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
                assert operation["requestBody"]["required"]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"404", "429", "503"} <= set(chat["responses"])
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "ChatChunk" in document["components"]["schemas"]
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["functions"]["enum"] == [None, []]
