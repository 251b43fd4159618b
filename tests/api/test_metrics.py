"""What a scrape says, against what was sent and answered."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxyserve.api.families import Kind, all_families, tables
from proxyserve.api.metrics import Metrics
from proxyserve.engine.counters import EngineCounters, KeyCounts
from proxyserve.engine.loop import EngineStats, PoolStats, TrunkStats
from proxyserve.experts.generation import Phase
from proxyserve.experts.roster import SwapCounters
from tests.api.live import Live
from tests.tools import need

#: What boards and autoscalers made for vLLM ask for, after its prefix.
PEERS = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "request_success_total",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
]

Scrape = Mapping[tuple[str, ...], float]


def parse(text: str) -> Scrape:
    """Name of the sample and values of its labels -> value, but for buckets, whose sums are checked here."""
    values: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        buckets: list[float] = []
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                buckets.append(sample.value)
            else:
                values[sample.name, *sample.labels.values()] = sample.value
        if family.type == "histogram":
            assert buckets == sorted(buckets), family.name
            assert buckets[-1] == values[f"{family.name}_count",], family.name
    return values


def scrape(live: Live) -> Scrape:
    return parse(live.http.get("/metrics").text)


def test_a_mixed_workload_adds_up(live: Live) -> None:
    prompt = "The quick brown fox jumps over the lazy dog, twice, and says: who was born where?"
    dynamic = {"rule": "dynamic", "experts": {"record": 1.0}, "mode": "exact"}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": "atlas+qa:0.5", "prompt": prompt, "n": 2}),
        ("/v1/completions", {"model": "atlas", "prompt": [prompt, "name:"]}),
        ("/v1/completions", {"model": "atlas", "fusion": dynamic, "prompt": "name: Ada", "max_tokens": 9}),
        ("/v1/chat/completions", {"model": "atlas+qa", "messages": [{"role": "user", "content": prompt}]}),
        ("/v1/completions", {"model": "atlas+qa:0.5", "prompt": prompt, "seed": 3}),
    ]
    before = scrape(live)
    answers = [
        live.post(path, **{"max_tokens": 5, "ignore_eos": True, **body}).json() for path, body in bodies
    ]
    refused = live.post("/v1/completions", model="no such model", prompt="a")
    assert refused.status_code == 404
    after = scrape(live)

    def grown(name: str, *labels: str) -> float:
        return after[f"proxyserve_{name}", *labels] - before.get((f"proxyserve_{name}", *labels), 0.0)

    def over_answers(value: Any) -> float:
        return sum(value(answer) for answer in answers)

    choices = over_answers(lambda answer: len(answer["choices"]))
    tokens = over_answers(lambda answer: answer["usage"]["completion_tokens"])
    assert (choices, tokens) == (7, 39)
    assert grown("generation_tokens_total") == grown("request_generation_tokens_sum") == tokens
    # A prompt counts for each choice that continues it, and in `usage` once.
    twice = answers[0]["usage"]["prompt_tokens"]
    prompts = over_answers(lambda answer: answer["usage"]["prompt_tokens"]) + twice
    assert grown("prompt_tokens_total") == grown("request_prompt_tokens_sum") == prompts
    assert grown("request_success_total", "length") == choices
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_time_per_output_token_seconds",
        "request_prompt_tokens",
    ):
        assert grown(f"{name}_count") == choices, name
    assert grown("inter_token_latency_seconds_count") == tokens - choices
    assert grown("request_barrier_wait_seconds_count") == choices - 2, "a plain base has one lane"

    # Parts of a request's time are parts of the whole, and nothing is counted twice.
    parts = sum(grown(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert 0 < parts < grown("e2e_request_latency_seconds_sum")
    assert grown("inter_token_latency_seconds_sum") == pytest.approx(
        grown("request_decode_time_seconds_sum"), rel=0.2
    )

    fused = [answer for answer in answers if answer.get("fusion")]
    fused_tokens = sum(answer["usage"]["completion_tokens"] for answer in fused)
    assert grown("fused_tokens_total") == grown("kl_nats_count") == fused_tokens == 29
    kl = sum(answer["fusion"]["mean_kl"] * answer["usage"]["completion_tokens"] for answer in fused)
    assert kl > 0
    assert grown("kl_nats_sum") == pytest.approx(kl, rel=1e-5)
    assert grown("flips_total") == sum(answer["fusion"]["flips"] for answer in fused)
    assert grown("solved_weight_count") == 9
    assert grown("solved_weight_sum") == pytest.approx(
        9 * answers[2]["fusion"]["mean_weights"]["record"], rel=1e-5
    )
    assert grown("expert_requests_total", "qa", "1") == 4

    lane_tokens: dict[str, int] = {}
    for answer in answers:
        for model, count in answer["usage"]["lane_tokens"].items():
            lane_tokens[model] = lane_tokens.get(model, 0) + count
    assert set(lane_tokens) == {"atlas", "qa.tuned", "record.tuned", "small"}
    for model, count in lane_tokens.items():
        assert grown("lane_tokens_total", model) == count
        assert grown("lane_seconds_total", model) > 0
        assert grown("prefix_cache_queries_total", model) > 0
    assert grown("iteration_tokens_total_sum") == sum(lane_tokens.values())
    # The last request's prompt was there, and so was that of the second choice of the first.
    assert grown("prefix_cache_hits_total", "qa.tuned") >= 2 * (twice // 16) * 16 > 0

    steps = grown("engine_steps_total")
    assert grown("engine_step_seconds_count") == grown("iteration_tokens_total_count") == steps
    assert 0 < grown("step_barrier_wait_seconds_count") <= steps
    lanes = sum(grown("lane_seconds_total", model) for model in lane_tokens)
    assert 0 < grown("step_barrier_wait_seconds_sum") < lanes
    assert 0 < lanes + grown("sampling_seconds_total") < grown("engine_step_seconds_sum")

    assert grown("requests_rejected_total", "not_found") == 1
    for gauge in ("num_requests_running", "num_requests_waiting", "waiting_tokens"):
        assert after[f"proxyserve_{gauge}",] == 0
    assert after["proxyserve_kv_cache_usage_perc", "atlas"] == 0
    assert after["process_resident_memory_bytes",] > 1e7


def test_clients_make_no_series(live: Live) -> None:
    live.post("/v1/completions", model="atlas+qa", prompt="warm", max_tokens=2)
    live.post("/v1/completions", model="nothing", prompt="a")
    live.http.get("/nowhere")
    before = set(scrape(live))
    for number in range(3):
        invented = f"invented-{number}"
        headers = {"x-request-id": invented, "user-agent": invented, "authorization": f"Bearer {invented}"}
        live.http.get(f"/{invented}?{invented}=1", headers=headers)
        live.post(
            "/v1/completions", model=f"atlas+qa:0.{number}1", prompt=invented, max_tokens=2, user=invented
        )
        live.post("/v1/completions", model=invented, prompt="a")
    assert set(scrape(live)) == before
    assert "invented" not in live.http.get("/metrics").text


# The list of families -------------------------------------------------------------------------------------------


def everything() -> Metrics:
    """Of a server that has seen all there is, so that no family is without samples."""
    one = {"a": 1}
    stats = EngineStats(
        finished=one,
        pools={"a": PoolStats(4, 1, 1)},
        trunks={"a": TrunkStats(1, 1.0)},
        lane_tokens=one,
        prefix_queries=one,
        prefix_hits=one,
        drafts=one,
        draft_tokens=one,
        accepted_tokens=one,
        by_generation={("qa", "1"): 1},
        by_key={"alice": KeyCounts(1, 2, 3)},
        histograms=EngineCounters().histograms.stats(),
    )
    generation = SimpleNamespace(generation=3, phase=Phase.LOADING, requests=1, bytes=5, progress=0.5)
    counters = SwapCounters()
    counters.phases["loading"] += 1
    counters.failures["loading"] += 1
    counters.seconds["loading"] = 1.0
    experts = SimpleNamespace(
        counters=counters, experts=lambda: [SimpleNamespace(name="qa", generations=[generation])]
    )
    metrics = Metrics(lambda: stats, cast(Any, experts))
    metrics.rejected("invalid")
    metrics.grammar("compiled", 0.25)
    metrics.grammar("cached")
    return metrics


def test_the_list_is_what_a_server_has() -> None:
    """Names, types, explanations and labels."""
    found = {}
    for family in text_string_to_metric_families(everything().render().decode()):
        assert family.samples, family.name
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples}
        found[name] = (family.type, family.documentation, labels)
    listed = {
        family.name: (family.kind.value, family.text, {tuple(sorted(family.labels))})
        for family in all_families()
    }
    assert found == listed


def test_the_documentation_is_made_of_the_list(repository: Path) -> None:
    page = (repository / "docs" / "metrics.md").read_text()
    assert page.endswith(tables()), (
        "run: python -m proxyserve.api.families, and put it at the end of docs/metrics.md"
    )
    names = {family.name for family in all_families()}
    assert {f"proxyserve_{name}" for name in PEERS} <= names


def test_names_say_what_they_are() -> None:
    for family in all_families():
        assert family.name.startswith(("proxyserve_", "process_"))
        if family.name != "proxyserve_iteration_tokens_total":  # a histogram, but that is what peers call it
            assert family.name.endswith("_total") == (family.kind is Kind.COUNTER)
        assert family.text.endswith(".")


def test_grammars_are_counted() -> None:
    values = parse(everything().render().decode())
    assert values["proxyserve_grammar_compilations_total", "compiled"] == 1
    assert values["proxyserve_grammar_compilations_total", "cached"] == 1
    assert values["proxyserve_grammar_compile_seconds_sum",] == 0.25


def test_promtool_finds_nothing() -> None:
    result = subprocess.run(
        [need("promtool"), "check", "metrics"],
        input=everything().render(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    complaints = [
        line for line in result.stdout.decode().splitlines() if "iteration_tokens_total" not in line
    ]
    assert complaints == []
