"""Gates: the base decides alone where it is sure, the experts' lanes catch up where it is not."""

from __future__ import annotations

from collections.abc import Iterator
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
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.model_set import ModelSet
from tests.engine.driver import run, submission

PROMPTS = ("Task: Where was Kustin born?\nReply:", "Text: Kustin\n", "Once upon a time there was")
CONFIDENCES = (0.0, 0.3, 0.6, 0.9, 1.0)
STEPS = 10
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"kv_memory": 2**26},
    "no cache": {"kv_memory": 2**26, "prefix_cache": False},
    "preempted, in chunks": {"kv_memory": 600_000, "block_size": 4, "max_batch_tokens": 24, "max_batch": 8},
}


def gated(expert: str, confidence: float) -> dict[str, Any]:
    return {"experts": {expert: 1}, "gate": {"confidence": confidence}, "explain": 1}


@pytest.fixture(scope="module")
def models() -> Iterator[ModelSet]:
    """The demo family: its base is sure at some positions and not at others."""
    family = family_paths()
    yield load_family(
        family.base, [ExpertSource(name, family.experts[name], family.untuned) for name in ("qa", "bio")]
    )


class Simulation:
    """The gate by plain Hugging Face forwards."""

    def __init__(self, width: int) -> None:
        family = family_paths()
        self.width = width
        self.base = self._load(family.base)
        self.untuned = self._load(family.untuned)
        self.tuned = {name: self._load(family.experts[name]) for name in ("qa", "bio")}

    @staticmethod
    def _load(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def law(self, model: PreTrainedModel, ids: list[int]) -> Tensor:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, : self.width]
        return torch.log_softmax(logits.double(), dim=0)

    def answer(self, prompt: list[int], expert: str, confidence: float) -> list[tuple[int, float, bool]]:
        """(token, its log-prob, whether the base decided alone) per position."""
        ids, found = list(prompt), []
        for _ in range(STEPS):
            law = self.law(self.base, ids)
            sure = float(law.max().exp()) >= confidence
            if not sure:
                delta = self.law(self.tuned[expert], ids) - self.law(self.untuned, ids)
                law = torch.log_softmax(law + delta, dim=0)
            token = int(law.argmax())
            found.append((token, float(law[token]), sure))
            ids.append(token)
        return found


@pytest.fixture(scope="module")
def simulation(models: ModelSet) -> Simulation:
    return Simulation(models.base.vocabulary.size)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_as_simulated(models: ModelSet, simulation: Simulation, config: str) -> None:
    engine = Engine(models, EngineConfig(**CONFIGS[config]))
    prompts = [models.base.tokenizer.encode(text) for text in PROMPTS]
    cases = [(p, e, c) for p in range(len(PROMPTS)) for e in ("qa", "bio") for c in CONFIDENCES]
    wishes = [
        submission(
            f"{p}-{e}-{c}", prompts[p], fusion=parse_fusion(gated(e, c)), n=2, max_tokens=STEPS, logprobs=1
        )
        for p, e, c in cases
    ]
    wishes.append(submission("ungated", prompts[1], {"qa": 1.0}, max_tokens=STEPS))
    results = run(engine, wishes)
    for p, e, c in cases:
        first, second = results[f"{p}-{e}-{c}/0"], results[f"{p}-{e}-{c}/1"]
        expected = simulation.answer(prompts[p], e, c)
        assert first.tokens == second.tokens == [token for token, _, _ in expected]
        assert [entry.logprob for entry in first.logprobs] == pytest.approx(
            [v for _, v, _ in expected], abs=1e-4
        )
        assert [entry.gated for entry in first.explanations] == [sure for _, _, sure in expected]
        assert first.last is not None and first.last.usage is not None
        usage = first.last.usage
        assert usage.gated_tokens == sum(sure for _, _, sure in expected)
        skipped = usage.skipped_lane_tokens or {}
        last_fused = max((place for place, (_, _, sure) in enumerate(expected) if not sure), default=None)
        if last_fused is None:
            assert usage.lane_tokens[f"{e}.tuned"] == 0
            # Less where a prefix came from the cache when the request was started again.
            assert 0 < skipped[f"{e}.tuned"] <= len(prompts[p]) + STEPS - 1
        else:
            assert skipped.get(f"{e}.tuned", 0) == STEPS - 1 - last_fused
    if config == "preempted, in chunks":
        assert engine.counters.preemptions > 10, "this configuration is meant to run dry"


def test_sure_and_unsure_both_occur(models: ModelSet, simulation: Simulation) -> None:
    """Otherwise the test above shows little."""
    prompt = models.base.tokenizer.encode(PROMPTS[1])
    decided = [sure for _, _, sure in simulation.answer(prompt, "bio", 0.6)]
    assert True in decided and False in decided


@pytest.mark.slow
def test_nudging_is_a_gate_before_one_tuned_model(models: ModelSet, simulation: Simulation) -> None:
    """Where the base is unsure the tuned model writes the token, otherwise the base does."""
    engine = Engine(models, EngineConfig(kv_memory=2**26))
    prompt = models.base.tokenizer.encode(PROMPTS[1])
    fusion = {"rule": "mixture", "models": {"bio.tuned": 1}, "gate": {"confidence": 0.6}, "explain": 1}
    wish = submission("x", prompt, fusion=parse_fusion(fusion), max_tokens=STEPS, logprobs=1)
    result = run(engine, [wish])["x/0"]
    ids = list(prompt)
    for token, logprob, explanation in zip(result.tokens, result.logprobs, result.explanations, strict=True):
        base = simulation.law(simulation.base, ids)
        sure = float(base.max().exp()) >= 0.6
        law = base if sure else simulation.law(simulation.tuned["bio"], ids)
        assert token == int(law.argmax())
        assert logprob.logprob == pytest.approx(float(law[token]), abs=1e-4)
        assert explanation.gated == sure
        ids.append(token)
    assert {entry.gated for entry in result.explanations} == {True, False}
    assert result.last is not None and result.last.fusion is not None
    assert result.last.fusion.mean_kl is not None, "the base runs, so that the two can be compared"


def test_cancelled_while_waiting_for_the_other_lanes(models: ModelSet) -> None:
    engine = Engine(models, EngineConfig(kv_memory=2**24))
    prompt = models.base.tokenizer.encode(PROMPTS[0])
    [key] = engine.submit(submission("x", prompt, fusion=parse_fusion(gated("qa", 1.0))))
    assert engine.step() == []
    assert engine.scheduler.running[0].awaiting
    engine.check()
    assert engine.cancel(key) is not None
    assert not engine.has_work and all(pool.in_use == 0 for pool in engine.pools.values())
    engine.check()


def test_a_gate_over_the_base_alone_has_nothing_to_skip(models: ModelSet) -> None:
    engine = Engine(models, EngineConfig(kv_memory=2**24))
    prompt = models.base.tokenizer.encode(PROMPTS[0])
    wishes = [
        submission("gated", prompt, fusion=parse_fusion({"gate": {"confidence": 0.1}})),
        submission("plain", prompt),
    ]
    results = run(engine, wishes)
    assert results["gated/0"].tokens == results["plain/0"].tokens
