"""Compile, before the first request, every variant that requests can need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.backend import Needs
from proxyserve_kernels.controls import Adjustments, PickControls
from proxyserve_kernels.rows import BLOCK, Ref, Row, RowBatch, Support, Term
from proxyserve_kernels.speculation import Drafts
from proxyserve_kernels.tilt import Match, SolveControls
from proxyserve_kernels.triton_backend.launch import LISTS, list_size
from proxyserve_kernels.triton_backend.results import read_picks
from proxyserve_kernels.triton_backend.run import run
from proxyserve_kernels.triton_backend.solve import pair_divergences, solve
from proxyserve_kernels.triton_backend.table import LAW_COUNTS, TERM_COUNTS, fitting
from proxyserve_kernels.triton_backend.tuning import Tile, tile_for
from proxyserve_kernels.triton_backend.verify import judge


def warm_up(device: torch.device, needs: Needs, progress: Callable[[str], None]) -> None:
    """Run every kernel once in every variant that `needs` names."""
    mixtures: list[tuple[torch.dtype, ...]] = [(dtype,) for dtype in dict.fromkeys(needs.dtypes)]
    if len(mixtures) > 1:
        mixtures.append(tuple(dict.fromkeys(needs.dtypes)))
    pitch = -(-needs.vocabulary // BLOCK) * BLOCK
    for mixture in mixtures:
        sources = [torch.zeros(1, pitch, dtype=dtype, device=device) for dtype in mixture]
        for terms in _upto(TERM_COUNTS, needs.terms):
            # Rules look at all lanes of a batch at once, drafts at twice their requests.
            for rows in representative_rows(needs.rows * (2 * terms + 1), needs.vocabulary):
                kind = "+".join(str(dtype).removeprefix("torch.") for dtype in mixture)
                progress(f"compiling kernels: {kind}, {terms} terms, {rows} rows")
                plain = _row(len(sources), needs.vocabulary, terms)
                if needs.dynamic:
                    _dynamic(RowBatch.of(sources, [plain] * rows))
                for row in (
                    plain,
                    *(_ruled(plain, laws) for laws in _upto(LAW_COUNTS, needs.laws) if needs.rules),
                ):
                    _pick(RowBatch.of(sources, [row] * rows), needs)
                    if needs.speculation:
                        _speculate(row, sources, rows, (True, False) if needs.uncompared else (True,))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def representative_rows(max_batch: int, vocabulary: int) -> list[int]:
    """One batch size for each tile that batches of up to `max_batch` rows are launched with."""
    sizes: dict[Tile, int] = {}
    rows = 1
    while True:
        sizes.setdefault(tile_for(rows, -(-vocabulary // BLOCK)), rows)
        if rows >= max_batch:
            return list(sizes.values())
        rows *= 2


def _upto(sizes: Sequence[int], most: int) -> list[int]:
    """The `sizes` that batches with at most `most` are rounded up to."""
    enough = fitting(most, sizes, "terms or laws")
    return [size for size in sizes if size <= enough]


def _ruled(row: Row, laws: int) -> Row:
    """The row with a rule, and a support of as many laws."""
    support = Support(tuple(Ref(0, 0) for _ in range(laws)), top_p=0.5) if laws else None
    return row._replace(normalise=True, support=support)


def _row(sources: int, vocabulary: int, terms: int) -> Row:
    """A row that reads every source."""
    refs = [Ref(number % sources, 0) for number in range(2 * terms + 1)]
    pairs = tuple(Term(refs[2 * term + 1], refs[2 * term + 2]) for term in range(terms))
    return Row(refs[0], vocabulary, pairs)


def controls(rows: int, listed: int) -> Iterator[PickControls]:
    """Controls that between them need every variant of the pick's kernels: with and without adjustments, temperature,
    filters, lists of each size up to that of `listed` tokens, and log-probs of named ones."""
    sizes = [size for size in LISTS if size <= list_size(listed)]
    lists: list[tuple[int | None, int | None]] = [(None, None), (0, 0), *((size, size) for size in sizes)]
    for adjustments in (None, Adjustments.none()):
        for temperature in (1.0, 0.5):
            for top_p in (1.0, 0.5):
                for raw, processed in lists:
                    yield replace(
                        PickControls.greedy(rows),
                        temperature=torch.full((rows,), temperature),
                        top_p=torch.full((rows,), top_p),
                        raw=(raw,) * rows,
                        processed=(processed,) * rows,
                        adjustments=adjustments,
                        listed=None if raw is None else torch.zeros(rows, 1, dtype=torch.int64),
                    )


def _pick(batch: RowBatch, needs: Needs) -> None:
    for settings in controls(batch.size, needs.listed):
        for compare in (True, False) if needs.uncompared else (True,):
            asked = replace(settings, compare=compare)
            table, buffers, wishes = run(batch, asked)
            read_picks(table, buffers, asked, wishes)


def _dynamic(batch: RowBatch) -> None:
    B = batch.size
    for match in (Match.FORWARD, Match.BOTH, Match.PAPER):
        solve(batch, SolveControls(torch.full((B,), int(match)), torch.full((B,), 2.0), torch.ones(B)))
    pair_divergences(batch)


def _speculate(row: Row, sources: Sequence[Tensor], requests: int, compares: Sequence[bool]) -> None:
    """One draft per request, drawn from a model's row by itself."""
    n = requests
    target = RowBatch.of(sources, [row] * (2 * n))
    law = RowBatch.of(sources, [Row(row.base, row.width)] * n)
    for adjustments in (None, Adjustments.none()):
        for temperature in (1.0, 0.5):
            sampled = [
                replace(
                    PickControls.greedy(size),
                    temperature=torch.full((size,), temperature),
                    adjustments=adjustments,
                )
                for size in (2 * n, n)
            ]
            drafts = Drafts(
                tokens=torch.zeros(n, 1, dtype=torch.int64),
                rows=torch.arange(2 * n).view(n, 2),
                laws=law,
                law_controls=sampled[1],
                law_rows=torch.arange(n).view(n, 1),
            )
            for compare in compares:
                judge(target, replace(sampled[0], compare=compare), drafts, "rejection")
