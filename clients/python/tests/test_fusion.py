import math

import pytest

from proxyserve_client import ExpertWeight, Fusion


def test_builder_gives_the_request_object() -> None:
    fusion = Fusion.proxy(qa=0.8, record=1.0)
    assert fusion == Fusion((ExpertWeight("qa", 0.8), ExpertWeight("record", 1.0)))
    assert fusion.to_dict() == {"rule": "proxy", "experts": {"qa": 0.8, "record": 1.0}}
    assert fusion.extra_body() == {"fusion": fusion.to_dict()}


def test_names_that_are_not_python_names_go_in_a_mapping() -> None:
    assert Fusion.proxy({"qa-v2": 0.5}, record=-1).to_dict()["experts"] == {"qa-v2": 0.5, "record": -1}


def test_prompts_are_sent_only_where_set() -> None:
    fusion = Fusion.proxy(qa=1.0).with_prompts({"base": "plain", "qa.tuned": "chat"})
    assert fusion.to_dict()["prompts"] == {"base": "plain", "qa.tuned": "chat"}
    assert "prompts" not in Fusion.proxy(qa=1.0).to_dict()


def test_objects_do_not_change_with_what_they_were_made_from() -> None:
    prompts = {"base": "plain"}
    fusion = Fusion.proxy(qa=1.0).with_prompts(prompts)
    prompts["base"] = "chat"
    assert fusion.prompts == {"base": "plain"}


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(ValueError, match="'qa' must be finite"):
        Fusion.proxy(qa=weight)


def test_an_expert_has_one_weight_and_a_name() -> None:
    with pytest.raises(ValueError, match="one weight"):
        Fusion.proxy({"qa": 1.0}, qa=0.5)
    with pytest.raises(ValueError, match="must not be empty"):
        ExpertWeight("")


@pytest.mark.parametrize(
    ("fusion", "name"),
    [
        (Fusion(), "atlas"),
        (Fusion.proxy(qa=0.8), "atlas+qa:0.8"),
        (Fusion.proxy(qa=1.0, record=-0.5), "atlas+qa:1.0+record:-0.5"),
    ],
)
def test_model_names(fusion: Fusion, name: str) -> None:
    assert fusion.model_name("atlas") == name


def test_what_a_model_name_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts"):
        Fusion.proxy(qa=1.0).with_prompts({"base": "plain"}).model_name("atlas")
    with pytest.raises(ValueError, match=r"'a\+b' cannot"):
        Fusion.proxy({"a+b": 1.0}).model_name("atlas")


@pytest.mark.parametrize(
    ("fusion", "body"),
    [
        (Fusion.upscale("qa", beta=1.5), {"rule": "upscale", "experts": {"qa": 1}, "beta": 1.5}),
        (Fusion.dynamic("qa", kl=0.5), {"rule": "dynamic", "experts": {"qa": 1}, "kl": 0.5}),
        (Fusion.dynamic({"qa": 1, "bio": 2}), {"rule": "dynamic", "experts": {"qa": 1, "bio": 2}}),
        (Fusion.contrast("qa", alpha=0.0), {"rule": "contrast", "experts": {"qa": 1}, "alpha": 0.0}),
        (Fusion.unlearn("qa"), {"rule": "unlearn", "experts": {"qa": 1}}),
        (Fusion.guidance((1, 2), scale=2), {"rule": "guidance", "negative_prompt": [1, 2], "scale": 2}),
        (
            Fusion.guidance(negative_messages=({"role": "user", "content": "no"},)),
            {"rule": "guidance", "negative_messages": [{"role": "user", "content": "no"}]},
        ),
        (Fusion.mixture({"base": 1}, r="inf"), {"rule": "mixture", "models": {"base": 1}, "r": "inf"}),
        (Fusion.arm({"a-b": 0.5}, qa=1), {"rule": "arm", "experts": {"a-b": 0.5, "qa": 1}}),
        (Fusion.edit("qa", budget=0.1), {"rule": "edit", "experts": {"qa": 1}, "budget": 0.1}),
        (Fusion.formula("base + qa"), {"rule": "formula", "formula": "base + qa"}),
    ],
    ids=lambda value: value.rule if isinstance(value, Fusion) else "",
)
def test_builders(fusion: Fusion, body: dict[str, object]) -> None:
    assert fusion.to_dict() == body


def test_builders_refuse_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="'beta' must be finite"):
        Fusion.upscale("qa", beta=math.nan)
    with pytest.raises(ValueError, match="one of them"):
        Fusion.guidance()
    with pytest.raises(ValueError, match="one of them"):
        Fusion.guidance("no", negative_messages=[{"role": "user", "content": "no"}])


def test_rules_of_newer_servers_can_be_asked_for() -> None:
    lifted = Fusion.of_rule("upscale", {"qa": 1}, beta=1.5).with_parameters(explain=2)
    assert lifted.to_dict() == {"rule": "upscale", "experts": {"qa": 1}, "beta": 1.5, "explain": 2}
    guided = Fusion.of_rule("guidance", negative_prompt="no", scale=2)
    assert guided.to_dict() == {"rule": "guidance", "negative_prompt": "no", "scale": 2}
    scheduled = Fusion((ExpertWeight("qa", 0.5, ((0, 1.0), (32, 0.25))),))
    assert scheduled.to_dict()["experts"] == {"qa": {"weight": 0.5, "schedule": [[0, 1.0], [32, 0.25]]}}
    for fusion in (lifted, guided, scheduled):
        with pytest.raises(ValueError, match="send the fusion object"):
            fusion.model_name("atlas")
