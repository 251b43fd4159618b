"""The engine against plain Hugging Face forwards: same greedy tokens, same log-probs to 1e-4, whatever the engine does
inside."""

from __future__ import annotations

import pytest
import torch

from proxyserve.config import EngineConfig
from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import make_world
from proxyserve.engine.engine import Engine
from proxyserve.models.family import ExpertSource, load_family
from tests.engine.driver import run, submission
from tests.naive import NaiveFusion
from tests.tiny import ARCHITECTURES, TinyFamily, build_family

PROMPTS = (
    [5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45],
    [7],
    [300, 12, 77, 77, 77, 140, 9, 1, 350, 211, 6, 90, 91, 92, 93, 94, 95, 30, 31, 32, 33, 34, 35],
)
WEIGHTS = (
    {},
    {"qa": 1.0},
    {"qa": 0.0},
    {"record": -0.7},
    {"qa": 0.35, "record": 1.6},
    {"record": 1.6, "qa": 0.35},
)
NEW_TOKENS = 10


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return build_family(tmp_path_factory.mktemp(request.param), request.param)


def make_engine(family: TinyFamily, **config: object) -> Engine:
    models = load_family(
        family.base, [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    )
    values: dict[str, object] = {"max_batch": 16, "max_batch_tokens": 64, "kv_memory": 2**21, **config}
    return Engine(models, EngineConfig(**values))  # type: ignore[arg-type]


def make_naive(family: TinyFamily) -> NaiveFusion:
    return NaiveFusion(family.base, {name: (tuned, family.untuned) for name, tuned in family.experts.items()})


def compare(engine: Engine, naive: NaiveFusion) -> None:
    """A mixed batch with lanes of different prompts against the reference."""
    submissions, expected = [], {}
    width = engine.models.base.vocabulary.size
    for number, weights in enumerate(WEIGHTS):
        prompt = PROMPTS[number % len(PROMPTS)]
        other = PROMPTS[(number + 1) % len(PROMPTS)]
        by_lane = {"qa.tuned": other, "qa.untuned": other[:3]} if "qa" in weights else {}
        name = f"r{number}"
        submissions.append(
            submission(name, prompt, weights, by_lane=by_lane, max_tokens=NEW_TOKENS, logprobs=5)
        )
        expected[name] = naive.greedy({"base": prompt, **by_lane}, weights, NEW_TOKENS, width)
    for key, result in run(engine, submissions).items():
        reference = expected[key.split("/")[0]]
        assert result.tokens == reference.tokens, key
        for got, law in zip(result.logprobs, reference.laws, strict=True):
            assert got.logprob == pytest.approx(law[got.token_id].item(), abs=1e-4)
            best = law.topk(5).values
            assert torch.tensor([value for _, value in got.top]).double() == pytest.approx(best, abs=1e-4)
            for token, value in got.top:
                assert value == pytest.approx(law[token].item(), abs=1e-4)


def test_every_architecture(family: TinyFamily) -> None:
    compare(make_engine(family), make_naive(family))


@pytest.mark.parametrize("chunk", [17, 18, 23, 64, 512])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_chunk_size(tiny_family: TinyFamily, chunk: int, prefix_cache: bool) -> None:
    engine = make_engine(tiny_family, max_batch_tokens=chunk, prefix_cache=prefix_cache)
    naive = make_naive(tiny_family)
    compare(engine, naive)
    compare(engine, naive)  # the second time with whatever the first left in the cache


def test_demo_family() -> None:
    """The shipped models, each expert with its own prompt beside a base that sees plain text."""
    paths = family_paths()
    models = load_family(
        paths.base, [ExpertSource(name, tuned, paths.untuned) for name, tuned in paths.experts.items()]
    )
    engine = Engine(models, EngineConfig(kv_memory=2**25))
    naive = NaiveFusion(paths.base, {name: (tuned, paths.untuned) for name, tuned in paths.experts.items()})
    encode = models.base.tokenizer.encode
    prompts_of = {name: encode(skill.examples(make_world().test)[0].prompt) for name, skill in SKILLS.items()}
    question = prompts_of["qa"]
    requests = {
        "record": ({"base": prompts_of["record"]}, {"record": 1.0}),
        "bio": ({"base": prompts_of["bio"]}, {"bio": 1.0}),
        "several": ({"base": question}, {"qa": 0.8, "guard": 0.4}),
        "plain": ({"base": question}, {}),
        "routed": ({"base": question[2:], "qa.tuned": question}, {"qa": 1.0}),
    }
    submissions = [
        submission(name, prompts["base"], weights, by_lane=prompts, max_tokens=24, logprobs=0)
        for name, (prompts, weights) in requests.items()
    ]
    results = run(engine, submissions)
    for name, (prompts, weights) in requests.items():
        expected = naive.greedy(prompts, weights, 24, models.base.vocabulary.size)
        assert results[f"{name}/0"].tokens == expected.tokens, name
        for got, law in zip(results[f"{name}/0"].logprobs, expected.laws, strict=True):
            assert got.logprob == pytest.approx(law[got.token_id].item(), abs=1e-4)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_every_block_size(tiny_family: TinyFamily, block_size: int) -> None:
    compare(make_engine(tiny_family, block_size=block_size), make_naive(tiny_family))


def test_preemption_does_not_change_the_answer(tiny_family: TinyFamily) -> None:
    """Pools so small that running requests must be thrown out to let others finish."""
    engine = make_engine(tiny_family, block_size=4, kv_memory=120_000)
    compare(engine, make_naive(tiny_family))
    assert engine.counters.preemptions > 0


def test_prefix_cache_is_used(tiny_family: TinyFamily) -> None:
    engine = make_engine(tiny_family, block_size=4)
    first = run(engine, [submission("a", PROMPTS[2], {"qa": 1.0})])["a/0"]
    second = run(engine, [submission("b", PROMPTS[2], {"qa": 1.0})])["b/0"]
    other_tenant = run(engine, [submission("c", PROMPTS[2], {"qa": 1.0}, salt="other")])["c/0"]
    assert first.tokens == second.tokens == other_tenant.tokens
    assert first.last and second.last and other_tenant.last
    assert first.last.usage and second.last.usage and other_tenant.last.usage
    assert first.last.usage.cached_tokens == 0
    assert second.last.usage.cached_tokens == 20  # 23 tokens, the last of which is always computed
    assert second.last.usage.lane_tokens == {
        name: tokens - 20 for name, tokens in first.last.usage.lane_tokens.items()
    }
    assert other_tenant.last.usage.cached_tokens == 0


def test_weight_zero_runs_no_expert(tiny_family: TinyFamily) -> None:
    engine = make_engine(tiny_family)
    result = run(engine, [submission("a", PROMPTS[0], {"qa": 0.0, "record": 0.0})])["a/0"]
    assert result.last and result.last.usage and result.last.fusion
    assert set(result.last.usage.lane_tokens) == {"atlas"}
    assert result.last.fusion.mean_kl == 0.0
    assert {name: stats.forwards > 0 for name, stats in engine.residents.stats.items()} == {
        "atlas": True,
        "qa.tuned": False,
        "small": False,
        "record.tuned": False,
    }


def test_tuned_equal_to_untuned_is_the_base(tiny_family: TinyFamily) -> None:
    """d = 0, so any weight leaves the base's tokens; the two lanes are one."""
    models = load_family(tiny_family.base, [ExpertSource("same", tiny_family.untuned, tiny_family.untuned)])
    engine = Engine(models, EngineConfig(kv_memory=2**20))
    results = run(engine, [submission("a", PROMPTS[0]), submission("b", PROMPTS[0], {"same": 3.0})])
    assert results["a/0"].tokens == results["b/0"].tokens


def test_base_as_untuned(tiny_family: TinyFamily) -> None:
    """base + 1 * (tuned - base) is the tuned model itself."""
    models = load_family(tiny_family.base, [ExpertSource("qa", tiny_family.experts["qa"], tiny_family.base)])
    engine = Engine(models, EngineConfig(kv_memory=2**20))
    result = run(engine, [submission("a", PROMPTS[0], {"qa": 1.0}, logprobs=0)])["a/0"]
    alone = NaiveFusion(tiny_family.experts["qa"], {})
    expected = alone.greedy({"base": PROMPTS[0]}, {}, 12, engine.models.base.vocabulary.size)
    assert result.tokens == expected.tokens
    assert result.last and result.last.usage and set(result.last.usage.lane_tokens) == {"atlas", "qa.tuned"}
