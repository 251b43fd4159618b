"""Fixtures: tiny random models of several architectures, as ordinary folders on disk."""

from __future__ import annotations

import math
import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is imported, so it is set before anything can do that: without a GPU its kernels are tested
# in the interpreter. `nvidia-smi` answers before torch is there to ask.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.speculation import adaptive
from proxyserve.engine.speculation.step_costs import StepCosts
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import MAKING
from proxyserve.models.model_set import ModelSet
from tests.tiny import TinyFamily, build_family

torch.set_num_threads(1)

# Started in the background, a shell has it ignored, and whatever tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class NothingPays(StepCosts):
    """Steps with drafts, and without, take for ever."""

    def seconds(self, *_: object) -> float:
        return math.inf

    def took(self, *_: object) -> None: ...

    def drafting_took(self, *_: object) -> None: ...


@pytest.fixture(scope="session", autouse=True)
def no_times() -> Iterator[None]:
    """No test depends on how long anything takes: where as many tokens are to be drafted as pay, none does, unless the
    test says what they cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "StepCosts", NothingPays)
        patch.setattr(adaptive, "measure_forwards", lambda *_: {})
        yield


_TIE_WEIGHTS = PreTrainedModel.tie_weights


@pytest.fixture(autouse=True)
def untouched_transformers() -> Iterator[None]:
    """Two models that are made at once on two threads leave patches of transformers behind, and some other test would
    fail: one that makes models beside a server's loader thread does it by `whole_model`."""
    yield
    if MAKING.acquire(blocking=False):  # else that thread is at it, and the next test looks
        MAKING.release()
        assert PreTrainedModel.tie_weights is _TIE_WEIGHTS, "models were made on two threads at once"


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A Llama base "atlas" and experts "qa" and "record" (tuned models with a chat template) that share one untuned."""
    return build_family(tmp_path_factory.mktemp("family"), "llama")


@pytest.fixture(scope="session")
def tiny_models(tiny_family: TinyFamily) -> ModelSet:
    return load_family(
        tiny_family.base,
        [ExpertSource(name, tuned, tiny_family.untuned) for name, tuned in tiny_family.experts.items()],
        base_name="atlas",
    )


@pytest.fixture
def tiny_engine(tiny_models: ModelSet) -> Iterator[AsyncEngine]:
    """A started engine over `tiny_models` with a small KV budget."""
    engine = AsyncEngine(
        Engine(tiny_models, EngineConfig(max_batch=8, max_batch_tokens=64, kv_memory=4 * 2**20))
    )
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[1]
