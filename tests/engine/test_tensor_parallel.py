"""A base in two processes on the CPU, beside the same base in one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner
from proxyserve.engine.sharded.ranks import Ranks, check_ranks
from proxyserve.engine.sharded.runner import ShardedRunner
from proxyserve.engine.verify import verify_paged
from proxyserve.errors import LoadError
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement, load_model
from proxyserve.models.sharding import check_shardable
from proxyserve.types import ModelKey
from tests.engine.driver import Collected, run, submission
from tests.tiny import CONTEXT, TinyFamily, build_family, config_of, make_tokenizer

PLACEMENT = Placement(torch.device("cpu"), torch.float32)
PROMPT = tuple(5 + 7 * k for k in range(45))
#: The ways that a step can be made up: what each configuration is for.
CONFIGS = {
    "as it comes": {},
    "drafts": {"speculate": 3},
    "preempted, in chunks": {"kv_memory": 150_000, "block_size": 4, "max_batch_tokens": 24, "max_batch": 8},
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One follower for all tests here; it takes one base after the other."""
    ranks = Ranks(2, PLACEMENT, threads=1)
    yield ranks
    ranks.close()


def make_engine(family: TinyFamily, ranks: Ranks | None, **config: object) -> Engine:
    models = load_family(
        family.base,
        [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()],
        placement=PLACEMENT,
        load_base=None if ranks is None else ranks.load,
    )
    runner = Runner(models.base) if ranks is None else ShardedRunner(models.base, ranks)
    verify_paged(runner)
    values = {"kv_memory": 2**22, "max_batch_tokens": 64, "max_batch": 16, "speculate": "off", **config}
    return Engine(models, EngineConfig(**values), runners=[runner])


def answers(engine: Engine) -> dict[str, Collected]:
    """A mixed batch: the base alone, one expert with a prompt of its own, two, a scored prompt, two draws of one
    prompt, and at last the same prompt again, of which blocks are there."""
    kinds = [
        submission("plain", PROMPT[:11], logprobs=3),
        submission("one", PROMPT[:30], {"qa": 1.0}, by_lane={"qa.tuned": PROMPT[3:9]}, logprobs=3),
        submission("two", PROMPT[:1], {"qa": 0.4, "record": -0.7}, logprobs=3),
        submission("scored", PROMPT[5:25], {"qa": 1.5}, prompt_logprobs=1, max_tokens=2),
        submission("drawn", PROMPT, {"record": 1.0}, n=2, temperature=1.0, seed=3, logprobs=1),
    ]
    found = run(engine, kinds)
    return {**found, **run(engine, [submission("again", PROMPT, {"record": 1.0}, logprobs=3)])}


def compare(got: dict[str, Collected], expected: dict[str, Collected]) -> None:
    assert got.keys() == expected.keys()
    for key, answer in got.items():
        other = expected[key]
        assert (answer.tokens, answer.text) == (other.tokens, other.text), key
        for ours, theirs in zip(answer.logprobs, other.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [value for _, value in ours.top] == pytest.approx([v for _, v in theirs.top], abs=1e-4)
        for ours, theirs in zip(answer.prompt_logprobs or (), other.prompt_logprobs or (), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_two_processes_answer_as_one(architecture: str, ranks: Ranks, tmp_path: Path) -> None:
    """Grouped heads, norms of queries, windows, soft caps, tied embeddings; a vocabulary that two does not divide."""
    family = build_family(tmp_path, architecture, base_padding=25)
    engine, alone = make_engine(family, ranks), make_engine(family, None)
    compare(answers(engine), answers(alone))
    base, whole = engine.runners[engine.models.base.key], alone.runners[alone.models.base.key]
    assert isinstance(base, ShardedRunner) and isinstance(whole, Runner)
    # The memory plan is that of one process: half the heads, and half of the weights but for norms and the odd row.
    assert [shape.heads for shape in base.shapes] == [shape.heads // 2 for shape in whole.shapes]
    assert base.model.parameters == whole.model.parameters
    held = sum(parameter.nbytes for parameter in base.model.module.parameters())
    assert base.model.bytes == held
    assert 0.5 <= base.model.bytes / whole.model.bytes < 0.51
    # A step reads an expert beside half of the base.
    [request] = engine.prepare(submission("cost", PROMPT, {"qa": 1.0}), engine.offers.lease())
    [alone_request] = alone.prepare(submission("cost", PROMPT, {"qa": 1.0}), alone.offers.lease())
    costs, others = ([lane.cost for lane in some.scheduled.lanes] for some in (request, alone_request))
    assert costs == pytest.approx([1.0, 2 * others[1], 2 * others[2]])
    assert engine.counters.cached_tokens > 0


@pytest.mark.parametrize("kind", ["phi", "phi3", "mixtral"])
def test_other_ways_to_divide(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """Biases, which are added once; products that are gathered and divided again; a mixture's experts, each of which is
    divided."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    config = AutoConfig.for_model(
        kind,
        **sizes,
        **heads,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = ShardedRunner(ranks.load(tmp_path, ModelKey("base")), ranks)
    verify_paged(base)
    alone = Runner(load_model(tmp_path, ModelKey("base"), PLACEMENT))
    assert torch.allclose(base.reference, alone.reference, atol=1e-4)
    assert base.model.bytes < 0.55 * alone.model.bytes


@pytest.mark.parametrize("config", CONFIGS)
def test_every_forward_is_one_message(config: str, ranks: Ranks, tiny_family: TinyFamily) -> None:
    engine, alone = (make_engine(tiny_family, some, **CONFIGS[config]) for some in (ranks, None))
    base = engine.runners[engine.models.base.key]
    assert isinstance(base, ShardedRunner)
    messages, forwards = base.messages, base.stats.forwards
    compare(answers(engine), answers(alone))
    assert base.messages - messages == base.stats.forwards - forwards > 0
    if config == "preempted, in chunks":
        assert engine.counters.preemptions > 0, "this configuration is meant to run dry"
    if config == "drafts":
        assert engine.counters.draft_tokens.total() > 10


def test_blocks_with_nan_are_cleared_everywhere(ranks: Ranks, tiny_family: TinyFamily) -> None:
    """An expert breaks down; the base's blocks are zeroed in both processes, and the next request is as ever."""
    engine, alone = make_engine(tiny_family, ranks), make_engine(tiny_family, None)
    base = engine.runners[engine.models.base.key]
    assert isinstance(base, ShardedRunner)
    messages, forwards = base.messages, base.stats.forwards
    weight = engine.models.experts["qa"].tuned.module.model.norm.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    broken = run(engine, [submission("broken", PROMPT, {"qa": 1.0})])["broken/0"]
    assert broken.last is not None and broken.last.error is not None
    assert base.messages - messages == base.stats.forwards - forwards + 1
    weight.copy_(kept)
    compare(answers(engine), answers(alone))


def test_signals_to_the_whole_group_are_rank_0s(ranks: Ranks, tiny_family: TinyFamily) -> None:
    for pid in ranks.pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    make_engine(tiny_family, ranks)


def test_what_cannot_be_divided_is_refused_before_loading(ranks: Ranks, tmp_path: Path) -> None:
    gpt2 = build_family(tmp_path, "gpt2").base
    with pytest.raises(LoadError, match="no tensor-parallel plan for 'gpt2'"):
        load_family(gpt2, placement=PLACEMENT, load_base=ranks.load)
    llama = config_of("llama", 64, hidden=32, layers=1)
    with pytest.raises(
        LoadError, match="--tensor-parallel 3 does not divide its 4 attention heads; use 2 or 4"
    ):
        check_shardable(llama, 3, "here")
    with pytest.raises(LoadError, match="does not divide its 2 key and value heads; use 2"):
        check_shardable(llama, 4, "here")
    llama.base_model_tp_plan = {**llama.base_model_tp_plan, "layers.*.mlp": "local_params"}
    with pytest.raises(LoadError, match=r"not served \(local_params\); serve it without"):
        check_shardable(llama, 2, "here")


def test_ranks_that_there_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tensor_parallel 2 and quantize int8 exclude each other"):
        EngineConfig(tensor_parallel=2, quantize="int8")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        EngineConfig(tensor_parallel=0)
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(2, gpu, "auto")
    with pytest.raises(LoadError, match="--tensor-parallel 4 needs 4 GPUs, and torch finds 2"):
        check_ranks(4, gpu, "cuda")
    with pytest.raises(LoadError, match="choose them with CUDA_VISIBLE_DEVICES"):
        check_ranks(2, gpu, "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(LoadError, match="hide them with CUDA_VISIBLE_DEVICES=''"):
        check_ranks(2, PLACEMENT, "cpu")
