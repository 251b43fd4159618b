"""An expert in any format answers as the same expert given as whole folders: the engine's fused log-probs against plain
Hugging Face forwards of those folders in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from proxyserve.api.presets import parse_fusion
from proxyserve.engine.engine import Engine
from proxyserve.engine.offer import Offer
from proxyserve.experts.loading import LoadedExpert
from proxyserve.models.loading import whole_model
from proxyserve.models.model_set import ModelSet
from tests.engine.driver import Collected, run, submission
from tests.experts.shelf import FAMILIES, Shelf, load_expert, make_engine, make_library, make_shelf
from tests.fusion import papers

PROMPTS = (
    (5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45),
    (7,),
    (300, 12, 77, 77, 77, 140, 9, 1, 350, 211, 6, 90, 91, 92, 93, 94, 95, 30, 31, 32, 33, 34, 35),
)
NEW_TOKENS = 8
#: Experts of the shelf that have an untuned model.
PAIRED = (
    *("folder", "lora", "rslora", "third", "diff", "scaled", "packed", "soup", "blend"),
    *("overbase", "cross", "plain"),
)


class Reference:
    """Laws of the twins' folders: one forward over a whole text per folder, float64, nothing of our engine."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._width = len(AutoTokenizer.from_pretrained(shelf.base))
        self._models: dict[Path, PreTrainedModel] = {}
        self._fused: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.inference_mode()
    def laws(self, folder: Path, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """Log-probs [len(output), width] of each next token of `output`."""
        if folder not in self._models:
            self._models[folder] = whole_model(
                AutoModelForCausalLM, folder, str(folder), dtype=torch.float64, attn_implementation="eager"
            ).eval()
        ids = torch.tensor([[*prompt, *output[:-1]]])
        logits = self._models[folder](ids, use_cache=False).logits[0, len(prompt) - 1 :, : self._width]
        return torch.log_softmax(logits, dim=1)

    def fused(self, name: str, output: Sequence[int]) -> Tensor:
        """Log-probs [len(output), width] of the fused law of a case."""
        place = (name, tuple(output))
        if place not in self._fused:
            self._fused[place] = self._compute(CASES[name], output)
        return self._fused[place]

    def _compute(self, case: Case, output: Sequence[int]) -> Tensor:
        laws: dict[str, Tensor] = {"base": self.laws(self.shelf.base, case.prompt, output)}
        for name in case.experts:
            twin = self.shelf.twins[name]
            for role, folder in (("tuned", twin.tuned), ("untuned", twin.untuned)):
                if folder is not None:
                    prompt = case.prompts.get(f"{name}.{role}", case.prompt)
                    laws[f"{name}.{role}"] = self.laws(folder, prompt, output)
        fused = []
        for position in range(len(output)):
            here = {name: law[position] for name, law in laws.items()}
            if case.rule == "arm":
                terms = [weight * here[f"{name}.tuned"] for name, weight in case.experts.items()]
                scores = here["base"] + torch.stack(terms).sum(0)
            else:
                pairs = [(here[f"{name}.tuned"], here[f"{name}.untuned"]) for name in case.experts]
                if case.rule == "dynamic":
                    scores, _ = papers.dynamic(here["base"], pairs, [1.0], "both", 2.0)
                else:
                    weighted = zip(case.experts.values(), pairs, strict=True)
                    scores = papers.proxy(here["base"], *((weight, *pair) for weight, pair in weighted))
            fused.append(torch.log_softmax(scores, dim=0))
        return torch.stack(fused)


@dataclass(frozen=True)
class Case:
    """A request. `prompts` are those of lanes that have their own."""

    rule: str
    experts: Mapping[str, float]
    prompt: tuple[int, ...]
    prompts: Mapping[str, tuple[int, ...]]

    def submission(self, name: str, **sampling: Any) -> Any:
        experts: Any = dict.fromkeys(self.experts, 1) if self.rule == "dynamic" else dict(self.experts)
        fusion = parse_fusion({"rule": self.rule, "experts": experts}) if experts else None
        return submission(
            name,
            self.prompt,
            fusion=fusion,
            by_lane=self.prompts,
            max_tokens=NEW_TOKENS,
            logprobs=5,
            **sampling,
        )


def make_cases() -> dict[str, Case]:
    """Every expert under every rule that it can take, several experts at once, and nobody, each with one of the prompts
    and some with prompts of their own for their lanes."""
    cases = {"nobody": Case("proxy", {}, PROMPTS[0], {})}
    for number, name in enumerate(PAIRED):
        prompt, own = PROMPTS[number % 3], PROMPTS[(number + 1) % 3]
        lanes = {f"{name}.tuned": own, f"{name}.untuned": own[:5]} if number % 2 else {}
        cases[f"{name} proxy"] = Case("proxy", {name: (0.8, -0.6, 1.3)[number % 3]}, prompt, lanes)
        cases[f"{name} dynamic"] = Case("dynamic", {name: 1.0}, prompt, lanes)
        cases[f"{name} arm"] = Case("arm", {name: 0.7}, own, {})
    cases["lone arm"] = Case("arm", {"lone": 0.5}, PROMPTS[0], {})
    cases["adapters"] = Case("proxy", {"lora": 0.7, "rslora": 0.4, "third": -0.3}, PROMPTS[2], {})
    cases["formats"] = Case(
        "proxy", {"folder": 0.3, "soup": 0.4, "lora": 0.5, "overbase": 0.6}, PROMPTS[0], {}
    )
    cases["twins"] = Case("proxy", {"folder": 0.3, "diff": 0.4}, PROMPTS[1], {})
    return cases


CASES = make_cases()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(make_shelf(tmp_path_factory.mktemp("llama"), "llama"))


def make(reference: Reference, names: Sequence[str] | None = None, **config: Any) -> Engine:
    shelf = reference.shelf
    library = make_library(shelf.base)
    return make_engine(
        library,
        [load_expert(library, name, shelf.specs[name], shelf.root) for name in names or shelf.specs],
        **config,
    )


def check(name: str, result: Collected, reference: Reference) -> None:
    """Each token is as good as the reference's best, and all log-probs are the reference's."""
    assert len(result.tokens) == NEW_TOKENS
    laws = reference.fused(name, result.tokens)
    for position, (got, law) in enumerate(zip(result.logprobs, laws, strict=True)):
        where = f"{name}, token {position}"
        assert got.logprob == pytest.approx(law[got.token_id].item(), abs=1e-4), where
        assert got.logprob == pytest.approx(law.max().item(), abs=1e-4), where
        for token, value in got.top:
            assert value == pytest.approx(law[token].item(), abs=1e-4), where
        best = law.topk(5).values.tolist()
        assert [value for _, value in got.top] == pytest.approx(best, abs=1e-4), where


def compare(engine: Engine, reference: Reference, names: Iterable[str] = CASES) -> dict[str, Collected]:
    """Cases in one batch."""
    results = run(engine, [CASES[name].submission(name) for name in names])
    for name in names:
        check(name, results[f"{name}/0"], reference)
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_of_every_family(family: str, tmp_path: Path) -> None:
    reference = Reference(make_shelf(tmp_path, family))
    engine = make(reference)
    compare(engine, reference)
    assert len(engine.residents.arenas) == 2  # that of the base, and one for all small models


@pytest.mark.parametrize("chunk", [17, 23, 512])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_chunks_and_cached_prefixes(llama: Reference, chunk: int, prefix_cache: bool) -> None:
    engine = make(llama, max_batch_tokens=chunk, prefix_cache=prefix_cache, block_size=4)
    compare(engine, llama)
    again = compare(engine, llama).values()  # with whatever the first left in the cache
    cached = [result.last.usage.cached_tokens for result in again if result.last and result.last.usage]
    assert (sum(cached) > 0) == prefix_cache


def test_preemption(llama: Reference) -> None:
    """Blocks so few that running requests must be thrown out to let others finish."""
    engine = make(llama, block_size=4, kv_memory=150_000)
    compare(engine, llama)
    assert engine.counters.preemptions > 0


def test_experts_that_come_and_go_while_requests_run(llama: Reference) -> None:
    """An engine begins with two experts, adopts others between steps, and drops the first when their requests have
    ended."""
    shelf, library = llama.shelf, make_library(llama.shelf.base)

    def bring(*names: str) -> dict[str, LoadedExpert]:
        return {name: load_expert(library, name, shelf.specs[name], shelf.root) for name in names}

    first, second = bring("lora", "diff"), bring("third", "overbase", "packed", "soup")
    engine = make_engine(library, list(first.values()))
    assert set(engine.models.experts) == set(first)
    results: dict[str, Collected] = {}

    def submit(experts: Iterable[str]) -> list[str]:
        names = [name for name in CASES if name.split()[0] in experts]
        for name in names:
            engine.submit(CASES[name].submission(name))
        return names

    def advance() -> None:
        for event in engine.step():
            results.setdefault(event.request_id, Collected()).add(event)
        engine.check()

    def offer(experts: Mapping[str, LoadedExpert]) -> None:
        current = engine.offers.current
        models = ModelSet(library.base, [loaded.expert for loaded in experts.values()])
        engine.offers.replace(Offer(replace(current.catalog, models=models), current.policy))

    names = submit(first)
    advance()
    for loaded in second.values():
        arenas = engine.residents.arenas  # all of these are of layouts that are here
        engine.adopt([(runner, arenas[runner.layout]) for runner in loaded.fresh], loaded.over_trunks)
    offer({**first, **second})
    names += submit(second)
    advance()
    offer(second)
    while engine.has_work:
        advance()
    for loaded in first.values():
        engine.drop(loaded.over_trunks, library.release(loaded))
    for name in names:
        check(name, results[name], llama)
    compare(engine, llama, [name for name in names if name.split()[0] in second])


def test_lanes_count_the_tokens_of_their_own_model(llama: Reference) -> None:
    """Every lane counts for its model's name, whatever weights it shares; lanes of one model and prompt are one."""
    engine = make(llama, prefix_cache=False)
    results = run(engine, [case.submission(name) for name, case in CASES.items()])
    untuned_of = {"overbase": "atlas", "cross": "other", "plain": "other"}
    for name, case in CASES.items():
        lanes = {("atlas", case.prompt)}
        for expert in case.experts:
            tuned, untuned = f"{expert}.tuned", f"{expert}.untuned"
            lanes.add((tuned, case.prompts.get(tuned, case.prompt)))
            if case.rule != "arm":
                lanes.add((untuned_of.get(expert, "small"), case.prompts.get(untuned, case.prompt)))
        expected: Counter[str] = Counter()
        for model, prompt in lanes:
            expected[model] += len(prompt) + NEW_TOKENS - 1
        last = results[f"{name}/0"].last
        assert last is not None and last.usage is not None
        assert last.usage.lane_tokens == dict(expected), name
        generations = {} if last.fusion is None else last.fusion.generations
        assert generations == dict.fromkeys(case.experts, 1)


def test_adapters_of_one_trunk_run_in_one_forward(llama: Reference) -> None:
    engine = make(llama, ("lora", "third", "rslora"))
    compare(engine, llama, ("lora proxy", "third proxy", "rslora proxy", "adapters", "nobody"))
    assert [key.name for key in engine.runners] == ["atlas", "small"]
    stats = engine.residents.stats["small"]
    assert set(stats.tokens) == {"small", "lora.tuned", "third.tuned", "rslora.tuned"}
    assert stats.forwards <= engine.counters.steps
