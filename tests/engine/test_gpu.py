"""What only a GPU can show of the engine: that its own graphs, kernels and heads give what plain steps on it give. All
of it is simulated elsewhere: `test_step_graphs.py`, `test_paged_kernels.py`, `test_wide_heads.py`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from proxyserve.config import EngineConfig
from proxyserve.engine.attention import AttentionPlan
from proxyserve.engine.cuda.choose import Attention, reserve_gather, reserve_triton
from proxyserve.engine.cuda.graph_device import CudaGraphDevice
from proxyserve.engine.cuda.step_graphs import StepGraphs
from proxyserve.engine.engine import Engine
from proxyserve.engine.heads import WideHead
from proxyserve.engine.runner import Runner
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement
from proxyserve.models.model_set import ModelSet
from tests.engine.driver import run, submission
from tests.engine.lanes import STEPS, Lanes, plain_logits
from tests.tiny import TinyFamily, build_family

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)


def load(family: TinyFamily, dtype: torch.dtype) -> ModelSet:
    experts = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    return load_family(family.base, experts, placement=Placement(DEVICE, dtype))


def recorded_logits(runner: Runner) -> list[Tensor]:
    lanes, graphs = Lanes(runner), StepGraphs(CudaGraphDevice(DEVICE), (1, 2, 4, 8))
    assert graphs.record(runner, lanes.storage)
    found = [runner.run(lanes.work(step)) for step in STEPS]
    assert graphs.replayed == len(STEPS)
    runner.detach()
    return found


def compare(mine: Sequence[Tensor], plain: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the spread of the logits."""
    for got, expected in zip(mine, plain, strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("reserve", [reserve_gather, reserve_triton])
def test_recorded_steps(architecture: str, reserve: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In float32, soft caps and windows included."""
    family = build_family(tmp_path_factory.mktemp(architecture), architecture)
    runner = Runner(load(family, torch.float32).base)  # type: ignore[arg-type]
    runner.attention = Attention("gather", AttentionPlan.of, reserve)  # type: ignore[arg-type]
    with torch.inference_mode():
        compare(recorded_logits(runner), plain_logits(runner), 1e-3)


def test_bfloat16(tiny_family: TinyFamily) -> None:
    """The kernels that are chosen here, and logits in float32."""
    runner = Runner(load(tiny_family, torch.bfloat16).base)  # type: ignore[arg-type]
    assert isinstance(runner.model.module.get_output_embeddings(), WideHead)
    with torch.inference_mode():
        mine, plain = recorded_logits(runner), plain_logits(runner)
    assert {logits.dtype for logits in mine} == {torch.float32}
    compare(mine, plain, 0.1)


@pytest.mark.parametrize("speculate", ["off", 3])
def test_an_engine(tiny_family: TinyFamily, speculate: str) -> None:
    """The base alone, one expert and two, with drafts and without: the tokens of an engine that records nothing."""
    models = load(tiny_family, torch.float32)
    asked = [
        submission(f"r{number}", [5, 17, 200 + number], weights, max_tokens=10)
        for number, weights in enumerate([{}, {"qa": 1.0}, {"qa": 0.5, "record": -0.7}])
    ]
    texts = []
    for cuda_graphs in (True, False):
        config = EngineConfig(
            max_batch=4,
            max_batch_tokens=32,
            kv_memory=2**24,
            cuda_graphs=cuda_graphs,
            speculate=speculate,  # type: ignore[arg-type]
        )
        engine = Engine(models, config)
        texts.append({key: result.tokens for key, result in run(engine, asked).items()})
        assert (engine.graphs is not None) == cuda_graphs
        assert engine.graphs is None or engine.graphs.replayed > 0
    assert texts[0] == texts[1]
