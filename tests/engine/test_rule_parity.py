"""Every rule in the engine, in one mixed batch, against its paper's formula over plain Hugging Face forwards."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig
from proxyserve.demo.family import family_paths
from proxyserve.engine.engine import Engine
from proxyserve.fusion.calibration import Calibration, CalibrationPoint
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.model_set import ModelSet
from tests.engine.driver import Collected, run, submission
from tests.fusion import papers
from tests.fusion.papers import Laws, PaperRule
from tests.tiny import TinyFamily

A, B = "qa", "record"  # two experts that both families have
STEPS = 4
NEGATIVE = 3  # how many tokens of the prompt's end are the negative prompt


def pairs(laws: Laws, *experts: str) -> list[tuple[Tensor, Tensor]]:
    return [(laws[f"{expert}.tuned"], laws["small"]) for expert in experts]


def dynamic(laws: Laws, experts: tuple[str, ...], weights: tuple[float, ...], *rest: Any) -> Tensor:
    return papers.dynamic(laws["base"], pairs(laws, *experts), weights, *rest)[0]


SCHEDULED = {"experts": {A: {"weight": 0.8, "schedule": [[0, 1.0], [2, 0.5]]}, B: -0.3}}

#: Fusion objects, and what they mean.
RULES: dict[str, tuple[dict[str, Any], PaperRule]] = {
    "base": ({}, lambda laws, _: laws["base"]),
    "proxy": (
        SCHEDULED,
        lambda laws, t: papers.proxy(
            laws["base"],
            (0.8 if t < 2 else 0.4, laws[f"{A}.tuned"], laws["small"]),
            (-0.3, laws[f"{B}.tuned"], laws["small"]),
        ),
    ),
    "upscale": (
        {"rule": "upscale", "experts": {A: 1}, "beta": 1.7, "top_p": 0.9},
        lambda laws, _: papers.upscale(laws["base"], laws[f"{A}.tuned"], laws["small"], 1.7, 0.9),
    ),
    "upscale, whole": (
        {"rule": "upscale", "experts": {B: 1}, "beta": 0.5},
        lambda laws, _: papers.upscale(laws["base"], laws[f"{B}.tuned"], laws["small"], 0.5, 1.0),
    ),
    "dynamic": (
        {"rule": "dynamic", "experts": {A: 1}},
        lambda laws, _: dynamic(laws, (A,), (1.0,), "both", 2.0),
    ),
    "dynamic forward": (
        {"rule": "dynamic", "experts": {A: 1}, "match": "forward", "max_weight": 3},
        lambda laws, _: dynamic(laws, (A,), (1.0,), "forward", 3.0),
    ),
    "dynamic reverse": (
        {"rule": "dynamic", "experts": {B: 1}, "match": "reverse"},
        lambda laws, _: dynamic(laws, (B,), (1.0,), "reverse", 2.0),
    ),
    "dynamic budget": (
        {"rule": "dynamic", "experts": {A: 1}, "mode": "budget", "kl": 0.1},
        lambda laws, _: dynamic(laws, (A,), (1.0,), "budget", 2.0, 0.1),
    ),
    "dynamic ray": (
        {"rule": "dynamic", "experts": {A: 1, B: 0.5}},
        lambda laws, _: dynamic(laws, (A, B), (1.0, 0.5), "both", 2.0),
    ),
    "dynamic paper": (
        {"rule": "dynamic", "experts": {A: 1, B: 1}, "mode": "paper"},
        lambda laws, _: papers.paper_search(laws["base"], pairs(laws, A, B))[0],
    ),
    "contrast": (
        {"rule": "contrast", "experts": {A: 1}, "gamma": 0.7, "alpha": 0.2},
        lambda laws, _: papers.contrast(laws[f"{A}.tuned"], laws["small"], 0.7, 0.2),
    ),
    "unlearn": (
        {"rule": "unlearn", "experts": {A: 1}, "alpha": 3},
        lambda laws, _: papers.unlearn(laws["base"], laws[f"{A}.tuned"], 3.0),
    ),
    "guidance": (
        {"rule": "guidance", "scale": 2.5, "negative_prompt": "taken from the prompt"},
        lambda laws, _: papers.guidance(laws["base"], laws["base@negative"], 2.5),
    ),
    "mixture": (
        {"rule": "mixture", "models": {"base": 0.3, f"{A}.tuned": 0.5, "small": 0.2}},
        lambda laws, _: papers.mixture(
            1, (0.3, laws["base"]), (0.5, laws[f"{A}.tuned"]), (0.2, laws["small"])
        ),
    ),
    "mixture, product": (
        {"rule": "mixture", "models": {"base": 0.3, f"{A}.tuned": 0.7}, "r": 0},
        lambda laws, _: papers.mixture(0, (0.3, laws["base"]), (0.7, laws[f"{A}.tuned"])),
    ),
    "mixture, harmonic": (
        {"rule": "mixture", "models": {"base": 0.3, f"{A}.tuned": 0.7}, "r": -1},
        lambda laws, _: papers.mixture(-1, (0.3, laws["base"]), (0.7, laws[f"{A}.tuned"])),
    ),
    "mixture, union": (
        {"rule": "mixture", "models": {"base": 0.3, f"{A}.tuned": 0.7}, "r": "inf"},
        lambda laws, _: papers.mixture(math.inf, (0.3, laws["base"]), (0.7, laws[f"{A}.tuned"])),
    ),
    "mixture, intersection": (
        {"rule": "mixture", "models": {f"{A}.tuned": 0.7, f"{B}.tuned": 0.3}, "r": "-inf"},
        lambda laws, _: papers.mixture(-math.inf, (0.7, laws[f"{A}.tuned"]), (0.3, laws[f"{B}.tuned"])),
    ),
    "arm": (
        {"rule": "arm", "experts": {A: 0.6, B: 0.2}},
        lambda laws, _: papers.normalised(laws["base"] + 0.6 * laws[f"{A}.tuned"] + 0.2 * laws[f"{B}.tuned"]),
    ),
    "edit": (
        {"rule": "edit", "experts": {A: 1}, "budget": 0.01},
        lambda laws, _: papers.proxy(laws["base"], (0.7, laws[f"{A}.tuned"], laws["small"])),
    ),
    "formula": (
        {"rule": "formula", "formula": f"0.5*base + 0.8*({A}.tuned - small) + 0.3*{B} - 0.2*{B}.tuned"},
        lambda laws, _: papers.normalised(
            0.5 * laws["base"]
            + 0.8 * (laws[f"{A}.tuned"] - laws["small"])
            + 0.3 * (laws[f"{B}.tuned"] - laws["small"])
            - 0.2 * laws[f"{B}.tuned"]
        ),
    ),
    "support of two laws": (
        {"experts": {A: 1}, "support": {"of": ["base", "tuned"], "min_p": 0.3}},
        lambda laws, _: papers.masked(
            laws["base"] + laws[f"{A}.tuned"] - laws["small"],
            papers.likely(laws["base"], 0.3) | papers.likely(laws[f"{A}.tuned"], 0.3),
        ),
    ),
    "support with the base outside": (
        {"experts": {A: 1}, "support": {"of": ["tuned"], "top_p": 0.6, "outside": "base"}},
        lambda laws, _: papers.normalised(
            laws["base"] + papers.nucleus(laws[f"{A}.tuned"], 0.6) * (laws[f"{A}.tuned"] - laws["small"])
        ),
    ),
    "support of the fused law": (
        {"experts": {A: 1}, "support": {"of": ["fused"], "top_k": 3}},
        lambda laws, _: papers.masked(
            laws["base"] + laws[f"{A}.tuned"] - laws["small"],
            papers.best(laws["base"] + laws[f"{A}.tuned"] - laws["small"], 3),
        ),
    ),
    "one-sided with the base outside": (
        {
            "rule": "unlearn",
            "experts": {A: 1},
            "support": {"of": [f"{A}.tuned"], "top_k": 5, "outside": "base"},
        },
        lambda laws, _: papers.normalised(
            laws["base"]
            - papers.best(laws[f"{A}.tuned"], 5) * 5.0 * torch.relu(laws[f"{A}.tuned"] - laws["base"])
        ),
    ),
    "single models with the base outside": (
        {"rule": "arm", "experts": {A: 0.6}, "support": {"of": ["base"], "top_k": 5, "outside": "base"}},
        lambda laws, _: papers.normalised(
            laws["base"] + papers.best(laws["base"], 5) * 0.6 * laws[f"{A}.tuned"]
        ),
    ),
    "dynamic and a support": (
        {"rule": "dynamic", "experts": {A: 1}, "support": {"of": ["base"], "top_p": 0.8}},
        lambda laws, _: papers.masked(
            dynamic(laws, (A,), (1.0,), "both", 2.0), papers.nucleus(laws["base"], 0.8)
        ),
    ),
}


#: What the terms of expert A add to a token's score.
PUSHES: dict[str, Callable[[Laws, int], float]] = {
    "contrast": lambda laws, token: 0.7 * float((laws[f"{A}.tuned"] - laws["small"])[token]),
    "unlearn": lambda laws, token: -3.0 * max(0.0, float((laws[f"{A}.tuned"] - laws["base"])[token])),
    "upscale": lambda laws, token: 1.7 * float((laws["base"] - laws["small"])[token]),
    "edit": lambda laws, token: 0.7 * float((laws[f"{A}.tuned"] - laws["small"])[token]),
}


@dataclass
class Family:
    """Models in the engine, the same as plain Hugging Face ones, and a prompt."""

    engine: Engine
    plain: dict[str, PreTrainedModel]
    prompt: list[int]

    @property
    def width(self) -> int:
        return self.engine.models.base.vocabulary.size

    @torch.inference_mode()
    def law(self, lane: str, ids: list[int]) -> Tensor:
        logits = self.plain[lane.partition("@")[0]](torch.tensor([ids]), use_cache=False).logits[
            0, -1, : self.width
        ]
        return torch.log_softmax(logits.double(), dim=0)

    def laws(self, output: list[int]) -> dict[str, Tensor]:
        laws = {lane: self.law(lane, [*self.prompt, *output]) for lane in self.plain}
        laws["base@negative"] = self.law("base", [*self.prompt[-NEGATIVE:], *output])
        return laws


def plain_model(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def make_engine(models: ModelSet) -> Engine:
    points = tuple(
        CalibrationPoint(*point) for point in ((0.0, 1.0, 1.0), (0.7, 1.0, 1.005), (1.0, 1.0, 2.0))
    )
    config = EngineConfig(kv_memory=2**26, max_batch_tokens=96)
    return Engine(models, config, calibrations={A: Calibration(A, points)})


@pytest.fixture(scope="module")
def tiny(tiny_family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Random models with heads scaled up, so that laws are peaked and rules bite."""
    folders = {"base": tiny_family.base, "small": tiny_family.untuned}
    folders |= {f"{name}.tuned": tiny_family.experts[name] for name in (A, B)}
    sharp = {lane: sharpen(folder, tmp_path_factory.mktemp(lane)) for lane, folder in folders.items()}
    experts = [ExpertSource(name, sharp[f"{name}.tuned"], sharp["small"]) for name in (A, B)]
    models = load_family(sharp["base"], experts, base_name="atlas")
    plain = {lane: plain_model(folder) for lane, folder in sharp.items()}
    return Family(make_engine(models), plain, [7, 11, 300, 42, 5, 23, 90])


def sharpen(folder: Path, into: Path) -> Path:
    target = into / "small"  # an untuned model is called after its folder
    shutil.copytree(folder, target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def demo() -> Family:
    paths = family_paths()
    folders = {"base": paths.base, "small": paths.untuned}
    folders |= {f"{name}.tuned": paths.experts[name] for name in (A, B)}
    experts = [ExpertSource(name, paths.experts[name], paths.untuned) for name in (A, B)]
    models = load_family(paths.base, experts)
    prompt = models.base.tokenizer.encode("Task: Where was Kustin born?\nReply:")
    return Family(
        make_engine(models), {lane: plain_model(folder) for lane, folder in folders.items()}, prompt
    )


@pytest.fixture(params=["tiny", "demo"])
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.getfixturevalue(request.param)
    return found


def answer_all(family: Family, names: list[str]) -> dict[str, Collected]:
    return run(
        family.engine,
        [
            submission(
                name,
                family.prompt,
                fusion=parse_fusion({**RULES[name][0], "explain": 2}),
                by_lane={"base@negative": family.prompt[-NEGATIVE:]},
                max_tokens=STEPS,
                logprobs=5,
            )
            for name in names
        ],
    )


#: Of float32 models (up to 3e-5 of a logit) that a rule weighs by two, or solves a weight from.
ROUNDING = 2e-4


def test_every_rule_is_its_papers_formula(family: Family) -> None:
    results = answer_all(family, list(RULES))
    first: list[Tensor] = []
    for name, (_, paper) in RULES.items():
        result = results[f"{name}/0"]
        output: list[int] = []
        for token, logprob, explanation in zip(
            result.tokens, result.logprobs, result.explanations, strict=True
        ):
            laws = family.laws(output)
            law = paper(laws, len(output))
            ranked = law.sort(descending=True)
            if token != int(ranked.indices[0]):
                assert float(ranked.values[0] - law[token]) < 1e-4, (name, "another greedy token")
            for listed, value in ((token, logprob.logprob), *logprob.top):
                assert value == pytest.approx(float(law[listed]), abs=ROUNDING), (name, len(output))
            assert explanation.kl == pytest.approx(papers.kl(law, laws["base"]), abs=1e-4, rel=1e-3), name
            assert explanation.flip == (int(laws["base"].argmax()) != token), name
            if name in PUSHES:
                expected = PUSHES[name](laws, token)
                assert explanation.push == pytest.approx({A: expected}, abs=ROUNDING), name
            if not output:
                first.append(law.clamp(min=-40.0))
            output.append(token)
        assert len(output) == STEPS
    for number, law in enumerate(first):
        for other in first[:number]:
            assert float((law - other).abs().max()) > 0.01, "rules that do the same prove nothing"


def test_alone_and_in_the_crowd(tiny: Family) -> None:
    crowd = answer_all(tiny, list(RULES))
    for name in ("upscale", "dynamic", "guidance", "mixture, harmonic", "contrast"):
        alone = answer_all(tiny, [name])[f"{name}/0"]
        assert alone.tokens == crowd[f"{name}/0"].tokens
        for one, other in zip(alone.logprobs, crowd[f"{name}/0"].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def first_law(family: Family, fusion: dict[str, Any], **more: Any) -> tuple[dict[int, float], Collected]:
    """The 20 likeliest first tokens of a fusion."""
    wanted = submission("x", family.prompt, fusion=parse_fusion(fusion), max_tokens=2, logprobs=20, **more)
    result = run(family.engine, [wanted])["x/0"]
    return dict(result.logprobs[0].top), result


def same_law(one: dict[int, float], other: dict[int, float], tolerance: float = 1e-4) -> bool:
    common = one.keys() & other.keys()
    return len(common) >= 18 and all(abs(one[token] - other[token]) <= tolerance for token in common)


def test_formulas_equal_the_rules_they_spell(tiny: Family) -> None:
    short = {"base@short": tiny.prompt[-NEGATIVE:], "base@negative": tiny.prompt[-NEGATIVE:]}
    prompts = {"base@short": {"tokens": tiny.prompt[-NEGATIVE:]}}
    spelled: list[tuple[dict[str, Any], str]] = [
        ({"experts": {A: 0.8, B: -0.5}}, f"base + 0.8*{A} - 0.5*({B}.tuned - {B}.untuned)"),
        ({"rule": "arm", "experts": {A: 0.4}}, f"base + 0.4*{A}.tuned"),
        ({"rule": "guidance", "scale": 2, "negative_prompt": "x"}, "2*base - base@short"),
        ({"rule": "contrast", "experts": {A: 1}, "gamma": 0.5, "alpha": 0}, f"{A}.tuned - small/2"),
        ({"rule": "upscale", "experts": {A: 1}, "beta": 2}, f"{A}.tuned + 2*(base - small)"),
    ]
    for rule, text in spelled:
        fusion: dict[str, Any] = {"rule": "formula", "formula": text}
        if "@" in text:
            fusion["prompts"] = prompts
        one, _ = first_law(tiny, rule, by_lane=short)
        other, _ = first_law(tiny, fusion, by_lane=short)
        assert same_law(one, other), text


def test_identities(tiny: Family) -> None:
    base, _ = first_law(tiny, {})
    still, result = first_law(tiny, {"rule": "guidance", "scale": 1, "negative_prompt": "x"})
    assert same_law(base, still, 0.0)
    assert result.last is not None and result.last.usage is not None
    assert set(result.last.usage.lane_tokens) == {"atlas"}, "the negative prompt did not run"
    lifted, _ = first_law(tiny, {"rule": "upscale", "experts": {A: 1}})
    proxied, _ = first_law(tiny, {"experts": {A: 1}})
    assert same_law(lifted, proxied)
    models = {"base": 0.4, f"{A}.tuned": 0.6}
    product, _ = first_law(tiny, {"rule": "mixture", "models": models, "r": 0})
    gaps = []
    for r in (0.08, 0.04, 0.02, 0.01):
        mean, _ = first_law(tiny, {"rule": "mixture", "models": models, "r": r})
        gaps.append(max(abs(mean[token] - product[token]) for token in mean.keys() & product.keys()))
    assert all(later < 0.7 * earlier for earlier, later in pairwise(gaps)), "r to 0 tends to the product"
    nothing, result = first_law(tiny, {"rule": "dynamic", "mode": "budget", "kl": 0, "experts": {A: 1}})
    assert same_law(base, nothing)
    _, result = first_law(
        tiny, {"rule": "dynamic", "mode": "budget", "kl": 0.05, "experts": {A: 1}, "explain": 1}
    )
    for explanation in result.explanations:
        assert explanation.kl == pytest.approx(0.05, rel=1e-3) or explanation.weights[A] == 2.0


@pytest.fixture(scope="module")
def twins(tiny_family: TinyFamily) -> Iterator[Engine]:
    """An expert whose untuned model is the base, and one whose tuned model is its untuned one."""
    models = load_family(
        tiny_family.base,
        [
            ExpertSource("same", tiny_family.experts[A], tiny_family.base),
            ExpertSource("idle", tiny_family.untuned, tiny_family.untuned),
        ],
        base_name="atlas",
    )
    yield make_engine(models)


@pytest.mark.parametrize("match", ["both", "forward", "reverse"])
def test_a_base_that_is_the_untuned_model_has_weight_one(twins: Engine, match: str) -> None:
    fusion = parse_fusion({"rule": "dynamic", "experts": {"same": 1}, "match": match, "explain": 1})
    result = run(twins, [submission("x", [5, 6, 7, 8], fusion=fusion, max_tokens=6)])["x/0"]
    for explanation in result.explanations:
        assert explanation.weights["same"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("weight", [-4.0, 0.5, 4.0])
def test_an_expert_that_learned_nothing_changes_nothing(twins: Engine, weight: float) -> None:
    wishes = [
        submission("plain", [5, 6, 7, 8], logprobs=5),
        submission("fused", [5, 6, 7, 8], {"idle": weight}, logprobs=5),
    ]
    results = run(twins, wishes)
    assert results["plain/0"].tokens == results["fused/0"].tokens
    for one, other in zip(results["plain/0"].logprobs, results["fused/0"].logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
