"""lm-evaluation-harness through our HTTP, unmodified: its scores, log-likelihoods, greedy flags and texts are those of
plain Hugging Face forwards of the demo family, fused by hand in float64."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from proxyserve.api.presets import parse_presets
from proxyserve.config import EngineConfig
from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import make_world
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.text.tokenizer import Tokenizer
from tests.api.live import Live, serve

pytestmark = pytest.mark.slow

MAX_WEIGHT = 2.0
DYNAMIC = {"rule": "dynamic", "experts": {"qa": 1}, "match": "forward", "max_weight": MAX_WEIGHT}
RUNS: list[dict[str, Any]] = [
    {"model": "atlas", "backend": "huggingface", "batch": 4, "concurrent": 1},
    {"model": "atlas+qa", "backend": "remote", "batch": 1, "concurrent": 1},
    {"model": "moving", "backend": "huggingface", "batch": 3, "concurrent": 2},
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    family = family_paths()
    experts = [ExpertSource("qa", family.experts["qa"], family.untuned)]
    models = load_family(family.base, experts, base_name="atlas")
    engine = AsyncEngine(
        Engine(
            models,
            EngineConfig(max_batch=16, max_batch_tokens=256, kv_memory=32 * 2**20, dtype="float32"),
            presets=parse_presets({"moving": json.dumps(DYNAMIC)}, {"atlas"}),
        )
    )
    engine.start()
    with serve(engine) as live:
        yield live
    engine.close()


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Questions with the right answer among those of other people; texts."""
    examples = SKILLS["qa"].examples(make_world().people[40:48])[::7]
    found = []
    for number, example in enumerate(examples):
        others = [other.answer for other in examples if other is not example][:2]
        choices = [*others[: number % 3], example.answer, *others[number % 3 :]]
        text = f"{example.prompt}{example.answer}\n"
        found.append({"question": example.prompt, "choices": choices, "gold": number % 3, "text": text})
    return found


class Reference:
    """Laws of `atlas`, of it with `qa`, and with `qa` at the weight that dynamic fusion finds."""

    def __init__(self) -> None:
        family = family_paths()
        self.tokenizer = Tokenizer.load(family.base)
        folders = (family.base, family.experts["qa"], family.untuned)
        self.models = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders
        ]
        self.known: dict[tuple[int, ...], list[Tensor]] = {}

    @torch.inference_mode()
    def three(self, ids: Sequence[int]) -> list[Tensor]:
        """Log-probs float64 [positions, width] of base, tuned and untuned."""
        key = tuple(ids)
        if key not in self.known:
            width, batch = self.tokenizer.vocabulary_size, torch.tensor([list(ids)])
            self.known[key] = [
                torch.log_softmax(model(batch).logits[0, :, :width].double(), dim=-1) for model in self.models
            ]
        return self.known[key]

    def laws(self, model: str, ids: Sequence[int]) -> Tensor:
        base, tuned, untuned = self.three(ids)
        if model == "atlas":
            return base
        if model == "atlas+qa":
            return torch.log_softmax(base + tuned - untuned, dim=-1)
        return torch.stack([moved(*rows) for rows in zip(base, tuned, untuned, strict=True)])

    def score(self, model: str, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        ids = [*context, *continuation]
        laws = self.laws(model, ids)[len(context) - 1 : -1]
        chosen = laws[range(len(continuation)), list(continuation)]
        return float(chosen.sum()), laws.argmax(dim=-1).tolist() == list(continuation)

    def text(self, model: str, prompt: str, max_tokens: int) -> str:
        ids, found = self.tokenizer.encode(prompt), []
        for _ in range(max_tokens):
            token = int(self.laws(model, [*ids, *found])[-1].argmax())
            if token in self.tokenizer.eos_ids:
                break
            found.append(token)
            if "\n" in self.tokenizer.decode(found):
                break
        return self.tokenizer.decode(found).partition("\n")[0]


def moved(base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
    """The law at the weight where KL(fused to base) is KL(tuned to untuned), or at the largest one, by bisection."""

    def at(weight: float) -> Tensor:
        return torch.log_softmax(base + weight * (tuned - untuned), dim=-1)

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum())

    goal, low, high = kl(tuned, untuned), 0.0, MAX_WEIGHT
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(at(middle), base) < goal else (low, middle)
    return at(high)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def found(live: Live, documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the harness says of each run, by model."""
    folder = tmp_path_factory.mktemp("harness")
    data, job, output = folder / "data.jsonl", folder / "job.json", folder / "found.json"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    job.write_text(
        json.dumps(
            {
                "url": f"{live.url}/v1/completions",
                "tokenizer": str(family_paths().base),
                "data": str(data),
                "output": str(output),
                "runs": RUNS,
            }
        )
    )
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, str(Path(__file__).with_name("harness.py")), str(job)]
    ended = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return {run["model"]: entry for run, entry in zip(RUNS, json.loads(output.read_text()), strict=True)}


@pytest.mark.parametrize("model", [run["model"] for run in RUNS])
def test_multiple_choice(
    model: str, found: Any, documents: list[dict[str, Any]], reference: Reference
) -> None:
    right, greedy = 0, []
    for number, document in enumerate(documents):
        context = reference.tokenizer.encode(document["question"])
        expected = []
        for choice in document["choices"]:
            whole = reference.tokenizer.encode(document["question"] + choice)
            expected.append(reference.score(model, context, whole[len(context) :]))
        samples = [pair for (pair,) in found[model]["samples"]["local_choice"][str(number)]]
        assert [score for score, _ in samples] == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert [flag for _, flag in samples] == [flag for _, flag in expected]
        right += max(range(3), key=lambda index: expected[index][0]) == document["gold"]
        greedy += [flag for _, flag in expected]
    assert found[model]["scores"]["local_choice"]["acc,none"] == pytest.approx(right / len(documents))
    if model == "atlas+qa":
        assert any(greedy) and not all(greedy), "the flag would show nothing"


@pytest.mark.parametrize("model", [run["model"] for run in RUNS])
def test_generation(model: str, found: Any, documents: list[dict[str, Any]], reference: Reference) -> None:
    matches = 0
    for number, document in enumerate(documents):
        ((text,),) = found[model]["samples"]["local_generation"][str(number)]
        assert text == reference.text(model, document["question"], 10)
        matches += text == document["choices"][document["gold"]]
    score = found[model]["scores"]["local_generation"]["exact_match,none"]
    assert score == pytest.approx(matches / len(documents))


@pytest.mark.parametrize("model", [run["model"] for run in RUNS])
def test_perplexity(model: str, found: Any, documents: list[dict[str, Any]], reference: Reference) -> None:
    """Of whole texts after the end-of-text token, which the harness puts before them."""
    (eos,) = reference.tokenizer.eos_ids
    total, words = 0.0, 0
    for number, document in enumerate(documents):
        ids = reference.tokenizer.encode(document["text"])
        expected, _ = reference.score(model, [eos], ids)
        ((score,),) = found[model]["samples"]["local_rolling"][str(number)]
        assert float(score) == pytest.approx(expected, abs=1e-4)
        total, words = total + expected, words + len(re.split(r"\s+", document["text"]))
    perplexity = found[model]["scores"]["local_rolling"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-total / words), rel=1e-4)
