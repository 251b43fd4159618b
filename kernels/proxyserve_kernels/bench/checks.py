"""Whether the kernels are right on this device, what they compile to, and that serving compiles nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product

import torch
from torch import Tensor

from proxyserve_kernels import (
    Adjustments,
    Match,
    Needs,
    PickControls,
    Picks,
    Ref,
    Row,
    RowBatch,
    SolveControls,
    Term,
)
from proxyserve_kernels import reference as slow
from proxyserve_kernels.bench.inputs import controls, fused_batch, lanes
from proxyserve_kernels.bench.kernels import speculation
from proxyserve_kernels.bench.report import Table
from proxyserve_kernels.bench.shared import Bench
from proxyserve_kernels.torch_backend.backend import TorchBackend
from proxyserve_kernels.triton_backend.launch import Buffers, interpreted, launch_pick
from proxyserve_kernels.triton_backend.run import wishes_of
from proxyserve_kernels.triton_backend.table import build_table
from proxyserve_kernels.triton_backend.tuning import TILES

#: Largest difference of log-probs and KL, in nats: both sides are float32 sums over a vocabulary.
NEAR = 1e-3

#: Share of rows whose token may differ between two orders of summation: a race or a nucleus decided by rounding.
MAY_DIFFER = 0.01

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def correct_section(bench: Bench) -> None:
    """Against torch, against float64, against itself in other tiles and batches, and on broken rows."""
    with bench.report.table("correct", "`differ`: rows or values that are not what they must be") as rows:
        for check in (_bad_rows, _tiles, _neighbours, _far, _reference, _dynamic, _speculative, _torch):
            if bench.over():
                return
            bench.report.progress(f"correct: {check.__name__.removeprefix('_')}")
            check(bench, rows)


def mixed_controls(rows: int) -> PickControls:
    """Greedy, plain and filtered rows in turn, all reported on and compared with their base."""
    turn = torch.arange(rows) % 6
    return replace(
        controls(rows, logprobs=5, compare=True),
        temperature=torch.tensor([0.8, 0.0, 1.0, 0.8, 0.8, 1.3])[turn],
        top_k=torch.tensor([0, 0, 20, 0, 50, 0])[turn],
        top_p=torch.tensor([0.9, 1.0, 1.0, 1.0, 0.95, 1.0])[turn],
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.02])[turn],
    )


def _torch(bench: Bench, rows: Table) -> None:
    """The torch backend on the same device, over dtypes, vocabularies and terms."""
    size, differing, total = 2 if bench.dry else 12, 0, 0
    plan = [*product(bench.vocabularies, DTYPES, (0, 1, 2, 4))]
    for vocabulary, dtype, terms in plan[1:2] if bench.dry else plan:
        if bench.over():
            break
        batch = fused_batch(
            lanes(size, vocabulary, dtype, bench.device, 1 + 2 * terms, shape="mid"), 1 / max(1, terms)
        )
        asked = mixed_controls(size)
        ours, twins = bench.backend.pick(batch, asked), TorchBackend().pick(batch, asked)
        assert ours.raw is not None and twins.raw is not None
        same = ours.tokens == twins.tokens
        differing, total = differing + int((~same).sum()), total + size
        chosen = torch.where(same, ours.raw.chosen - twins.raw.chosen, 0.0)
        worst = max(_worst(chosen), _worst(ours.raw.values - twins.raw.values), _worst(ours.kl - twins.kl))
        kind = str(dtype).removeprefix("torch.")
        what = f"torch V={vocabulary} {kind} terms={terms}"
        rows.append({"check": what, "rows": size, "differ": int((~same).sum()), "worst nats": worst})
        bench.report.check(worst <= NEAR, f"{what}: log-probs or KL differ by {worst:.2g} nats")
    allowed = max(1, math.floor(MAY_DIFFER * total))
    bench.report.check(differing <= allowed, f"tokens of {differing} of {total} rows are not those of torch")


def _reference(bench: Bench, rows: Table) -> None:
    """float64 on the host: law and KL of three rows of every dtype, and the token unless rounding decided it."""
    size = 1 if bench.dry else 3
    for dtype in DTYPES[:1] if bench.dry else DTYPES:
        batch = fused_batch(lanes(size, bench.vocabularies[0], dtype, bench.device, 3, shape="mid"))
        asked = mixed_controls(size)
        picks = bench.backend.pick(batch, asked)
        assert picks.raw is not None
        worst, differ = 0.0, 0
        for row in range(size):
            law, token = slow.raw_law(batch, row), int(picks.tokens[row])
            worst = max(worst, abs(float(law[token]) - float(picks.raw.chosen[row])))
            divergence = slow.kl(law, slow.reference_law(batch, row))
            worst = max(worst, abs(divergence - float(picks.kl[row])) / max(1.0, divergence))
            if float(asked.temperature[row]) == 0.0:
                expected, margin = int(law.argmax()), math.inf
            else:
                processed = slow.processed_law(batch, asked, row)
                expected, margin = slow.race(processed, int(asked.seeds[row]), int(asked.positions[row]))
            differ += expected != token and margin > NEAR
        what = f"float64 {str(dtype).removeprefix('torch.')}"
        rows.append({"check": what, "rows": size, "differ": differ, "worst nats": worst})
        bench.report.check(worst <= NEAR and differ == 0, f"{what}: {differ} tokens, {worst:.2g} nats")


def _tiles(bench: Bench, rows: Table) -> None:
    """The same bits in every tile."""
    for size in bench.batches[:2]:
        # No reports: their buffers are of the size of one tile.
        asked = replace(mixed_controls(size), raw=(None,) * size)
        wishes = wishes_of(asked)
        batch = fused_batch(lanes(size, bench.vocabulary, torch.bfloat16, bench.device, 3, shape="mid"))
        table = build_table(batch, asked)
        results: list[list[bytes]] = []
        for tile in TILES:
            buffers = Buffers.allocate(table.bucket, table.blocks, wishes, bench.device)
            for entry in fields(buffers):
                getattr(buffers, entry.name).fill_(-7)  # what nobody wrote must show
            launch_pick(table, buffers, wishes, tile)
            written = (buffers.tokens, buffers.valid, buffers.kl, buffers.flips, buffers.reports[:, :size])
            results.append([_bits(tensor) for tensor in (*written, buffers.stats)])
        differ = sum(result != results[0] for result in results)
        what = f"bits in {len(TILES)} tiles, B={size}"
        rows.append({"check": what, "rows": size, "differ": differ})
        bench.report.check(differ == 0, what)


def _neighbours(bench: Bench, rows: Table) -> None:
    """The same bits for a row alone, among 7, and among 64."""
    sizes = (1, 2) if bench.dry else (1, 7, 64)
    sources = lanes(sizes[-1], bench.vocabulary, torch.bfloat16, bench.device, 3, shape="mid")
    whole = bench.backend.pick(fused_batch(sources), mixed_controls(sizes[-1]))
    for size in sizes[:-1]:
        own = bench.backend.pick(fused_batch([source[:size] for source in sources]), mixed_controls(size))
        differ = sum(_row_bits(own, row) != _row_bits(whole, row) for row in range(size))
        what = f"bits of {size} among {sizes[-1]} rows"
        rows.append({"check": what, "rows": size, "differ": differ})
        bench.report.check(differ == 0, what)


def _bad_rows(bench: Bench, rows: Table) -> None:
    """NaN, +inf and rows without any token are flagged and touch no other row."""
    width = bench.vocabulary
    good = [True, False, False, False, True, False, True, False]
    size = len(good)
    sources = lanes(size, width, torch.bfloat16, bench.device, 3, shape="mid")
    asked = mixed_controls(size)
    mask = torch.stack([torch.full((-(-width // 32),), -1), torch.zeros(-(-width // 32))]).to(torch.int32)
    of = torch.full((size,), -1, dtype=torch.int64)
    of[7] = 1
    asked = replace(asked, adjustments=replace(Adjustments.none(), masks=mask, mask_of=of))
    clean = bench.backend.pick(fused_batch(sources), replace(asked, adjustments=_unmasked(size, mask)))
    base, tuned = sources[0], sources[1]
    base[1, width // 2], base[2, width // 3] = math.nan, math.inf
    base[3] = -math.inf
    base[4, : width // 2] = -math.inf
    tuned[5, width - 1] = math.nan
    picks = bench.backend.pick(fused_batch(sources), asked)
    expected = torch.tensor(good, device=bench.device)
    differ = int((picks.valid != expected).sum()) + int(((picks.tokens >= 0) != expected).sum())
    untouched = sum(_row_bits(picks, row) != _row_bits(clean, row) for row in (0, 6))
    rows.append({"check": "NaN, inf, empty, all masked", "rows": size, "differ": differ + untouched})
    bench.report.check(differ == 0, f"broken rows: valid is {picks.valid.tolist()}, not {good}")
    bench.report.check(untouched == 0, "broken rows change their neighbours")


def _unmasked(size: int, mask: Tensor) -> Adjustments:
    return replace(Adjustments.none(), masks=mask, mask_of=torch.full((size,), -1, dtype=torch.int64))


def _far(bench: Bench, rows: Table) -> None:
    """A source of more than 2**31 entries."""
    width = bench.vocabulary
    count = 4 if bench.dry else 2**31 // width + 10
    near = lanes(2, width, torch.bfloat16, bench.device, 3, shape="mid")
    far = torch.empty(count, near[0].stride(0), dtype=torch.bfloat16, device=bench.device)[:, :width]
    far[-2:] = near[0]
    pairs = [(Term(Ref(1, row), Ref(2, row)),) for row in range(2)]
    asked = mixed_controls(2)
    results = [
        bench.backend.pick(
            RowBatch.of(
                [source, *near[1:]], [Row(Ref(0, first + row), width, pairs[row]) for row in range(2)]
            ),
            asked,
        )
        for source, first in ((near[0], 0), (far, count - 2))
    ]
    differ = sum(_row_bits(results[0], row) != _row_bits(results[1], row) for row in range(2))
    entries = f"{count * far.stride(0):,} entries"
    rows.append({"check": f"source of {entries}", "rows": 2, "differ": differ})
    bench.report.check(differ == 0, f"rows at the end of a source of {entries}")


def _dynamic(bench: Bench, rows: Table) -> None:
    """Multipliers beside those of torch."""
    size = 1 if bench.dry else 16
    batch = fused_batch(lanes(size, bench.vocabulary, torch.bfloat16, bench.device, 3, shape="mid"))
    for match in (Match.FORWARD,) if bench.dry else (Match.FORWARD, Match.REVERSE, Match.BOTH, Match.PAPER):
        asked = SolveControls(torch.full((size,), int(match)), torch.full((size,), 2.0), torch.ones(size))
        ours, twins = bench.backend.solve(batch, asked), TorchBackend().solve(batch, asked)
        close = (ours.multiplier - twins.multiplier).abs() <= 1e-3 * twins.multiplier.abs() + 1e-5
        differ = int((~close).sum())
        rows.append({"check": f"solve {match.name}", "rows": size, "differ": differ})
        # Rounding may decide between two points of a grid.
        allowed = 1 if match == Match.PAPER else 0
        bench.report.check(differ <= allowed, f"solve {match.name}: {differ} of {size} multipliers")


def _speculative(bench: Bench, rows: Table) -> None:
    """Verdicts beside those of torch."""
    requests, k = (1, 2) if bench.dry else (16, 4)
    batch, asked, drafts = speculation(bench, requests, k)
    for rule in ("rejection", "shared_noise"):
        ours, twins = (own.verify(batch, asked, drafts, rule) for own in (bench.backend, TorchBackend()))
        differ = int((ours.tokens != twins.tokens).any(dim=1).sum())
        rows.append({"check": f"verify {rule}", "rows": requests, "differ": differ})
        bench.report.check(
            differ <= max(0, requests // 16), f"verify {rule}: {differ} of {requests} verdicts"
        )


def _worst(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=math.inf).max())


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _row_bits(picks: Picks, row: int) -> list[bytes]:
    assert picks.raw is not None
    own = (
        picks.tokens,
        picks.valid,
        picks.kl,
        picks.flips,
        *(getattr(picks.raw, f.name) for f in fields(picks.raw)),
    )
    return [_bits(tensor[row : row + 1]) for tensor in own]


def warm_up_section(bench: Bench) -> None:
    """How long a warm-up takes, and that picks, solutions and verdicts after it compile nothing."""
    with bench.report.table("warm-up", f"bf16, one pair, V={bench.vocabulary}") as rows:
        begin = time.perf_counter()
        before = bench.backend.compilations
        largest = max(bench.batches)
        bench.backend.warm_up(
            Needs(
                (torch.bfloat16,),
                bench.vocabulary,
                largest,
                listed=20,
                uncompared=True,
                dynamic=True,
                speculation=True,
            )
        )
        bench.warm = True
        rows.append({"what": "seconds", "value": time.perf_counter() - begin})
        rows.append({"what": "variants compiled before", "value": before})
        sizes = [1] if bench.dry else [1, 3, 8, 64, largest]
        batches = {
            size: fused_batch(lanes(size, bench.vocabulary, torch.bfloat16, bench.device)) for size in sizes
        }
        both = {
            size: SolveControls(
                torch.full((size,), int(Match.BOTH)), torch.full((size,), 2.0), torch.ones(size)
            )
            for size in sizes
        }
        uses: dict[str, Callable[[int], object]] = {
            "pick, all kinds of rows": lambda size: bench.backend.pick(batches[size], mixed_controls(size)),
            "pick, log-probs": lambda size: bench.backend.pick(
                batches[size], controls(size, temperature=1.0, logprobs=20, compare=True)
            ),
            "solve": lambda size: bench.backend.solve(batches[size], both[size]),
            "verify": lambda size: bench.backend.verify(*speculation(bench, max(1, size // 4), 2)),
        }
        total = 0
        for name, use in uses.items():
            for size in sizes:
                before = bench.backend.compilations
                use(size)
                compiled = bench.backend.compilations - before
                total += compiled
                if compiled or size == sizes[-1]:
                    rows.append({"what": f"compiled by {name}, B={size}", "value": compiled})
        bench.report.goal("kernels compiled by calls after the warm-up", "0", float(total), "", total == 0)


def compile_section(bench: Bench) -> None:
    """Registers, spills and loads beside the budgets, as compiled by the Triton of this machine."""
    from proxyserve_kernels.triton_backend.aot import compile_case
    from proxyserve_kernels.triton_backend.budgets import cases

    with bench.report.table("compile", "for sm_90; `over`: what is beyond the budget") as rows:
        if interpreted():
            return
        over = 0
        for case in cases():
            if bench.over():
                break
            made = compile_case(case)
            over += bool(made.over)
            rows.append({
                "variant": made.name, "registers": made.registers, "budget": case.budget.registers,
                "spilled": made.spilled, "instr/token": made.instructions,
                "loads": " ".join(f"{width}b:{count}" for width, count in sorted(made.loads.items())),
                "over": "; ".join(made.over),
            })  # fmt: skip
        bench.report.goal(f"variants over their budget, of {len(rows)}", "0", float(over), "", over == 0)
