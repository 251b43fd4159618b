"""Kernels for paged attention beside gathered blocks: the same logits, and calls as the kernels' documentation wants
them. What a GPU would run is done in plain torch here."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from proxyserve.engine.attention import AttentionPlan, Features, Span
from proxyserve.engine.cuda.alike import Alike
from proxyserve.engine.cuda.choose import Attention, choose_attention
from proxyserve.engine.cuda.flashinfer import FlashInferAttention
from proxyserve.engine.cuda.pages import PageLists
from proxyserve.engine.cuda.varlen import VarlenAttention
from proxyserve.engine.kv_storage import KVStorage, LayerShape
from proxyserve.engine.runner import Runner
from proxyserve.models.model_set import ModelSet
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork
from tests.engine import fake_flashinfer

BLOCK = 4
#: (lane, tokens) of each step: chunks of prompts, single tokens, and both.
STEPS = [[(0, 7), (1, 1)], [(0, 1), (1, 5), (2, 3)], [(0, 1), (1, 1), (2, 1)], [(2, 4), (0, 3)]]
PLAIN = Features(heads=4, scale=0.25, window=None, softcap=None, sinks=False)
SHAPE = LayerShape(2, 64, 64)


@pytest.fixture(scope="module")
def runner(tiny_models: ModelSet) -> Runner:
    return Runner(tiny_models.base)  # type: ignore[arg-type]


def alike(runner: Runner) -> Alike:
    """Of a tiny model, whose heads are smaller than those that kernels take."""
    config = runner.model.module.config
    size = config.hidden_size // config.num_attention_heads
    return Alike(config.num_attention_heads, config.num_key_value_heads, size, size**-0.5, torch.float32)


def logits(runner: Runner, attention: Attention) -> list[Tensor]:
    """Of three lanes in several steps, their blocks in no order."""
    storage = KVStorage(
        runner.shapes, num_blocks=24, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu")
    )
    runner.attach(storage)
    usual, runner.attention = runner.attention, attention
    blocks = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    lanes: list[Lane] = []
    output: list[int] = []
    for number in range(3):
        lane = Lane(runner.model.key, tuple(5 + (number + 1) * k for k in range(30)), output)
        lane.blocks = blocks[8 * number : 8 * number + 8]
        lanes.append(lane)
    request = ScheduledRequest("r", tuple(lanes), output)
    found = []
    with torch.inference_mode():
        for step in STEPS:
            work = [LaneWork(request, lanes[n], lanes[n].computed, count, rows=count) for n, count in step]
            found.append(runner.run(work))
            for number, count in step:
                lanes[number].computed += count
    runner.detach()
    runner.attention = usual
    return found


def test_flashinfer(runner: Runner) -> None:
    """One plan per forward, and as many calls as layers."""
    kernels = FlashInferAttention(fake_flashinfer, alike(runner), torch.device("cpu"))  # type: ignore[arg-type]
    got = logits(runner, Attention("flashinfer", kernels.plan, kernels.reserve))
    assert kernels._ragged.plans == len(STEPS)
    for mine, plain in zip(got, logits(runner, runner.attention), strict=True):
        torch.testing.assert_close(mine, plain, atol=5e-5, rtol=0)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as its docstring has it, for causal attention over pages."""
    assert window_size == (-1, 0)
    assert scale is not None
    assert seqused_k is not None
    assert block_table is not None
    assert cu_seq_k is None, "the lengths say it"
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    starts, lengths = cu_seq_q.tolist(), seqused_k.tolist()
    assert max_q == max(cu_seq_q.diff().tolist())
    assert max_k == max(lengths)
    out = torch.full_like(query, torch.nan)
    for row, length in enumerate(lengths):
        seen = [tensor[block_table[row].long()].flatten(0, 1)[:length] for tensor in (key, value)]
        begin, end = starts[row : row + 2]
        out[begin:end] = fake_flashinfer.attend(query[begin:end], *seen, scale)
    return out


def test_varlen(runner: Runner) -> None:
    got = logits(runner, Attention("varlen", VarlenAttention(varlen).plan, runner.attention.reserve))
    for mine, plain in zip(got, logits(runner, runner.attention), strict=True):
        torch.testing.assert_close(mine, plain, atol=5e-5, rtol=0)


def test_page_lists() -> None:
    lists = PageLists.of([Span([7, 3, 9], 5, 2), Span([2], 0, 4), Span([8, 6], 7, 1)], BLOCK)
    assert lists.queries.tolist() == [0, 2, 6, 7]
    assert lists.pages.tolist() == [7, 3, 2, 8, 6]  # not the block that is held for later
    assert lists.starts.tolist() == [0, 2, 3, 5]
    assert lists.last.tolist() == [3, 4, 4]
    assert lists.table().tolist() == [[7, 3], [2, 0], [8, 6]]


@pytest.mark.parametrize(
    ("shapes", "features", "dtype"),
    [
        ([SHAPE] * 2, [PLAIN] * 2, torch.float32),
        ([SHAPE, LayerShape(2, 128, 128)], [PLAIN] * 2, torch.bfloat16),
        ([LayerShape(2, 64, 32)] * 2, [PLAIN] * 2, torch.bfloat16),
        ([LayerShape(2, 48, 48)] * 2, [PLAIN] * 2, torch.bfloat16),
        ([SHAPE] * 2, [Features(4, 0.25, 7, None, False)] * 2, torch.bfloat16),
        ([SHAPE] * 2, [Features(4, 0.25, None, 50.0, False)] * 2, torch.bfloat16),
        ([SHAPE] * 2, [Features(4, 0.25, None, None, True)] * 2, torch.bfloat16),
        ([SHAPE] * 2, [PLAIN, Features(4, 0.5, None, None, False)], torch.bfloat16),
    ],
    ids=["float32", "unlike layers", "value size", "odd size", "window", "soft cap", "sinks", "scales"],
)
def test_what_falls_back(shapes: list[LayerShape], features: list[Features], dtype: torch.dtype) -> None:
    assert Alike.of(shapes, features, dtype) is None


def test_which_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, what is installed, and what the model needs."""
    monkeypatch.setattr("proxyserve.engine.cuda.flashinfer.WORKSPACE_BYTES", 16)
    # No GPU is here to allocate on.
    empty: Callable[..., Tensor] = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **options: empty(*shape, **{**options, "device": "cpu"})
    )

    def chosen(device: str, features: Features = PLAIN) -> str:
        return choose_attention([SHAPE] * 2, [features] * 2, torch.bfloat16, torch.device(device)).name

    assert chosen("cpu") == "gather"
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr("proxyserve.engine.cuda.choose.find_varlen", lambda _: varlen)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen("cuda") == "varlen"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "flashinfer" or None)
    assert chosen("cuda") == "varlen"  # installed, and not to be imported
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    assert chosen("cuda") == "flashinfer"
    assert chosen("cuda", Features(4, 0.25, 7, None, False)) == "gather"
    assert AttentionPlan.of == choose_attention([SHAPE], [PLAIN], torch.float32, torch.device("cuda")).plan
