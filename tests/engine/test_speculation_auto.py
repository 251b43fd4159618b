"""As many drafts as pay, in the engine: what is drafted, on a machine whose times are given instead of measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from proxyserve.bench.agreeing import AgreeingFamily, build_agreeing_family
from proxyserve.bench.models import ModelShape
from proxyserve.config import EngineConfig
from proxyserve.engine import engine as engine_module
from proxyserve.engine import runner as runner_module
from proxyserve.engine.counters import EngineCounters
from proxyserve.engine.engine import Engine
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.packed_row import PackedRow
from proxyserve.engine.runner import Runner
from proxyserve.engine.speculation import adaptive, speculator
from proxyserve.engine.speculation.acceptance import SPARSEST
from proxyserve.engine.speculation.costs import start_up_sizes
from proxyserve.engine.speculation.drafting import draw
from proxyserve.engine.speculation.start_up import measure_forwards
from proxyserve.engine.speculation.step_costs import StepCosts
from proxyserve.engine.submission import Submission
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement, load_model
from proxyserve.types import ModelKey
from tests.engine.driver import run, submission

VOCABULARY = 400
BASE = ModelShape(hidden=192, layers=2, heads=4, kv_heads=2, intermediate=128, tied=False)
EXPERT = ModelShape(hidden=128, layers=1, heads=2, kv_heads=1, intermediate=96, tied=True)
NAMES = {"always": 1.0, "often": 0.8, "never": 0.0}


class GivenCosts(StepCosts):
    """A base that takes 25 ms and half a millisecond per token, and small models that take a fifth of it."""

    def seconds(self, tokens: Mapping[ModelKey, int], rows: int) -> float:
        return 1e-3 + sum(self._forward(trunk, count) for trunk, count in tokens.items())

    def drafting_seconds(self, depths: Iterable[Mapping[ModelKey, int]]) -> float:
        return sum(1e-3 + sum(self._forward(*item) for item in depth.items()) for depth in depths)

    def took(self, *_: object) -> None: ...

    def drafting_took(self, *_: object) -> None: ...

    def _forward(self, trunk: ModelKey, count: int) -> float:
        return (25e-3 + 0.5e-3 * count) / (1 if trunk.name == "base" else 5)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AgreeingFamily:
    folder = tmp_path_factory.mktemp("agreeing")
    return build_agreeing_family(folder, NAMES.values(), base=BASE, expert=EXPERT, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def loaded(family: AgreeingFamily) -> Iterator[Engine]:
    experts = [ExpertSource(name, *family.experts[share]) for name, share in NAMES.items()]
    models = load_family(
        family.base, experts, base_name="base", placement=Placement(torch.device("cpu"), torch.float32)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "StepCosts", GivenCosts)
        yield Engine(
            models,
            EngineConfig(max_batch=8, kv_memory=2**25, prefix_cache=False, max_drafts=4, pairs="apart"),
        )


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    """As if it had just been started."""
    loaded.speculator = speculator.Speculator(loaded.config, loaded.models.base.key)
    loaded.counters = EngineCounters()
    return loaded


@pytest.fixture
def shadows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of each call that compares."""
    calls: list[int] = []

    def counted(backend: Any, rows: Sequence[Any], *rest: Any) -> list[int]:
        calls.append(len(rows))
        return draw(backend, rows, *rest)

    monkeypatch.setattr(speculator, "draw", counted)
    return calls


class BusyDevice:
    """Simulated time of a device that works behind the host: a forward returns at once, a pick waits for all of them.
    Where it is not `behind`, each forward is waited for."""

    def __init__(self, backend: Any) -> None:
        self.behind = True
        self.now = 0.0
        self._queued = 0.0
        self._backend = backend

    def seconds(self, model: str, tokens: int) -> float:
        return (25e-3 + 0.5e-3 * tokens) / (1 if model == "base" else 20)

    def compute(self, runner: Runner, row: PackedRow, storage: KVStorage) -> torch.Tensor:
        self.now += 0.1e-3
        self._queued += self.seconds(runner.model.name, len(row.ids))
        if not self.behind:
            self.wait()
        return compute(runner, row, storage)

    def pick(self, *arguments: Any) -> Any:
        self.now += 0.2e-3
        self.wait()
        return self._backend.pick(*arguments)

    def wait(self) -> None:
        self.now += self._queued
        self._queued = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


compute = Runner.compute


@pytest.fixture
def device(engine: Engine) -> BusyDevice:
    return BusyDevice(engine.backend)


@pytest.fixture
def busy(engine: Engine, device: BusyDevice, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Costs are learned from the simulated clock, beginning with what each forward takes when it is waited for."""
    monkeypatch.setattr(engine, "backend", device)
    monkeypatch.setattr(Runner, "compute", lambda *arguments: device.compute(*arguments))
    for module in (engine_module, runner_module, speculator):
        monkeypatch.setattr(module, "perf_counter", lambda: device.now)
    monkeypatch.setattr(adaptive, "StepCosts", StepCosts)
    monkeypatch.setattr(adaptive, "returns_early", lambda runner: device.behind)

    def measure(runner: Runner, most: int) -> dict[int, float]:
        return {size: device.seconds(runner.model.name, size) for size in start_up_sizes(32)}

    monkeypatch.setattr(adaptive, "measure_forwards", measure)
    engine.speculator = speculator.Speculator(engine.config, engine.models.base.key)
    for runner in engine.runners.values():
        assert isinstance(runner, Runner)
        engine.speculator.measure(runner)
    return engine


def plain(family: AgreeingFamily, first: int, count: int) -> list[int]:
    """What the fused law says greedily after `first`."""
    text = [first]
    for _ in range(count):
        text.append(int(family.follows[text[-1]]))
    return text[1:]


def base_tokens(engine: Engine) -> int:
    return engine.runners[engine.models.base.key].stats.tokens["base"]


def ask(name: str, expert: str | None, first: int, tokens: int, **more: Any) -> Submission:
    weights = None if expert is None else {expert: 1.0}
    return submission(name, [3, first], weights, max_tokens=tokens, **more)


def test_drafts_once_the_shadow_has_been_right(
    engine: Engine, family: AgreeingFamily, shadows: list[int]
) -> None:
    result = run(engine, [ask("a", "always", 7, 60)])["a/0"]
    assert result.tokens == plain(family, 7, 60)
    assert len(shadows) <= 6
    assert engine.counters.steps <= len(shadows) + 2 + 60 / 5 + 1, "five tokens in each other step"
    assert result.last is not None and result.last.fusion is not None
    assert result.last.fusion.drafted == result.last.fusion.accepted
    assert result.last.fusion.drafted == 60 - engine.counters.steps

    steps, compared = engine.counters.steps, len(shadows)
    result = run(engine, [ask("b", "always", 11, 60)])["b/0"]
    assert result.tokens == plain(family, 11, 60)
    assert engine.counters.steps - steps <= 1 + 60 / 5 + 1, (
        "what is known of the expert holds for the next request"
    )
    assert len(shadows) <= compared + 1


def test_nothing_is_drafted_where_no_draft_stands(
    engine: Engine, family: AgreeingFamily, shadows: list[int]
) -> None:
    for name, first in (("a", 7), ("b", 8)):
        before, steps = base_tokens(engine), engine.counters.steps
        result = run(engine, [ask(name, "never", first, 100)])[f"{name}/0"]
        assert result.tokens == plain(family, first, 100)
        assert engine.counters.steps - steps == 100
        assert base_tokens(engine) - before == 2 + 99, "each token once"
    assert not engine.counters.draft_tokens
    assert sum(shadows) <= 10 + 200 / SPARSEST + 5


def test_a_device_that_works_behind_the_host_drafts_where_it_pays(
    busy: Engine, family: AgreeingFamily
) -> None:
    for name, first in (("a", 7), ("b", 11)):
        result = run(busy, [ask(name, "always", first, 60)])[f"{name}/0"]
        assert result.tokens == plain(family, first, 60)
        assert busy.counters.draft_tokens["always.tuned"] > 30
    assert busy.counters.draft_tokens["always.tuned"] == 120 - busy.counters.steps
    assert busy.counters.steps < 6 + 2 * (60 / 5 + 2), "four drafts in nearly all steps"
    drafted = busy.counters.draft_tokens.total()
    result = run(busy, [ask("c", "never", 7, 60)])["c/0"]
    assert result.tokens == plain(family, 7, 60)
    assert busy.counters.draft_tokens.total() == drafted


@pytest.mark.parametrize("behind", [True, False])
def test_prompts_in_all_steps_do_not_keep_others_from_drafting(
    busy: Engine, device: BusyDevice, family: AgreeingFamily, behind: bool
) -> None:
    device.behind = behind
    busy.submit(ask("a", "always", 7, 60))
    steps, tokens = 0, list[int]()
    while len(tokens) < 60:
        busy.submit(ask(f"prompt-{steps}", None, 9, 1))
        tokens.extend(token for event in busy.step() if event.request_id == "a" for token in event.token_ids)
        steps += 1
    assert tokens == plain(family, 7, 60)
    assert steps < 6 + 60 / 5 + 2


def test_requests_of_one_step_are_told_apart(engine: Engine, family: AgreeingFamily) -> None:
    for _ in range(2):  # the second time, experts are known
        experts = ("always", "never", None, "often", "always", "never")
        found = run(engine, [ask(str(n), expert, 20 + n, 50) for n, expert in enumerate(experts)])
        for number, expert in enumerate(experts):
            result = found[f"{number}/0"]
            assert result.tokens == plain(family, 20 + number, 50), expert
            assert result.last is not None
            report = result.last.fusion
            if expert == "always":
                assert report is not None and report.drafted is not None and report.drafted > 30
                assert report.accepted == report.drafted
            elif expert == "often":
                assert report is not None and report.drafted is not None and report.accepted is not None
                assert 0 < report.accepted < report.drafted
            elif expert == "never":
                assert report is not None and report.drafted is None


def test_large_batches_do_not_draft_what_costs_more_than_it_gives(
    engine: Engine, family: AgreeingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(engine, [ask("first", "often", 5, 40)])
    assert engine.counters.draft_tokens["often.tuned"] > 0
    drafted = engine.counters.draft_tokens.total()
    # Each token more costs what a whole forward did.
    monkeypatch.setattr(GivenCosts, "_forward", lambda self, trunk, count: 25e-3 * count)
    found = run(engine, [ask(str(number), "often", 30 + number, 30) for number in range(8)])
    assert engine.counters.draft_tokens.total() == drafted
    assert [found[f"{number}/0"].tokens for number in range(8)] == [
        plain(family, 30 + number, 30) for number in range(8)
    ]


def test_the_base_alone_drafts_from_its_text(engine: Engine, family: AgreeingFamily) -> None:
    known = [50, *plain(family, 50, 60)]
    prompt = [*known, 1, 2, *known[:4]]
    result = run(engine, [submission("a", prompt, max_tokens=50)])["a/0"]
    assert result.tokens == known[4:54]
    assert engine.counters.accepted_tokens["lookup"] == engine.counters.draft_tokens["lookup"] > 30
    assert engine.counters.steps < 25
    steps = engine.counters.steps
    fresh = run(engine, [ask("b", None, 200, 40)])["b/0"]
    assert fresh.tokens == plain(family, 200, 40)
    assert engine.counters.steps - steps == 40, "nothing of that text has been there before"


def test_sampling_gives_the_text_of_its_seed(family: AgreeingFamily, engine: Engine) -> None:
    asked = [
        ask(f"{expert}-{seed}", expert, 9, 40, temperature=2.5, seed=seed)
        for expert in NAMES
        for seed in range(2)
    ]
    engine.speculator.speculate = "off"
    expected = {key: result.tokens for key, result in run(engine, asked).items()}
    assert not engine.counters.draft_tokens
    engine.speculator.speculate = "auto"
    for _ in range(2):
        assert {key: result.tokens for key, result in run(engine, asked).items()} == expected
    assert engine.counters.draft_tokens["always.tuned"] > 0


def test_forwards_are_measured_before_there_is_any_request(family: AgreeingFamily) -> None:
    placement = Placement(torch.device("cpu"), torch.float32)
    runner = Runner(load_model(family.base, ModelKey("base"), placement))
    costs = measure_forwards(runner, 9)
    assert runner.storage is None
    sizes = start_up_sizes(9)
    assert runner.stats.tokens["base"] == max(sizes) + 2 * sum(sizes)
    assert list(costs) == sizes
    assert min(costs.values()) > 0.0
    measure_forwards(runner, 10_000)
    assert max(start_up_sizes(32)) < 50, "no long wait at start-up"


def test_models_that_are_alike_are_measured_once(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(runner: Runner, most: int) -> dict[int, float]:
        measured.append(runner.model.name)
        return {1: 1e-3}

    monkeypatch.setattr(adaptive, "measure_forwards", measure)
    runners = [runner for runner in loaded.runners.values() if isinstance(runner, Runner)]
    pace = adaptive.Adaptive(loaded.config)
    for runner in runners:
        pace.measure(runner, 8)
    assert measured == ["base", "always.tuned"]
