"""Rules, presets, explanations and roles through HTTP. What the rules compute is tested in tests/engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxyserve.api.presets import parse_fusion, parse_presets
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.calibration import Calibration, CalibrationPoint
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve

BASE = {"model": "atlas", "prompt": "Hello there", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
ONE = {"qa": 1}

RULES: dict[str, dict[str, Any]] = {
    "proxy": {"experts": {"qa": {"weight": 0.5, "schedule": [[0, 1.0], [2, 0.25]]}}},
    "upscale": {"experts": ONE, "beta": 1.5, "top_p": 0.9},
    "dynamic": {"experts": {"qa": 1, "record": 0.5}, "match": "forward", "max_weight": 1.5},
    "contrast": {"experts": ONE, "gamma": 0.5, "alpha": 0.01},
    "unlearn": {"experts": ONE, "alpha": 2},
    "guidance": {"negative_prompt": "Bye", "scale": 2.5},
    "mixture": {"models": {"base": 0.5, "qa.tuned": 0.25, "small": 0.25}, "r": "-inf"},
    "arm": {"experts": {"qa": 0.7}},
    "edit": {"experts": ONE, "budget": 0.1},
    "formula": {"formula": "base + 0.8*(qa.tuned - small) - 0.3*record"},
}

SUMS = {"contrast": 0.5, "arm": 1.7}


@pytest.fixture(scope="module")
def served(tiny_models: ModelSet) -> Iterator[Live]:
    presets = parse_presets(
        {
            "house": json.dumps({"rule": "proxy", "experts": {"qa": 0.8}, "target_entropy": 1.0}),
            "twice": json.dumps({"rule": "formula", "formula": "base + 2*record"}),
        },
        {"atlas"},
    )
    points = tuple(
        CalibrationPoint(weight, 1.0, loss) for weight, loss in ((0.0, 2.0), (0.5, 2.1), (1.0, 3.0))
    )
    engine = AsyncEngine(
        Engine(
            tiny_models,
            EngineConfig(max_batch=8, max_batch_tokens=64, kv_memory=4 * 2**20),
            presets=presets,
            calibrations={"qa": Calibration("qa", points)},
        )
    )
    engine.start()
    with serve(engine) as live:
        yield live
        assert_idle(engine)
    engine.close()


def answer(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post("/v1/completions", **{**BASE, **body})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_answers_and_reports(served: Live, rule: str) -> None:
    result = answer(served, fusion={"rule": rule, **RULES[rule]}, logprobs=2)
    report = result["fusion"]
    assert report["rule"] == rule
    assert report["sum_of_weights"] == pytest.approx(SUMS.get(rule, 1.0))
    assert (report["mean_kl"] is None) == (rule == "contrast")
    assert set(report["generations"]) <= {"qa", "record"}
    lanes = result["usage"]["lane_tokens"]
    assert ("atlas" in lanes) == (rule != "contrast")
    if rule == "dynamic":
        weights = report["mean_weights"]
        assert weights["qa"] == pytest.approx(2 * weights["record"], rel=1e-5)
        assert 0 < weights["qa"] <= 1.5
    else:
        assert "mean_weights" not in report


def test_rules_differ(served: Live) -> None:
    laws = {
        rule: json.dumps(answer(served, fusion={"rule": rule, **given}, logprobs=0)["choices"][0]["logprobs"])
        for rule, given in RULES.items()
    }
    assert len(set(laws.values())) == len(laws)


def test_edit_takes_the_calibrated_weight(served: Live) -> None:
    edited = answer(served, fusion={"rule": "edit", **RULES["edit"]}, logprobs=3)
    spelled = answer(served, fusion={"experts": {"qa": 0.5}}, logprobs=3)
    assert edited["choices"] == spelled["choices"]


def test_model_name_and_rule_go_together(served: Live) -> None:
    named = answer(served, model="atlas+qa:2", fusion={"rule": "arm"}, logprobs=2)
    assert (
        named["choices"]
        == answer(served, fusion={"rule": "arm", "experts": {"qa": 2}}, logprobs=2)["choices"]
    )
    response = served.post("/v1/completions", **{**BASE, "model": "atlas+qa", "fusion": {"rule": "guidance"}})
    assert response.json()["error"]["param"] in ("model", "fusion.negative_prompt")


def test_presets_are_models(served: Live) -> None:
    listed = {model["id"] for model in served.http.get("/v1/models").json()["data"]}
    assert {"atlas", "atlas+qa", "house", "twice"} <= listed
    assert served.http.get("/v1/models/house").json()["id"] == "house"
    spelled = answer(served, fusion={"experts": {"record": 2}}, logprobs=2)
    assert answer(served, model="twice", logprobs=2)["choices"] == spelled["choices"]
    assert answer(served, model="twice")["fusion"]["rule"] == "formula"
    explained = answer(served, model="twice", fusion={"explain": 1})
    assert explained["choices"][0]["explain"][0]["weights"] == {"record": 2.0}
    for beside in ({"experts": ONE}, {"rule": "arm"}, {"gate": {"confidence": 1}}):
        response = served.post("/v1/completions", **{**BASE, "model": "twice", "fusion": beside})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"fusion.{next(iter(beside))}"


def test_presets_are_parts_of_formulas(served: Live) -> None:
    half = answer(served, fusion={"rule": "formula", "formula": "0.5*base + 0.5*twice"}, logprobs=2)
    assert half["choices"] == answer(served, fusion={"experts": {"record": 1}}, logprobs=2)["choices"]


def test_explanations(served: Live) -> None:
    body = {**BASE, "model": "atlas+qa:0.5", "logprobs": 1, "fusion": {"explain": 3}}
    choice = answer(served, **body)["choices"][0]
    assert len(choice["explain"]) == BASE["max_tokens"]
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"]), (
        "explaining lists no more log-probs"
    )
    for entry, logprob in zip(choice["explain"], choice["logprobs"]["token_logprobs"], strict=True):
        assert entry["fused"]["logprob"] == pytest.approx(logprob)
        assert set(entry["lanes"]) == {"base", "qa.tuned", "qa.untuned"}
        assert all(len(law["top"]) == 3 for law in (entry["fused"], *entry["lanes"].values()))
        assert entry["fused"]["top"][0]["token_id"] == entry["token_id"], "greedy"
        delta = entry["lanes"]["qa.tuned"]["logprob"] - entry["lanes"]["qa.untuned"]["logprob"]
        assert entry["push"]["qa"] == pytest.approx(0.5 * delta)
        assert entry["weights"] == {"qa": 0.5}
        assert entry["kl"] >= 0
        assert entry["flip"] == (entry["lanes"]["base"]["top"][0]["token_id"] != entry["token_id"])
        assert entry["gated"] is False
    streamed = served.stream("/v1/completions", **body)
    assert [entry for chunk in streamed for entry in chunk["choices"][0]["explain"]] == choice["explain"]
    chat = served.post(
        "/v1/chat/completions",
        model="atlas+qa",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=2,
        fusion={"explain": 1},
    ).json()
    assert len(chat["choices"][0]["explain"]) == chat["usage"]["completion_tokens"]


def test_without_explain_nothing_is_added(served: Live) -> None:
    assert "explain" not in answer(served, model="atlas+qa")["choices"][0]
    chunks = served.stream("/v1/completions", **{**BASE, "model": "atlas+qa"})
    assert not any("explain" in choice for chunk in chunks for choice in chunk["choices"])


def test_target_entropy_is_seen_in_the_answer(served: Live) -> None:
    """At an entropy near 0 a draw is the greedy choice; with temperature 0 as well the two contradict each other."""
    greedy = answer(served)["choices"][0]["text"]
    cold = answer(served, temperature=1, seed=3, fusion={"target_entropy": 1e-4})["choices"][0]["text"]
    assert cold == greedy
    hot = {
        answer(served, temperature=1, seed=seed, fusion={"target_entropy": 5})["choices"][0]["text"]
        for seed in range(4)
    }
    assert len(hot) > 1
    response = served.post("/v1/completions", **{**BASE, "fusion": {"target_entropy": 1}})
    assert response.json()["error"]["param"] == "fusion.target_entropy"


def test_gate_is_counted(served: Live) -> None:
    never = answer(served, model="atlas+qa", fusion={"gate": {"confidence": 0.0}})
    assert never["usage"]["gated_tokens"] == BASE["max_tokens"]
    assert never["usage"]["lane_tokens"]["small"] == 0
    assert never["usage"]["skipped_lane_tokens"]["small"] > 0
    assert never["choices"] == answer(served)["choices"]
    always = answer(served, model="atlas+qa", fusion={"gate": {"confidence": 1.0}})
    assert always["usage"]["gated_tokens"] == 0
    assert always["choices"] == answer(served, model="atlas+qa")["choices"]
    assert "gated_tokens" not in answer(served, model="atlas+qa")["usage"]


def test_prompts_per_lane(served: Live) -> None:
    plain = answer(served, model="atlas+qa", logprobs=1)
    shots = answer(
        served, model="atlas+qa", logprobs=1, fusion={"prompts": {"base": {"prefix": "Q: a\nA: b\n"}}}
    )
    assert shots["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    whole = {"base": {"text": "Q: a\nA: b\n" + BASE["prompt"]}}
    assert (
        answer(served, model="atlas+qa", logprobs=1, fusion={"prompts": whole})["choices"] == shots["choices"]
    )
    ids = served.post("/tokenize", prompt=whole["base"]["text"]).json()["tokens"]
    given = {"base": {"tokens": ids}}
    assert (
        answer(served, model="atlas+qa", logprobs=1, fusion={"prompts": given})["choices"] == shots["choices"]
    )
    chat = {"qa.tuned": {"messages": [{"role": "user", "content": "Hello there"}]}}
    assert (
        answer(served, model="atlas+qa", logprobs=1, fusion={"prompts": chat})["choices"] != plain["choices"]
    )


def test_prompts_of_idle_lanes_are_no_error(served: Live) -> None:
    """A weight that happens to be 0 must not make the rest of a request wrong."""
    plain = answer(served, logprobs=1)
    still = answer(served, logprobs=1, fusion={"rule": "guidance", "scale": 1, "negative_prompt": "Bye"})
    assert still["choices"] == plain["choices"]
    off = {"experts": {"qa": 0}, "prompts": {"qa.tuned": {"text": "Bye"}}}
    assert answer(served, logprobs=1, fusion=off)["choices"] == plain["choices"]


def test_bad_tokens_of_a_lane_are_named(served: Live) -> None:
    fusion = {"experts": {"qa": 1}, "prompts": {"qa.tuned": {"tokens": [10**6]}}}
    response = served.post("/v1/completions", **{**BASE, "fusion": fusion})
    assert response.json()["error"]["param"] == "fusion.prompts.qa.tuned"


def test_context_aware_decoding_is_guidance(served: Live) -> None:
    aware = {"rule": "guidance", "scale": 1.5, "negative_prompt": "there"}
    spelled = {
        "rule": "formula",
        "formula": "1.5*base - 0.5*base@bare",
        "prompts": {"base@bare": {"text": "there"}},
    }
    one, other = (answer(served, fusion=fusion, logprobs=2)["choices"][0] for fusion in (aware, spelled))
    assert one["text"] == other["text"]
    assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
    response = served.post(
        "/v1/completions", **{**BASE, "fusion": {"rule": "formula", "formula": "base@bare"}}
    )
    assert response.json()["error"]["param"] == "fusion.prompts.base@bare"


def test_one_batch_of_all_rules(served: Live) -> None:
    """The same alone and in a crowd."""
    from concurrent.futures import ThreadPoolExecutor

    bodies = [{"fusion": {"rule": rule, **given}, "logprobs": 2} for rule, given in RULES.items()]
    alone = [answer(served, **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        crowd = list(pool.map(lambda body: answer(served, **body)["choices"], bodies))
    for one, other in zip(alone, crowd, strict=True):
        assert one[0]["text"] == other[0]["text"]
        assert one[0]["logprobs"]["token_logprobs"] == pytest.approx(
            other[0]["logprobs"]["token_logprobs"], abs=1e-4
        )


@pytest.fixture(scope="module")
def guarded(tiny_models: ModelSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With user and administrator keys, and a protected expert."""
    folder: Path = tmp_path_factory.mktemp("keys")
    (folder / "users").write_text("user-key\n")
    (folder / "admins").write_text("admin-key\n")
    policy = FusionPolicy(protected=frozenset({"qa"}))
    presets = parse_presets({"against": json.dumps({"experts": {"qa": -0.5}})}, set())
    engine = AsyncEngine(
        Engine(
            tiny_models,
            EngineConfig(max_batch=4, max_batch_tokens=64, kv_memory=2**20),
            policy,
            presets=presets,
        )
    )
    engine.start()
    config = ServerConfig(api_key_file=folder / "users", admin_key_file=folder / "admins")
    with serve(engine, config) as live:
        yield live
    engine.close()


def post_as(live: Live, key: str, **body: Any) -> Any:
    return live.http.post(
        "/v1/completions", json={**BASE, **body}, headers={"authorization": f"Bearer {key}"}
    )


@pytest.mark.parametrize(
    ("fusion", "param"),
    [
        ({"experts": {"qa": -0.5}}, "fusion.experts.qa"),
        ({"experts": {"qa": {"weight": 1, "schedule": [[0, 1], [5, -1]]}}}, "fusion.experts.qa"),
        ({"rule": "unlearn", "experts": {"qa": 1}}, "fusion.alpha"),
        ({"rule": "formula", "formula": "base + record - qa.tuned"}, "fusion.formula"),
        ({"explain": 1}, "fusion.explain"),
    ],
    ids=str,
)
def test_what_takes_an_administrator(guarded: Live, fusion: dict[str, Any], param: str) -> None:
    refused = post_as(guarded, "user-key", fusion=fusion)
    assert refused.status_code == 403
    assert refused.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "permission_error",
        "param": param,
        "code": "forbidden",
    }
    assert post_as(guarded, "admin-key", fusion=fusion).status_code == 200


@pytest.mark.parametrize(
    "fusion",
    [{"experts": {"qa": 0.5, "record": -0.5}}, {"rule": "contrast", "experts": {"qa": 1}}],
    ids=str,
)
def test_what_does_not(guarded: Live, fusion: dict[str, Any]) -> None:
    assert post_as(guarded, "user-key", fusion=fusion).status_code == 200


def test_a_preset_is_its_authors_decision(guarded: Live) -> None:
    assert post_as(guarded, "user-key", model="against").status_code == 200
    assert post_as(guarded, "user-key", model="against", fusion={"explain": 1}).status_code == 403
    assert post_as(guarded, "nobody", model="against").status_code == 401


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a+b", "{}", "cannot name"),
        ("atlas", "{}", "cannot name"),
        ("x", "{", "not JSON"),
        ("x", "[]", "fusion"),
        ("x", '{"rule": "none"}', "the rules are"),
        ("x", '{"gamma": 1}', "belongs to rule contrast"),
    ],
)
def test_bad_presets(name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_presets({name: text}, {"atlas"})


def test_presets_are_checked_at_the_start(tiny_models: ModelSet) -> None:
    with pytest.raises(InvalidRequest, match=r"Preset 'x': .*ghost"):
        Engine(
            tiny_models, EngineConfig(kv_memory=2**20), presets={"x": parse_fusion({"experts": {"ghost": 1}})}
        )


def test_fusion_in_the_openapi_document(served: Live) -> None:
    schemas = served.http.get("/openapi.json").json()["components"]["schemas"]
    fusion = json.dumps(schemas["CompletionRequest"]["properties"]["fusion"])
    for rule in RULES:
        assert f"#/components/schemas/{rule.capitalize()}Fusion" in fusion
    beta = schemas["UpscaleFusion"]["properties"]["beta"]
    assert beta["default"] == 1.0
    assert math.isfinite(beta["anyOf"][0]["maximum"])
