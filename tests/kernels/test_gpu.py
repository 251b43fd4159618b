"""What only a GPU can show: graphs, compilation counts, addresses beyond 2**31. The other kernel tests use the GPU,
too, where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from proxyserve_kernels import Needs, PickControls, Ref, Row, RowBatch, Term, backend_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY = 128_256


def batch_of(rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> RowBatch:
    generator = torch.Generator("cuda").manual_seed(seed)
    sources = [
        (4 * torch.randn(rows, VOCABULARY, device="cuda", generator=generator)).to(dtype) for _ in range(3)
    ]
    described = [
        Row(Ref(0, row), VOCABULARY, (Term(Ref(1, row), Ref(2, row), 0.7),) if row % 3 else ())
        for row in range(rows)
    ]
    return RowBatch.of(sources, described)


def controls_of(rows: int, **changes: object) -> PickControls:
    return replace(
        PickControls.greedy(rows),
        temperature=torch.arange(rows) % 2 * 0.8,
        seeds=torch.arange(rows),
        positions=torch.arange(rows) + 7,
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.999])
def test_tokens_are_those_of_torch(rows: int, top_p: float) -> None:
    batch = batch_of(rows)
    controls = controls_of(rows, top_p=torch.full((rows,), top_p), raw=(5,) * rows)
    picks, twins = (
        backend_for("cuda").pick(batch, controls),
        backend_for("cuda", "torch").pick(batch, controls),
    )
    assert torch.equal(picks.tokens, twins.tokens) and torch.equal(picks.flips, twins.flips)
    torch.testing.assert_close(picks.kl, twins.kl, atol=1e-4, rtol=1e-4)
    assert picks.raw is not None and twins.raw is not None
    assert torch.equal(picks.raw.ids, twins.raw.ids) and torch.equal(picks.raw.ranks, twins.raw.ranks)
    torch.testing.assert_close(picks.raw.values, twins.raw.values, atol=1e-4, rtol=1e-5)


def test_a_captured_pick_follows_its_table() -> None:
    from proxyserve_kernels.triton_backend.launch import Buffers, Wishes, launch_pick
    from proxyserve_kernels.triton_backend.table import build_table

    wishes = Wishes(filters=True, scales=True, raw=5)
    asked = {"top_p": torch.full((8,), 0.9), "raw": (5,) * 8}
    first, second = batch_of(8), batch_of(8, seed=1)
    table, other = build_table(first, controls_of(8, **asked)), build_table(second, controls_of(8, **asked))
    buffers = Buffers.allocate(table.bucket, table.blocks, wishes, torch.device("cuda"))
    launch_pick(table, buffers, wishes)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_pick(table, buffers, wishes)
    for batch, values in ((second, other), (first, build_table(first, controls_of(8, **asked)))):
        table.ints.copy_(values.ints)
        table.floats.copy_(values.floats)
        graph.replay()
        expected = backend_for("cuda", "torch").pick(batch, controls_of(8, **asked))
        assert torch.equal(buffers.tokens, expected.tokens)


def test_nothing_is_compiled_after_a_warm_up() -> None:
    backend = backend_for("cuda", "triton")
    backend.warm_up(Needs((torch.bfloat16,), VOCABULARY, 64, listed=20))
    for rows in (1, 3, 64):
        for top_p in (1.0, 0.9):
            for raw in ((None,) * rows, (5,) * rows):
                backend.pick(batch_of(rows), controls_of(rows, top_p=torch.full((rows,), top_p), raw=raw))
    assert backend.compilations == 0
    backend.pick(batch_of(2, torch.float16), controls_of(2))
    assert backend.compilations > 0, "the counter counts"


def test_rows_beyond_two_to_the_31_entries() -> None:
    rows = 2**31 // VOCABULARY + 3
    source = torch.zeros(rows, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    source[rows - 1, 77] = 5.0
    batch = RowBatch.of([source], [Row(Ref(0, rows - 1), VOCABULARY), Row(Ref(0, 0), VOCABULARY)])
    assert backend_for("cuda").pick(batch, PickControls.greedy(2)).tokens.tolist() == [77, 0]
