"""Recorded steps beside those that are run as they are: the same logits, on a device that pretends to record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import mul
from typing import Any

import pytest
import torch
from torch import Tensor

from proxyserve.config import EngineConfig
from proxyserve.engine.attention import AttentionPlan
from proxyserve.engine.cuda import choose
from proxyserve.engine.cuda.choose import Attention
from proxyserve.engine.cuda.flashinfer import FlashInferAttention
from proxyserve.engine.cuda.step_graphs import StepGraphs, sizes_for
from proxyserve.engine.engine import Engine
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner
from proxyserve.models.family import load_family
from proxyserve.models.model_set import ModelSet
from tests.engine import fake_flashinfer
from tests.engine.driver import Collected, run, submission
from tests.engine.lanes import BLOCK, BLOCKS, STEPS, Lanes, plain_logits
from tests.engine.pretend_graphs import PretendGraphDevice, one_operation
from tests.engine.test_paged_kernels import alike
from tests.tiny import build_family

CPU = torch.device("cpu")


def recorded_logits(runner: Runner) -> list[Tensor]:
    lanes, device = Lanes(runner), PretendGraphDevice()
    graphs = StepGraphs(device, (1, 2, 4, 8))
    assert graphs.record(runner, lanes.storage)
    tokens_run = sum(runner.stats.tokens.values())
    found = [runner.run(lanes.work(step)) for step in STEPS]
    assert graphs.recorded == 4
    assert graphs.replayed == len(STEPS)
    assert device.replays == [2, 1, 1, 1]  # those of 8, 4, 2 and 1 tokens
    assert device.uploads == 4 * 2 + len(STEPS) * 2
    assert sum(runner.stats.tokens.values()) - tokens_run == sum(count for step in STEPS for _, count in step)
    runner.detach()
    return found


def compare(runner: Runner) -> None:
    expected = plain_logits(runner)
    for got, plain in zip(recorded_logits(runner), expected, strict=True):
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=0)


def method_as_one_operation(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(self: object, *args: Any) -> Tensor:
        return one_operation(lambda *tensors: method(self, *tensors))(*args)

    return call


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2", "mistral"])
def test_every_architecture(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Windows, soft caps, position embeddings that are looked up: replayed in batches that change from step to step."""
    family = build_family(tmp_path_factory.mktemp(architecture), architecture)
    compare(Runner(load_family(family.base, []).base))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runner(tiny_models: ModelSet) -> Runner:
    return Runner(tiny_models.base)  # type: ignore[arg-type]


def test_flashinfer(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wrapper for CUDA graphs: planned anew before each replay, its buffers in place."""
    wrapper = fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setattr(wrapper, "run", method_as_one_operation(wrapper.run))
    kernels = FlashInferAttention(fake_flashinfer, alike(runner), torch.device("cpu"))  # type: ignore[arg-type]
    monkeypatch.setattr(runner, "attention", Attention("flashinfer", kernels.plan, kernels.reserve))
    compare(runner)


def test_the_triton_kernel(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter."""
    paged = pytest.importorskip("proxyserve_kernels.triton_backend.paged")
    monkeypatch.setattr(paged, "PROGRAMS", 1)
    monkeypatch.setattr(paged, "attend_pages", one_operation(paged.attend_pages))
    monkeypatch.setattr(runner, "attention", Attention("gather", AttentionPlan.of, choose.reserve_triton))
    expected, lanes = plain_logits(runner), Lanes(runner)
    graphs = StepGraphs(PretendGraphDevice(), (7,))  # one size: the interpreter is slow
    assert graphs.record(runner, lanes.storage)
    for step, plain in zip(STEPS[:2], expected, strict=False):
        torch.testing.assert_close(runner.run(lanes.work(step)), plain, atol=1e-4, rtol=0)
    assert graphs.replayed == 2
    runner.detach()


def test_what_python_computes_while_recording_is_frozen() -> None:
    """Of the pretended device itself."""
    device, place, number = PretendGraphDevice(), torch.zeros(1), [1.0]
    replay = device.record([lambda: place.add_(number[0])], "pool")  # type: ignore[arg-type, return-value]
    number[0] = 5.0
    replay()
    assert place.item() == 2.0
    with pytest.raises(RuntimeError, match="capturing"):
        device.record([lambda: print(place.item())], "pool")


def test_what_does_not_fit_runs_as_it_is(runner: Runner) -> None:
    """Prompts, more tokens than any recording has, lists of blocks that are too long, and differences."""
    lanes, graphs = Lanes(runner), StepGraphs(PretendGraphDevice(), (1, 2))
    assert graphs.record(runner, lanes.storage)
    key = runner.model.key
    (chunk,) = lanes.work([(0, 2)])
    assert graphs.run({key: [replace(chunk, rows=1)]}, {}) == {}
    assert graphs.run({key: lanes.work([(1, 2), (2, 1)])}, {}) == {}
    assert graphs.run({key: lanes.work([(1, 1), (2, 1)])}, {key: [(lanes.lanes[1], lanes.lanes[2])]}) == {}
    single = lanes.work([(0, 1)])
    lanes.lanes[0].blocks *= 2 * BLOCKS
    assert graphs.run({key: single}, {}) == {}
    assert graphs.replayed == 0
    runner.detach()


def test_a_model_that_cannot_be_recorded_runs_as_it_is(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has the host look at what is in a tensor."""
    lanes, graphs = Lanes(runner), StepGraphs(PretendGraphDevice(), (1, 2))
    monkeypatch.setattr(
        runner.model.module.get_output_embeddings(),
        "forward",
        lambda hidden: hidden * hidden.abs().max().item(),
    )
    assert not graphs.record(runner, lanes.storage)
    assert "without recorded steps" in caplog.text
    assert runner.graphs is None
    assert graphs.run({runner.model.key: lanes.work([(0, 1)])}, {}) == {}
    runner.detach()


def test_padding_touches_nothing_but_the_spare_block(runner: Runner) -> None:
    lanes, graphs = Lanes(runner), StepGraphs(PretendGraphDevice(), (8,))
    graphs.record(runner, lanes.storage)
    before = [tensor.clone() for tensor in (*lanes.storage.keys, *lanes.storage.values)]
    (single,) = work = lanes.work([(2, 1)])
    runner.run(work)
    block, offset = single.lane.blocks[single.start // BLOCK], single.start % BLOCK
    for old, new in zip(before, (*lanes.storage.keys, *lanes.storage.values), strict=True):
        assert not torch.equal(old[block, offset], new[block, offset])
        old[block, offset] = new[block, offset]
        old[BLOCKS] = new[BLOCKS]
        assert torch.equal(old, new)
    runner.detach()


def test_sizes() -> None:
    assert sizes_for(1) == (1,)
    assert sizes_for(64) == (1, 2, 4, 8, 16, 32, 64)
    assert sizes_for(65)[-1] == 128
    assert sizes_for(10_000)[-1] == 256
    with pytest.raises(ValueError, match="ascending"):
        StepGraphs(PretendGraphDevice(), (2, 2))
    with pytest.raises(ValueError, match="spare"):
        choose.reserve_gather(
            1, KVStorage([], num_blocks=1, block_size=1, dtype=torch.float32, device=CPU), 8
        )


# The engine ------------------------------------------------------------------------------------------------------


def make_engine(models: ModelSet, device: PretendGraphDevice | None, **config: object) -> Engine:
    values: dict[str, object] = {"max_batch": 4, "max_batch_tokens": 32, "kv_memory": 2**20, **config}
    return Engine(models, EngineConfig(**values), graph_device=device)  # type: ignore[arg-type]


def mixed(engine: Engine) -> dict[str, Collected]:
    """The base alone, one expert and two, of different lengths, so that the batch changes all the time."""
    prompts = ([5, 17, 200, 33, 9], [7], [300, 12, 77, 77, 140, 9, 1])
    weights: list[dict[str, float]] = [{}, {"qa": 1.0}, {"qa": 0.5, "record": -0.7}]
    submissions = [
        submission(f"r{n}", prompt, weight, max_tokens=5 + 2 * n, logprobs=3)
        for n, (prompt, weight) in enumerate(zip(prompts, weights, strict=True))
    ]
    return run(engine, submissions)


def test_an_engine_with_recorded_steps(tiny_models: ModelSet) -> None:
    """Token for token what it is without, and all but the prompts replayed."""
    device = PretendGraphDevice()
    engine = make_engine(tiny_models, device, speculate="off")
    assert engine.graphs is not None
    sizes = len(engine.graphs.sizes)
    assert engine.graphs.recorded == sizes * (len(tiny_models.trunks) + len(tiny_models.experts))
    got, expected = mixed(engine), mixed(make_engine(tiny_models, None))
    for key, result in got.items():
        assert result.tokens == expected[key].tokens
        for mine, plain in zip(result.logprobs, expected[key].logprobs, strict=True):
            assert mine.logprob == pytest.approx(plain.logprob, abs=1e-4)
    forwards = sum(stats.forwards for stats in engine.residents.stats.values())
    replayed_models = sum(map(mul, device.replays, device.sizes))
    assert forwards - replayed_models == len(tiny_models.trunks), "one forward of each model had prompts"


def test_models_of_one_request_are_recorded_together(tiny_models: ModelSet) -> None:
    """One replay for all three, and none of it while another request needs other models."""
    device = PretendGraphDevice()
    engine = make_engine(tiny_models, device, speculate="off")
    run(engine, [submission("r", [5, 17, 200], {"qa": 1.0}, max_tokens=6)])
    assert set(device.side_by_side) == {1}
    assert len(device.side_by_side) == 5
    run(engine, [submission("a", [5, 17], {"qa": 1.0}), submission("b", [7, 9], {"record": 1.0})])
    assert max(device.side_by_side) == 4


def test_drafting_and_verifying_are_replayed(tiny_models: ModelSet) -> None:
    """Drafts one token at a time, and what verifies them several: all of it but the prompts."""
    device = PretendGraphDevice()
    engine, plain = (make_engine(tiny_models, graphs, speculate=3) for graphs in (device, None))
    wanted = submission("r", [5, 17, 200, 33, 9], {"qa": 0.3}, max_tokens=12)
    assert run(engine, [wanted])["r/0"].tokens == run(plain, [wanted])["r/0"].tokens
    forwards = sum(stats.forwards for stats in engine.residents.stats.values())
    assert forwards == sum(stats.forwards for stats in plain.residents.stats.values())
    replayed = sum(map(mul, device.replays, device.sizes))
    assert forwards - replayed == 3, "one forward of each model had the prompt"


def test_recordings_leave_with_their_model(tiny_models: ModelSet) -> None:
    engine = make_engine(tiny_models, PretendGraphDevice())
    graphs = engine.graphs
    assert graphs is not None
    expert = tiny_models.experts["qa"]
    key = expert.tuned.key
    runner = engine.runners[key]
    assert isinstance(runner, Runner)
    before = len(graphs)
    graphs.drop(key)
    assert len(graphs) == before - 2 * len(graphs.sizes)  # its own, and those beside the base
    assert runner.graphs is None
    engine.record([(runner, engine.residents.arenas[runner.layout])])
    engine.record_together(expert, tiny_models.base)
    assert len(graphs) == before


def test_no_recordings(tiny_models: ModelSet) -> None:
    assert make_engine(tiny_models, None).graphs is None
    engine = make_engine(tiny_models, PretendGraphDevice(), cuda_graphs=False)
    assert engine.graphs is None
    assert all(arena.storage.spare is None for arena in engine.residents.arenas.values())
