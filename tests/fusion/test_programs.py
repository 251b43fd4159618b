"""What rules compile to, and what a server's policy says of it. Names only; nothing is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from proxyserve.api.presets import parse_fusion
from proxyserve.errors import Forbidden, InvalidRequest, UnknownModel
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.names import catalog_of_names
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.fusion.program import Program, SupportMask, Term, WeightLaw
from proxyserve.fusion.weights import ExpertWeight, factor_at

PRESETS = {
    "soft": {"experts": {"qa": 0.5}},
    "spelled": {"rule": "formula", "formula": "2*base - soft"},
    "solved": {"rule": "dynamic", "experts": {"qa": 1}},
    "warm": {"experts": {"qa": 1}, "target_entropy": 1},
}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    presets = {name: parse_fusion(fusion) for name, fusion in PRESETS.items()}
    return catalog_of_names("atlas", {"qa": "small", "law": "small", "solo": None}, presets)


def compiled(catalog: Catalog, fusion: dict[str, Any]) -> Program:
    return parse_fusion(fusion).compile(catalog)


LANES: list[tuple[dict[str, Any], list[str], float]] = [
    ({}, ["base"], 1.0),
    ({"experts": {"qa": 0}}, ["base"], 1.0),
    ({"experts": {"qa": 1}}, ["base", "qa.tuned", "qa.untuned"], 1.0),
    ({"experts": {"qa": {"weight": 1, "schedule": [[0, 0]]}}}, ["base"], 1.0),
    (
        {"experts": {"qa": {"weight": 1, "schedule": [[0, 0], [9, 1]]}}},
        ["base", "qa.tuned", "qa.untuned"],
        1.0,
    ),
    ({"rule": "upscale", "experts": {"qa": 1}}, ["base", "qa.tuned", "qa.untuned"], 1.0),
    ({"rule": "upscale", "experts": {"qa": 1}, "beta": 0}, ["qa.tuned"], 1.0),
    ({"rule": "contrast", "experts": {"qa": 1}, "gamma": 0.5}, ["qa.tuned", "qa.untuned"], 0.5),
    ({"rule": "contrast", "experts": {"qa": 1}, "gamma": 0}, ["qa.tuned"], 1.0),
    ({"rule": "unlearn", "experts": {"solo": 1}}, ["base", "solo.tuned"], 1.0),
    ({"rule": "guidance", "negative_prompt": "x"}, ["base", "base@negative"], 1.0),
    ({"rule": "guidance", "negative_prompt": "x", "scale": 1}, ["base"], 1.0),
    ({"rule": "mixture", "models": {"small": 0.5, "atlas": 0.5, "qa.tuned": 0}}, ["base", "small"], 1.0),
    ({"rule": "arm", "experts": {"solo": 0.5, "qa": 0.25}}, ["base", "solo.tuned", "qa.tuned"], 1.75),
    ({"rule": "formula", "formula": "base + soft"}, ["base", "qa.tuned", "qa.untuned"], 2.0),
    ({"rule": "formula", "formula": "spelled"}, ["base", "qa.untuned", "qa.tuned"], 1.0),
    ({"rule": "formula", "formula": "qa.tuned@a - small/2"}, ["qa.tuned@a", "small"], 0.5),
    ({"support": {"of": ["qa.tuned", "fused"], "top_k": 3}}, ["base", "qa.tuned"], 1.0),
    (
        {"experts": {"qa": 1}, "support": {"of": ["tuned"], "top_k": 3}},
        ["base", "qa.tuned", "qa.untuned"],
        1.0,
    ),
]


@pytest.mark.parametrize(("fusion", "lanes", "total"), LANES, ids=str)
def test_lanes_and_sum_of_weights(
    catalog: Catalog, fusion: dict[str, Any], lanes: list[str], total: float
) -> None:
    program = compiled(catalog, fusion)
    assert sorted(program.lanes) == sorted(lanes)
    assert "base" not in lanes or program.lanes[0] == "base"
    assert program.sum_of_weights == pytest.approx(total)
    assert f"sum of weights  {total:g}" in program.describe()


REFUSED: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    ({"experts": {"ghost": 1}}, UnknownModel, "fusion.experts.ghost", "no expert"),
    ({"experts": {"solo": 1}}, InvalidRequest, "fusion.experts.solo", "without an untuned"),
    (
        {"rule": "mixture", "models": {"solo.untuned": 1}},
        UnknownModel,
        "fusion.models.solo.untuned",
        "no model",
    ),
    (
        {"rule": "mixture", "models": {"base": 0.5, "atlas": 0.5}},
        InvalidRequest,
        "fusion.models.atlas",
        "twice",
    ),
    ({"rule": "mixture", "models": {"base@!": 1}}, InvalidRequest, "fusion.models.base@!", "prompt"),
    ({"rule": "formula", "formula": "base + ghost"}, UnknownModel, "fusion.formula", "character 8"),
    ({"rule": "formula", "formula": "base + solved"}, InvalidRequest, "fusion.formula", "no plain sum"),
    ({"rule": "formula", "formula": "base + warm"}, InvalidRequest, "fusion.formula", "no plain sum"),
    (
        {"rule": "formula", "formula": "qa - qa.tuned + qa.untuned"},
        InvalidRequest,
        "fusion.formula",
        "cancel",
    ),
    ({"rule": "edit", "experts": {"qa": 1}}, InvalidRequest, "fusion.experts.qa", "calibration"),
    (
        {
            "rule": "mixture",
            "models": {"base": 1},
            "support": {"of": ["base"], "top_k": 1, "outside": "base"},
        },
        InvalidRequest,
        "fusion.support.outside",
        "mask",
    ),
    (
        {"support": {"of": ["base", "qa.tuned", "qa.untuned", "small", "law.tuned"], "top_k": 1}},
        InvalidRequest,
        "fusion.support.of",
        "at most 4",
    ),
]


@pytest.mark.parametrize(("fusion", "kind", "param", "words"), REFUSED, ids=str)
def test_what_does_not_compile(
    catalog: Catalog, fusion: dict[str, Any], kind: type[Exception], param: str, words: str
) -> None:
    with pytest.raises(kind, match=words) as refusal:
        compiled(catalog, fusion)
    assert refusal.value.param == param  # type: ignore[attr-defined]


def test_presets_in_a_circle() -> None:
    presets = {
        "a": parse_fusion({"rule": "formula", "formula": "base + b"}),
        "b": parse_fusion({"rule": "formula", "formula": "0.5*a"}),
    }
    with pytest.raises(InvalidRequest, match="a -> b -> a"):
        presets["b"].compile(catalog_of_names("atlas", {}, {**presets}))
    with pytest.raises(InvalidRequest, match="made of itself"):
        presets["a"].compile(catalog_of_names("atlas", {}, presets))


def test_programs_that_contradict_themselves() -> None:
    pair = Term("a", "b", 1.0)
    with pytest.raises(ValueError, match="single lanes"):
        Program("base", terms=(pair,), power=1.0)
    with pytest.raises(ValueError, match="plain sums"):
        Program("base", law=WeightLaw("both", 2.0))
    with pytest.raises(ValueError, match="plain sum"):
        Program("base", terms=(pair,), support=SupportMask(("base",))).coefficients()
    assert Program("base", 0.5, (pair, Term("a", None, 0.25))).coefficients() == {
        "base": 0.5,
        "a": 1.25,
        "b": -1.0,
    }


def test_schedules() -> None:
    schedule = ((0, 1.0), (3, 0.5), (10, -2.0))
    assert [factor_at(schedule, token) for token in (0, 2, 3, 9, 10, 1000)] == [
        1.0,
        1.0,
        0.5,
        0.5,
        -2.0,
        -2.0,
    ]
    assert factor_at((), 5) == 1.0
    assert Term("a", None, 2.0, schedule).extremes == (-4.0, 2.0)
    for bad in (((1, 1.0),), ((0, 1.0), (0, 2.0)), ((0, float("nan")),), tuple((n, 1.0) for n in range(65))):
        with pytest.raises(InvalidRequest, match="schedule"):
            ExpertWeight("qa", 1.0, bad)


def check(catalog: Catalog, policy: FusionPolicy, fusion: dict[str, Any], **who: bool) -> None:
    parsed = parse_fusion(fusion)
    policy.check(parsed, parsed.compile(catalog), **{"admin": False, **who})


@pytest.mark.parametrize(
    "fusion",
    [
        {"experts": {"qa": 1.5}},
        {"experts": {"qa": -0.5}},
        {"experts": {"qa": {"weight": 0.5, "schedule": [[0, 1], [4, 3]]}}},
        {"rule": "arm", "experts": {"qa": 2}},
        {"rule": "formula", "formula": "base + 1.5*qa"},
        {"rule": "dynamic", "experts": {"qa": 1}},
    ],
    ids=str,
)
def test_the_range_of_weights(catalog: Catalog, fusion: dict[str, Any]) -> None:
    policy = FusionPolicy(0.0, 1.0)
    with pytest.raises(InvalidRequest, match="this server allows"):
        check(catalog, policy, fusion, admin=True)
    if "dynamic" not in str(fusion):
        check(catalog, policy, fusion, vetted=True)
    check(catalog, FusionPolicy(), fusion)


def test_what_the_range_does_not_concern(catalog: Catalog) -> None:
    policy = FusionPolicy(0.0, 1.0)
    for fusion in (
        {"rule": "unlearn", "experts": {"qa": 1}, "alpha": 5},
        {"rule": "contrast", "experts": {"qa": 1}, "gamma": 2},
        {"rule": "guidance", "negative_prompt": "x", "scale": 9},
        {"rule": "dynamic", "experts": {"qa": 1}, "max_weight": 1},
    ):
        check(catalog, policy, fusion)


def test_protected_experts(catalog: Catalog) -> None:
    policy = FusionPolicy(protected=frozenset({"qa"}), explain_to_all=True)
    for fusion in (
        {"experts": {"qa": -1}},
        {"rule": "unlearn", "experts": {"qa": 1}},
        {"rule": "formula", "formula": "base - 0.1*qa.tuned"},
        {"rule": "formula", "formula": "base + law - soft"},
    ):
        with pytest.raises(Forbidden, match="protected"):
            check(catalog, policy, fusion)
        check(catalog, policy, fusion, admin=True)
        check(catalog, policy, fusion, vetted=True)
    for fusion in ({"experts": {"qa": 1, "law": -1}}, {"rule": "contrast", "experts": {"qa": 1}}):
        check(catalog, policy, fusion)


def test_explanations_and_counts(catalog: Catalog) -> None:
    with pytest.raises(Forbidden, match="administrators") as refusal:
        check(catalog, FusionPolicy(), {"explain": 1})
    assert refusal.value.param == "fusion.explain"
    with pytest.raises(Forbidden):
        check(catalog, FusionPolicy(), {"explain": 1}, vetted=True)
    check(catalog, FusionPolicy(), {"explain": 1}, admin=True)
    check(catalog, FusionPolicy(explain_to_all=True), {"explain": 20})
    with pytest.raises(InvalidRequest, match="at most 20"):
        check(catalog, FusionPolicy(), {"explain": 21}, admin=True)
    with pytest.raises(InvalidRequest, match="allows 1") as refused:
        check(catalog, FusionPolicy(max_experts=1), {"experts": {"qa": 1, "law": 1}})
    assert refused.value.param == "fusion.experts"
    with pytest.raises(ValueError, match="contain 0"):
        FusionPolicy(0.5, 1.0)
