"""Models that are alike run in one forward, and say what they say alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig, PairsChoice
from proxyserve.engine.engine import Engine
from proxyserve.engine.forward import run_models
from proxyserve.engine.grouped import groups as groups_module
from proxyserve.engine.grouped.group import Group
from proxyserve.engine.grouped.groups import Groups
from proxyserve.engine.grouped.shell import NotAlike, Shell
from proxyserve.engine.grouped.trial import Speedups, Trial
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import choose_placement, load_model
from proxyserve.models.model_set import ModelSet, make_expert
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey
from tests.engine.driver import Collected, run, submission
from tests.engine.test_adapters import make_adapter
from tests.tiny import ARCHITECTURES, TinyFamily, build_family, make_tokenizer, save_model

PROMPT = [5, 17, 200, 33, 9, 120, 64, 88, 11, 140, 3]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyFamily]:
    made: dict[str, TinyFamily] = {}

    def family(architecture: str) -> TinyFamily:
        if architecture not in made:
            made[architecture] = build_family(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return family


def make_engine(family: TinyFamily, pairs: PairsChoice, **config: object) -> Engine:
    models = load_family(
        family.base, [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    )
    values: dict[str, object] = {"max_batch": 16, "max_batch_tokens": 20, "kv_memory": 2**21, **config}
    return Engine(models, EngineConfig(pairs=pairs, **values))  # type: ignore[arg-type]


def two_runners(family: TinyFamily) -> tuple[Runner, Runner]:
    placement = choose_placement("cpu", "float32")
    first, second = (
        Runner(load_model(folder, ModelKey(folder.name), placement))
        for folder in (family.untuned, family.experts["qa"])
    )
    return first, second


def the_group(engine: Engine) -> Group:
    [group] = {runner.group for runner in engine.residents.local if runner.group is not None}
    assert group is not None
    return group


def same(left: Mapping[str, Collected], right: Mapping[str, Collected]) -> None:
    for key, one in left.items():
        two = right[key]
        assert one.tokens == two.tokens
        for mine, other in zip(one.logprobs, two.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=2e-6)


# Runners and groups ------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two runners (and a third) on storages of their own for "apart", and one for "together"."""

    runners: list[Runner]
    group: Group

    @classmethod
    def of(cls, folders: Sequence[Path], dtype: str = "float32") -> Pair:
        placement = choose_placement("cpu", dtype)
        runners = [
            Runner(load_model(folder, ModelKey(f"m{number}"), placement))
            for number, folder in enumerate(folders)
        ]
        trial = Trial(runners[:2])
        trial.verify()
        group = Group(trial.release(), 64)
        for runner in runners:
            group.join(runner, group.seat(runner))
        return cls(runners, group)

    def storage(self) -> KVStorage:
        first = self.runners[0]
        return KVStorage(
            first.shapes, num_blocks=64, block_size=4, dtype=first.model.dtype, device=first.model.device
        )

    @torch.inference_mode()
    def compare(self, steps: Sequence[Sequence[Sequence[tuple[int, int, int]]]]) -> None:
        """Of each step and model the works: (lane, tokens, rows). Lanes go on where they were."""
        together, apart = self._lanes(), self._lanes()
        apart_storage = [self.storage() for _ in self.runners]
        shared = self.storage()
        forwards = self.group.forwards
        for step in steps:
            expected = []
            for which, items in enumerate(step):
                self.runners[which].attach(apart_storage[which])
                if items:
                    expected.append(self.runners[which].run(self._work(apart, which, items)))
            for runner in self.runners:
                runner.attach(shared)
            work = {
                self.runners[which].model.key: self._work(together, which, items)
                for which, items in enumerate(step)
                if items
            }
            runners = MappingProxyType({runner.model.key: runner for runner in self.runners})
            got = run_models(runners, work, {}).logits
            for logits, wanted in zip(got.values(), expected, strict=True):
                assert logits.dtype == wanted.dtype
                torch.testing.assert_close(logits, wanted, atol=2e-6, rtol=0)
            forwards += len(work) > 1
            assert self.group.forwards == forwards

    def _lanes(self) -> dict[tuple[int, int], Lane]:
        lanes = {}
        for which, runner in enumerate(self.runners):
            for number in range(4):
                prompt = tuple((7 * number + 3 * place + which) % 90 + 1 for place in range(16))
                blocks = [16 * which + 4 * number + place for place in (2, 0, 3, 1)]
                lanes[which, number] = Lane(runner.model.key, prompt, [], blocks=blocks)
        return lanes

    def _work(
        self, lanes: Mapping[tuple[int, int], Lane], which: int, items: Sequence[tuple[int, int, int]]
    ) -> list[LaneWork]:
        work = []
        for number, count, rows in items:
            lane = lanes[which, number]
            work.append(
                LaneWork(ScheduledRequest("r", (lane,), lane.output), lane, lane.computed, count, rows)
            )
            lane.computed += count
        return work


#: Prompts in chunks beside single tokens, unequal numbers of tokens and rows, one member without work, one whose
#: logits nobody wants.
STEPS = [
    [[(0, 5, 1), (1, 3, 0)], [(0, 4, 4)], [(2, 1, 1)]],
    [[(0, 1, 1), (1, 2, 2)], [], [(2, 6, 0), (3, 1, 1)]],
    [[(0, 1, 1)], [(0, 1, 1)], [(2, 1, 1)]],
    [[(0, 1, 0)], [(0, 2, 0), (3, 7, 0)], []],
    [[], [(0, 1, 1)], []],
    [[(0, 2, 2), (1, 5, 1), (2, 4, 4)], [(0, 2, 1)], [(2, 1, 1), (3, 1, 0)]],
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_forward_gives_what_separate_ones_give(
    architecture: str, families: Callable[[str], TinyFamily]
) -> None:
    family = families(architecture)
    Pair.of([family.untuned, *family.experts.values()]).compare(STEPS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_half_precision_too(architecture: str, families: Callable[[str], TinyFamily]) -> None:
    family = families(architecture)
    pair = Pair.of([family.untuned, family.experts["qa"]], "bfloat16")
    pair.compare([step[:2] for step in STEPS])


def test_packed_layers_and_heads_of_their_own(tmp_path: Path) -> None:
    """Large enough for oneDNN's layouts, with heads that are not the embeddings."""
    folders = [
        save_model(tmp_path / str(seed), "qwen3", make_tokenizer(), seed=seed, hidden=768, layers=1)
        for seed in (1, 2)
    ]
    Pair.of(folders).compare([step[:2] for step in STEPS[:3]])


def test_more_tokens_than_norms_are_gathered_for(
    families: Callable[[str], TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxyserve.engine.grouped.shell._GATHERED", 6)
    family = families("gemma3")
    Pair.of([family.untuned, *family.experts.values()]).compare(STEPS)


def test_weights_are_held_once_and_let_go(families: Callable[[str], TinyFamily]) -> None:
    family = families("llama")
    pair = Pair.of([family.untuned, *family.experts.values()])
    gone = pair.runners.pop(0)
    pair.group.leave(gone)
    left = [weakref.ref(layer) for layer in gone.model.module.modules() if isinstance(layer, nn.Linear)]
    del gone
    gc.collect()
    assert left and not any(layer() is not None for layer in left)
    pair.compare([step[:2] for step in STEPS])
    again = Pair.of([family.untuned, family.untuned]).runners[0]
    again.group = None
    pair.group.join(again, pair.group.seat(again))  # into the gap
    pair.runners.append(again)
    pair.compare(STEPS)


def test_members_weights_stay_where_they_are(families: Callable[[str], TinyFamily]) -> None:
    """Recorded steps have their addresses, and other threads may be reading them."""
    family = families("llama")
    pair = Pair.of([family.untuned, *family.experts.values()])
    members = list(pair.runners)
    places = [weight.data_ptr() for runner in members for weight in runner.model.module.parameters()]
    gone = members[0]
    pair.group.leave(gone)
    pair.group.join(gone, pair.group.seat(gone))
    assert places == [weight.data_ptr() for runner in members for weight in runner.model.module.parameters()]


def test_models_that_are_not_alike_are_refused(families: Callable[[str], TinyFamily]) -> None:
    family, other = families("llama"), families("qwen3")
    placement = choose_placement("cpu", "float32")

    def load(folder: Path) -> Any:
        return load_model(folder, ModelKey("m"), placement).module

    first = load(family.untuned)
    shell = Shell(first)
    shell.add(shell.seat(first))
    for folder, reason in (
        (family.base, r"Linear\(64, 64\)"),
        (other.untuned, "the model is Llama.* and Qwen3"),
    ):
        with pytest.raises(NotAlike, match=reason):
            shell.seat(load(folder))
    turned = load(family.untuned)
    turned.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(NotAlike, match="inv_freq"):
        shell.seat(turned)
    odd = load(family.untuned)
    odd.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(NotAlike, match=r"self_attn has weights of its own"):
        Shell(odd)
    with pytest.raises(NotAlike, match="sinks"):
        shell.seat(odd)


# The choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "most"),
    [
        ({1: 1.3, 8: 1.2, 32: 1.1}, 32),
        ({1: 1.3, 8: 1.2, 32: 0.9}, 8),
        ({1: 0.9, 8: 1.2, 32: 1.2}, 0),
        ({1: 1.01, 8: 1.2, 32: 1.2}, 0),
        ({}, 0),
    ],
)
def test_models_run_together_as_long_as_it_pays(ratios: dict[int, float], most: int) -> None:
    assert Speedups(ratios).most_tokens == most


@pytest.mark.parametrize(("ratio", "together"), [(1.5, True), (0.7, False)])
def test_what_is_measured_decides_once_per_kind(
    ratio: float, together: bool, families: Callable[[str], TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(trial: Trial) -> Speedups:
        asked.append(trial)
        return Speedups(dict.fromkeys((1, 8), ratio))

    monkeypatch.setattr(Trial, "measure", measure)
    family = families("llama")
    said: list[str] = []
    models = load_family(family.base, [ExpertSource("qa", family.experts["qa"], family.untuned)])
    engine = Engine(models, EngineConfig(max_batch=8, kv_memory=2**21), progress=said.append)
    assert len(asked) == 1
    line = f"{ratio:.2f}x at 1, {ratio:.2f}x at 8"
    if together:
        assert said[-1] == f"'qa.tuned' and 'small' run together up to 8 tokens of each: {line}"
        assert {runner.model.name for runner in engine.residents.local if runner.group} == {
            "qa.tuned",
            "small",
        }
    else:
        assert said[-1] == f"'qa.tuned' and 'small' run apart: together {line}"
        assert not any(runner.group for runner in engine.residents.local)
    engine.residents.groups.learn(engine.residents.local)
    assert len(asked) == 1


def test_measuring_gives_ratios_and_leaves_steps_alone(families: Callable[[str], TinyFamily]) -> None:
    runners = two_runners(families("llama"))
    speedups = Trial(runners).measure()
    assert list(speedups.by_tokens) == [1, 8, 32] and all(ratio > 0 for ratio in speedups.by_tokens.values())
    assert all(runner.storage is None and runner.stats.forwards == 0 for runner in runners)


def test_a_class_that_cannot_says_why_and_runs_apart(
    families: Callable[[str], TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(shell: Shell, *args: object) -> list[Tensor]:
        return [logits + 1 for logits in compute(shell, *args)]  # type: ignore[arg-type]

    compute = Shell.compute
    said: list[str] = []
    runners = two_runners(families("llama"))
    monkeypatch.setattr(Shell, "compute", forget)
    groups = Groups("together")
    groups.learn(runners, said.append)
    monkeypatch.setattr(Shell, "compute", lambda *_: 1 / 0)
    other = Groups("auto")
    other.learn(runners, said.append)
    assert said == [
        "'small' and 'qa' run apart: they give other logits together",
        "'small' and 'qa' run apart: ZeroDivisionError: division by zero",
    ]
    for each in (groups, other):
        each.join(runners)
        assert not any(runner.group for runner in runners)


def test_apart_looks_at_nothing(
    families: Callable[[str], TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "Trial", lambda *_: 1 / 0)
    engine = make_engine(families("llama"), "apart")
    assert not any(runner.group for runner in engine.residents.local)


# In an engine ------------------------------------------------------------------------------------------------------


def test_mixed_requests_in_chunks_run_once_per_group_and_step(families: Callable[[str], TinyFamily]) -> None:
    family = families("llama")
    engines = {pairs: make_engine(family, pairs) for pairs in ("apart", "together")}  # type: ignore[arg-type]
    results = {}
    for pairs, engine in engines.items():
        weights: list[dict[str, float]] = [{"qa": 1.0}, {"record": 0.5, "qa": 0.4}, {}, {"record": -0.5}]
        results[pairs] = run(
            engine,
            [
                submission(
                    f"r{number}", PROMPT[: 11 - number] * (1 + number % 3), each, max_tokens=9, logprobs=3
                )
                for number, each in enumerate(weights)
            ],
        )
    same(results["apart"], results["together"])
    group, stats = the_group(engines["together"]), engines["together"].residents.stats
    assert len(group) == 3
    assert 0 < group.forwards <= engines["together"].counters.steps
    for name, one in engines["apart"].residents.stats.items():
        assert (one.forwards, one.rows, one.tokens) == (
            stats[name].forwards,
            stats[name].rows,
            stats[name].tokens,
        )
        assert stats[name].seconds > 0


def test_drafts_run_together_and_are_verified_together(families: Callable[[str], TinyFamily]) -> None:
    """Two tuned models draft in one forward; then they have one token each and the untuned model has more."""
    family = families("llama")
    results, forwards = {}, {}
    for pairs in ("apart", "together"):
        engine = make_engine(family, pairs, speculate=3)  # type: ignore[arg-type]
        asked = [{"qa": 1.0}, {"record": 0.7}, {"qa": 0.5}]
        results[pairs] = run(
            engine,
            [
                submission(f"r{number}", PROMPT, each, max_tokens=12, logprobs=2)
                for number, each in enumerate(asked)
            ],
        )
        forwards[pairs] = {name: stats.forwards for name, stats in engine.residents.stats.items()}
    same(results["apart"], results["together"])
    assert forwards["apart"] == forwards["together"]
    # Not more than the most that any of them had alone: each of these was one with the others'.
    small = {name: count for name, count in forwards["together"].items() if name != family.base.name}
    assert the_group(engine).forwards <= max(small.values()) < sum(small.values())


def test_adapters_beside_whole_models(families: Callable[[str], TinyFamily]) -> None:
    """Rows of the untuned model with adapters, differences of hidden states among them, and a model of its own."""
    family = families("llama")
    results, rows = {}, {}
    for pairs in ("apart", "together"):
        models = load_family(family.base, [ExpertSource("qa", family.experts["qa"], family.untuned)])
        untuned = models.expert("qa").untuned
        assert untuned is not None
        experts = [models.expert("qa")]
        for number in range(2):
            adapter = make_adapter(untuned.module, seed=number)
            tuned = replace(untuned, key=ModelKey(f"e{number}.tuned"), over=untuned, adapter=adapter)
            experts.append(make_expert(f"e{number}", models.base, tuned, untuned))
        config = EngineConfig(max_batch=8, max_batch_tokens=32, kv_memory=2**22, pairs=pairs)  # type: ignore[arg-type]
        engine = Engine(ModelSet(models.base, experts), config)
        asked: list[dict[str, float]] = [
            {"e0": 1.0},
            {"e1": 0.7, "qa": 0.5},
            {"qa": 1.0},
            {"e0": 0.5, "e1": 0.5},
        ]
        results[pairs] = run(
            engine,
            [
                submission(
                    f"r{number}", PROMPT, fusion=parse_fusion({"experts": each}), max_tokens=8, logprobs=3
                )
                for number, each in enumerate(asked)
            ],
        )
        rows[pairs] = {name: stats.rows for name, stats in engine.residents.stats.items()}
        if pairs == "together":
            assert the_group(engine).forwards > 0
    same(results["apart"], results["together"])
    assert rows["apart"] == rows["together"]


def test_models_come_and_go_under_load(families: Callable[[str], TinyFamily]) -> None:
    family = families("llama")
    expected = run(
        make_engine(family, "apart"), [submission("a", PROMPT, {"qa": 1.0}, max_tokens=20, logprobs=1)]
    )
    engine = make_engine(family, "together")
    arena = next(
        arena
        for arena in engine.residents.arenas.values()
        if arena.layout == engine.residents.local[1].layout
    )
    group = the_group(engine)
    twin = Runner(load_model(family.untuned, ModelKey("twin"), choose_placement("cpu", "float32")))
    steps = 0

    def swap() -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            engine.residents.groups.learn([twin, *engine.residents.local])
            engine.adopt([(twin, arena)])
            assert twin.group is group and len(group) == 4
            assert engine.residents.bytes == before + twin.model.bytes
        elif steps == 10:
            engine.drop([], [twin.model.key])
            assert twin.group is None and len(group) == 3
            assert engine.residents.bytes == before

    before = engine.residents.bytes
    got = run(engine, [submission("a", PROMPT, {"qa": 1.0}, max_tokens=20, logprobs=1)], watch=swap)
    assert steps > 10
    same(expected, got)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must be auto, together or apart, not 'both'"):
        EngineConfig(pairs="both")  # type: ignore[arg-type]
