"""What would be compiled: a warm-up covers what batches need, so that nothing is compiled while serving.

Without a GPU nothing is compiled at all, so these tests watch the launches in the interpreter and compute, from the
arguments, the keys under which Triton would look for a compiled kernel.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("watches the interpreter", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from proxyserve_kernels import Adjustments, Drafts, Needs, PickControls, Ref, Row, RowBatch, Support, Term
from proxyserve_kernels.tilt import Match, SolveControls
from proxyserve_kernels.triton_backend.backend import TritonBackend
from proxyserve_kernels.triton_backend.warmup import representative_rows, warm_up

Keys = set[tuple[Any, ...]]
CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    """Keys of all launches, which are not run: what they would write does not matter here."""
    keys: Keys = set()

    def note(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        keys.add(compiled_key(self, args, kwargs))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    yield keys


def compiled_key(
    kernel: InterpretedFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Kernel, compile-time values, and per run-time argument what Triton specialises on: the dtype and 16-byte
    alignment of a tensor; for an integer whether it is 1, divisible by 16 or wide, unless the kernel says not to."""
    generic = kernel.kwargs.get("do_not_specialize", ())
    key: list[Any] = [kernel.fn.__name__, tuple(sorted(kwargs.items()))]
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif name in generic:
            key.append((name, abs(value) < 2**31))
        else:
            key.append((name, value == 1, value % 16 == 0, abs(value) < 2**31))
    return tuple(key)


def test_the_key_tells_variants_apart(launches: Keys) -> None:
    backend = TritonBackend(CPU)
    source = torch.zeros(2, 512)
    backend.fused_scores(RowBatch.of([source], [Row(Ref(0, 0), 500)]))
    before = len(launches)
    backend.fused_scores(RowBatch.of([source], [Row(Ref(0, 0), 400)]))
    assert len(launches) == before, "the width is no reason to compile"
    backend.fused_scores(RowBatch.of([source.half()], [Row(Ref(0, 0), 400)]))
    assert len(launches) == before + 1, "the dtype is"


@pytest.mark.parametrize("seed", range(3))
def test_serving_compiles_nothing_after_a_warm_up(seed: int, launches: Keys) -> None:
    generator = random.Random(seed)
    dtypes = (torch.bfloat16, torch.float32) if seed else (torch.bfloat16,)
    vocabulary, max_batch, max_terms, max_laws = 1500, 40, 2, 1
    backend = TritonBackend(CPU)
    everything = Needs(
        dtypes,
        vocabulary,
        max_batch,
        max_terms,
        20,
        rules=True,
        laws=max_laws,
        uncompared=True,
        dynamic=True,
        speculation=True,
    )
    warm_up(CPU, everything, print)
    warm = set(launches)
    assert len(warm) > 50
    for _ in range(40):
        sources = [torch.zeros(max_batch, 1536, dtype=generator.choice(dtypes)) for _ in range(3)]
        rows = [
            some_row(generator, max_terms, max_laws, vocabulary)
            for _ in range(generator.randint(1, max_batch))
        ]
        if generator.random() < 0.5:
            rows = [row._replace(support=None) for row in rows]
        batch = RowBatch.of(sources, rows)
        asked = some_controls(generator, len(rows))
        backend.pick(batch, asked)
        if len(rows) >= 2:
            backend.verify(batch, asked, some_drafts(generator, sources, len(rows)))
        match = torch.tensor([generator.choice(list(Match)) for _ in rows])
        backend.solve(batch, SolveControls(match, torch.ones(len(rows)), torch.ones(len(rows))))
        missing = list(launches - warm)
        assert not missing, "\n".join(str(key) for key in missing[:3])


def test_a_warm_up_that_is_too_narrow_is_seen(launches: Keys) -> None:
    backend = TritonBackend(CPU)
    warm_up(CPU, Needs((torch.float32,), 1500, 4), print)
    warm = set(launches)
    lanes = torch.zeros(5, 1536)
    pairs = tuple(Term(Ref(0, 1), Ref(0, 2)) for _ in range(2))
    batch = RowBatch.of([lanes], [Row(Ref(0, 0), 1500, pairs)])
    backend.pick(batch, PickControls.greedy(1))
    assert launches - warm


def some_row(generator: random.Random, max_terms: int, max_laws: int, vocabulary: int) -> Row:
    refs = [Ref(generator.randrange(3), generator.randrange(40)) for _ in range(6)]
    terms = tuple(
        Term(refs[1], generator.choice((refs[2], None))) for _ in range(generator.randint(0, max_terms))
    )
    support = Support(tuple(refs[3 : 3 + generator.randint(1, max_laws)]), top_p=0.9)
    return Row(
        refs[0], generator.randint(1, vocabulary), terms, support=generator.choice((None, support)), clip=50.0
    )  # fmt: skip


def some_drafts(generator: random.Random, sources: list[torch.Tensor], rows: int) -> Drafts:
    """One draft for each pair of rows, from a plain row."""
    n = rows // 2
    laws = RowBatch.of(sources, [Row(Ref(generator.randrange(3), 0), 1000) for _ in range(n)])
    return Drafts(
        tokens=torch.zeros(n, 1, dtype=torch.int64),
        rows=torch.arange(2 * n).view(n, 2),
        laws=laws,
        law_controls=some_controls(generator, n),
        law_rows=torch.arange(n).view(n, 1),
    )


def some_controls(generator: random.Random, rows: int) -> PickControls:
    def floats(*choices: float) -> torch.Tensor:
        return torch.tensor([generator.choice(choices) for _ in range(rows)])

    wishes = [generator.choice((None, 0, 1, 5, 20)) for _ in range(rows)]
    return PickControls(
        temperature=floats(0.0, 1.0, 0.7),
        top_k=floats(0.0, 5.0).long(),
        top_p=floats(1.0, 0.9),
        min_p=floats(0.0, 0.1),
        seeds=torch.zeros(rows, dtype=torch.int64),
        positions=torch.zeros(rows, dtype=torch.int64),
        raw=generator.choice((wishes, [None] * rows)),
        processed=generator.choice((wishes, None)),
        adjustments=generator.choice((None, Adjustments.none())),
        compare=generator.random() < 0.7,
        listed=generator.choice((None, torch.zeros(rows, generator.randint(1, 70), dtype=torch.int64))),
    )


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_not_asked_for_launches_nothing(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels for a plain pick; a removed mass is told by the same two, named tokens by one more."""
    names: list[str] = []

    def note(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    controls = PickControls.greedy(1)
    if asked:
        index, masks = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)
        masked = replace(Adjustments.none(), masks=masks, mask_of=index, removed_by=index)
        controls = replace(
            controls, adjustments=masked, listed=torch.zeros(1, 3, dtype=torch.int64), raw=(0,)
        )
    TritonBackend(CPU).pick(RowBatch.of([torch.zeros(1, 512)], [Row(Ref(0, 0), 500)]), controls)
    assert names == ["fuse_stats", "pick", *(["count_before", "listed_logprobs"] if asked else [])]


def test_every_tile_is_launched_by_some_batch_size() -> None:
    from proxyserve_kernels.triton_backend.tuning import TILES, tile_for

    rows = representative_rows(256, 128_256)
    assert {tile_for(count, 501) for count in rows} == set(TILES)
    assert representative_rows(1, 128_256) == [1]
