"""Fused log-probs of given texts against plain Hugging Face forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from proxyserve.api.presets import parse_fusion
from proxyserve.engine.submission import LanePrompts
from proxyserve.errors import InvalidRequest
from proxyserve.evaluation import likelihood
from proxyserve.evaluation.likelihood import Likelihood
from proxyserve.fusion.catalog import Catalog
from proxyserve.models.family import ExpertSource, load_family
from tests.fusion import papers
from tests.tiny import TinyFamily

PROMPT, TEXT = (7, 11, 300), (42, 5, 23, 90, 8, 8, 61)
NEGATIVE = (9, 10)

RULES: list[tuple[dict[str, Any], Callable[[papers.Laws, int], Tensor]]] = [
    ({}, lambda laws, _: laws["base"]),
    (
        {"experts": {"qa": {"weight": 2, "schedule": [[0, 1], [3, -0.5]]}}},
        lambda laws, t: papers.proxy(laws["base"], (2 if t < 3 else -1, laws["qa"], laws["small"])),
    ),
    (
        {"rule": "dynamic", "experts": {"qa": 1}},
        lambda laws, _: papers.dynamic(laws["base"], [(laws["qa"], laws["small"])], (1.0,), "both", 2.0)[0],
    ),
    (
        {"rule": "guidance", "negative_prompt": "x", "scale": 3},
        lambda laws, _: papers.guidance(laws["base"], laws["negative"], 3.0),
    ),
    (
        {"rule": "mixture", "models": {"qa.tuned": 0.5, "small": 0.5}, "r": -1},
        lambda laws, _: papers.mixture(-1, (0.5, laws["qa"]), (0.5, laws["small"])),
    ),
    (
        {"experts": {"qa": 1}, "support": {"of": ["base"], "top_k": 300}},
        lambda laws, _: papers.masked(
            laws["base"] + laws["qa"] - laws["small"], papers.best(laws["base"], 300)
        ),
    ),
]


@pytest.fixture(scope="module")
def catalog(tiny_family: TinyFamily) -> Catalog:
    """Models of their own: those of the other tests are attached to engines."""
    source = ExpertSource("qa", tiny_family.experts["qa"], tiny_family.untuned)
    return Catalog(load_family(tiny_family.base, [source], base_name="atlas"))


@torch.inference_mode()
def all_laws(family: TinyFamily, width: int) -> list[dict[str, Tensor]]:
    """Per token of the text."""
    folders = {"base": family.base, "qa": family.experts["qa"], "small": family.untuned}
    laws: list[dict[str, Tensor]] = [{} for _ in TEXT]
    for name, folder in [*folders.items(), ("negative", family.base)]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        prompt = NEGATIVE if name == "negative" else PROMPT
        logits = model.eval()(torch.tensor([[*prompt, *TEXT]]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        for place, row in enumerate(logits):
            laws[place][name] = torch.log_softmax(row[:width].double(), dim=0)
    return laws


@pytest.mark.parametrize("chunk", [2, 128])
def test_every_token_has_its_fused_law(
    catalog: Catalog, tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    scorer = Likelihood(catalog)
    laws = all_laws(tiny_family, catalog.models.base.vocabulary.size)
    prompts = LanePrompts(PROMPT, {"base@negative": NEGATIVE})
    for fusion, paper in RULES:
        entries = scorer.explain(parse_fusion(fusion), prompts, TEXT, top=3)
        assert [entry.token_id for entry in entries] == list(TEXT)
        for place, entry in enumerate(entries):
            law = paper(laws[place], place)
            expected = float(law[TEXT[place]])
            if expected > -1e30:
                assert entry.fused.logprob == pytest.approx(expected, abs=1e-4), fusion
            for token, value in entry.fused.top:
                assert value == pytest.approx(float(law[token]), abs=1e-4)
            base = entry.lanes["base"]
            assert base.logprob == pytest.approx(float(laws[place]["base"][TEXT[place]]), abs=1e-4)
            assert entry.flip == (entry.fused.top[0][0] != base.top[0][0])
            assert entry.kl == pytest.approx(papers.kl(law, laws[place]["base"]), abs=1e-4, rel=1e-3)
        program = scorer.bind(parse_fusion(fusion), prompts)
        found = torch.cat([scorer.logprobs(program, part) for part in scorer.chunks(program, TEXT)])
        assert found.tolist() == [entry.fused.logprob for entry in entries]


def test_refusals(catalog: Catalog) -> None:
    scorer = Likelihood(catalog)
    with pytest.raises(InvalidRequest, match="context"):
        scorer.explain(parse_fusion({}), LanePrompts(PROMPT), (5,) * 1000)
    with pytest.raises(InvalidRequest, match="at least one"):
        scorer.explain(parse_fusion({}), LanePrompts(()), TEXT)
    with pytest.raises(InvalidRequest, match="gate"):
        scorer.explain(parse_fusion({"gate": {"confidence": 1}}), LanePrompts(PROMPT), TEXT)
    with pytest.raises(InvalidRequest, match="target_entropy"):
        scorer.explain(parse_fusion({"target_entropy": 1.0}), LanePrompts(PROMPT), TEXT)
