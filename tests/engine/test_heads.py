"""An expert that is an adapter over its untuned model: one row of their head where only the difference is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.model_set import ModelSet, make_expert
from proxyserve.types import ModelKey
from tests.engine.driver import Collected, run, submission
from tests.engine.test_adapters import make_adapter
from tests.tiny import TinyFamily, build_family

PROMPT = [5, 17, 200, 33, 9, 120, 64, 88]
STEPS = 12


def make_engine(family: TinyFamily, adapters: int = 2) -> Engine:
    """Experts `e0`, `e1`, … that are adapters over the untuned model, and `qa` as a model of its own."""
    models = load_family(family.base, [ExpertSource("qa", family.experts["qa"], family.untuned)])
    untuned = models.expert("qa").untuned
    assert untuned is not None
    experts = [models.expert("qa")]
    for number in range(adapters):
        adapter = make_adapter(untuned.module, seed=number)
        tuned = replace(untuned, key=ModelKey(f"e{number}.tuned"), over=untuned, adapter=adapter)
        experts.append(make_expert(f"e{number}", models.base, tuned, untuned))
    config = EngineConfig(max_batch=16, max_batch_tokens=64, kv_memory=2**22, speculate="off")
    return Engine(ModelSet(models.base, experts), config)


def small(engine: Engine) -> Runner:
    [runner] = [runner for key, runner in engine.runners.items() if key.name == "small"]
    assert isinstance(runner, Runner)
    return runner


def generate(engine: Engine, weights: Mapping[str, float], **fusion: object) -> Collected:
    asked = parse_fusion({"experts": weights, **fusion})
    wanted = submission("a", PROMPT, fusion=asked, max_tokens=STEPS, logprobs=5)
    return run(engine, [wanted])["a/0"]


@pytest.mark.parametrize("weights", [{"e0": 1.0}, {"e0": 0.7, "qa": 0.5}, {"e0": -0.5}])
def test_one_row_says_what_two_do(tiny_family: TinyFamily, weights: dict[str, float]) -> None:
    shared, apart = make_engine(tiny_family), make_engine(tiny_family)
    assert small(shared).head_is_linear
    small(apart).head_is_linear = False
    one, two = generate(shared, weights), generate(apart, weights)
    assert one.tokens == two.tokens
    for left, right in zip(one.logprobs, two.logprobs, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
        assert dict(left.top) == pytest.approx(dict(right.top), abs=1e-4)
    assert one.last and two.last and one.last.fusion and two.last.fusion
    assert one.last.fusion.mean_kl == pytest.approx(two.last.fusion.mean_kl, abs=1e-4)
    saved = STEPS if "qa" not in weights else 0  # with `qa` the untuned row is read twice and stays
    assert small(apart).stats.rows - small(shared).stats.rows == saved


def test_rows_are_saved_in_a_mixed_batch_only_where_nothing_else_is_read(tiny_family: TinyFamily) -> None:
    engine = make_engine(tiny_family)
    fusions = {
        "linear": {"experts": {"e0": 1.0}},
        "other": {"experts": {"e1": 0.5}},
        "explained": {"experts": {"e0": 1.0}, "explain": 3},
        "solved": {"rule": "dynamic", "experts": {"e1": 1.0}},
        "supported": {"experts": {"e0": 1.0}, "support": {"of": ["tuned"], "top_k": 40}},
        "summed": {"rule": "arm", "experts": {"e0": 1.0}},
        "gated": {"experts": {"e0": 1.0}, "gate": {"confidence": 0.999}},
        "two": {"experts": {"e0": 0.5, "e1": 0.5}},
    }
    together = run(
        engine,
        [
            submission(name, PROMPT, fusion=parse_fusion(value), max_tokens=STEPS, logprobs=3)
            for name, value in fusions.items()
        ],
    )
    apart = make_engine(tiny_family)
    small(apart).head_is_linear = False
    for name, value in fusions.items():
        alone = run(
            apart, [submission(name, PROMPT, fusion=parse_fusion(value), max_tokens=STEPS, logprobs=3)]
        )[f"{name}/0"]
        assert together[f"{name}/0"].tokens == alone.tokens, name
        for left, right in zip(together[f"{name}/0"].logprobs, alone.logprobs, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=1e-4), name
    assert small(apart).stats.rows - small(engine).stats.rows == 3 * STEPS  # of `linear`, `other` and `two`


@pytest.mark.parametrize(("architecture", "linear"), [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_heads_that_are_not_linear_are_found(architecture: str, linear: bool, tmp_path: Path) -> None:
    """Gemma 2 caps its logits."""
    family = build_family(tmp_path, architecture)
    engine = make_engine(family)
    assert small(engine).head_is_linear is linear
    two = generate(engine, {"e0": 1.0})
    small(engine).head_is_linear = False
    engine.residents.pools[small(engine).model.key].drop_cache()
    assert generate(engine, {"e0": 1.0}).tokens == two.tokens


def test_a_bias_in_the_head_is_not_linear(tmp_path: Path) -> None:
    family = build_family(tmp_path, "llama")
    [model] = [
        expert.untuned
        for expert in load_family(
            family.base, [ExpertSource("qa", family.experts["qa"], family.untuned)]
        ).experts.values()
    ]
    assert model is not None
    head = model.module.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(head.weight.shape[0]), requires_grad=False)
    assert not Runner(model).head_is_linear
