"""Every kernel beside its prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from proxyserve_kernels import (
    Adjustments,
    Drafts,
    Match,
    PickControls,
    Ref,
    Row,
    RowBatch,
    SolveControls,
)
from proxyserve_kernels.bench.inputs import SHAPES, SHAPES_NOTE, controls, fused_batch, lanes
from proxyserve_kernels.bench.machine import copy_rate
from proxyserve_kernels.bench.rotation import Rotation, input_bytes
from proxyserve_kernels.bench.shared import Bench
from proxyserve_kernels.triton_backend.launch import Wishes, launch_stats
from proxyserve_kernels.triton_backend.solve import GRID, STEPS, Curves
from proxyserve_kernels.triton_backend.table import build_table
from proxyserve_kernels.triton_backend.tuning import TILES, Tile, tile_for

#: Calls on one set, one after another, that say what a warm L2 cache brings.
WARM_CALLS = 20

#: Goals: K1's share of the copy bandwidth (at 64 rows of 128k and more), microseconds of a whole step by batch.
SHARE = 0.90
STEPS_US = {1: 10.0, 64: 25.0, 256: 70.0}

#: Bytes of a rotation where many things are measured and cold reads are not the point.
SHORT = 100_000_000


def sweep_section(bench: Bench) -> None:
    """K1 alone: first the default tile everywhere, then what tiles, extras and a warm cache change."""
    note = "K1 alone, cold unless `warm`; GB/s and % of copy count the logits, read once"
    with bench.report.table("k1", note) as rows:
        rate = copy_rate(bench)

        def measure(
            batch: int, vocabulary: int, dtype: torch.dtype, terms: int, extra: list[str], tiles: list[Tile]
        ) -> None:
            rotation = bench.rotation(batch, vocabulary, dtype, terms, controls)
            size = input_bytes(batch, vocabulary, dtype, 1 + 2 * terms)
            default = tile_for(batch, rotation.tables[0].blocks)
            calls = 1 if bench.dry else WARM_CALLS
            for tile, name in product(tiles or [default], extra):
                wishes = _extras(name)

                def cold(rotation: Rotation = rotation, tile: Tile = tile, wishes: Wishes = wishes) -> None:
                    for table in rotation.tables:
                        launch_stats(table, rotation.buffers.stats, wishes, tile)

                def warm(rotation: Rotation = rotation, tile: Tile = tile, wishes: Wishes = wishes) -> None:
                    for _ in range(calls):
                        launch_stats(rotation.tables[0], rotation.buffers.stats, wishes, tile)

                if name == "warm":
                    timing = bench.clock.race({"": warm}, calls=calls)[""]
                else:
                    timing = bench.clock.race({"": cold}, calls=rotation.calls)[""]
                share = size / timing.seconds / rate
                rows.append({
                    "B": batch, "V": vocabulary, "dtype": _kind(dtype), "terms": terms, "tile": tile.blocks,
                    "default": "*" if tile == default else "", "extras": name, "us": timing.us,
                    "GB/s": size / timing.seconds / 1e9, "% of copy": 100 * share, "spread %": timing.spread,
                    "graph": timing.graphed,
                })  # fmt: skip
                usual = (dtype, terms, name, tile) == (torch.bfloat16, 1, "none", default)
                if usual and batch >= 64 and vocabulary in (128_256, 256_000) and not tiles:
                    bench.report.goal(
                        f"K1 of copy bandwidth, B={batch} V={vocabulary}",
                        f">= {SHARE:.0%}",
                        100 * share,
                        "%",
                        share >= SHARE,
                        f"{timing.spread:.1f} %",
                    )

        plan: list[tuple[int, torch.dtype, int, list[str], list[Tile]]] = []
        for vocabulary in bench.vocabularies:
            plan.append((vocabulary, torch.bfloat16, 1, ["none"], []))
        for vocabulary in bench.vocabularies[:3]:
            plan.append(
                (vocabulary, torch.bfloat16, 1, ["none", "scale", "compare", "both", "warm"], [*TILES])
            )
        for vocabulary in bench.vocabularies:
            for dtype, terms in product((torch.bfloat16, torch.float16, torch.float32), (1, 2)):
                if (dtype, terms) != (torch.bfloat16, 1):
                    plan.append((vocabulary, dtype, terms, ["none"], []))
        if bench.dry:
            plan = [plan[0], (*plan[1][:3], ["both", "warm"], [TILES[-1]]), plan[-1]]
        for vocabulary, dtype, terms, extra, tiles in plan:
            bench.report.progress(f"K1 V={vocabulary} {_kind(dtype)} terms={terms} {' '.join(extra)}")
            for batch in bench.batches:
                if bench.over():
                    return
                measure(batch, vocabulary, dtype, terms, extra, tiles)


def _extras(name: str) -> Wishes:
    return Wishes(scales=name in ("scale", "both"), compares=name in ("compare", "both"))


def pick_section(bench: Bench) -> None:
    """The whole launch sequence of a pick, and that a warmed-up backend compiles nothing for it."""
    before = bench.backend.compilations
    _picks(bench)
    if bench.warm:
        compiled = bench.backend.compilations - before
        bench.report.goal("kernels compiled by section pick", "0", float(compiled), "", compiled == 0)


def _picks(bench: Bench) -> None:
    asked: dict[str, Callable[[int], PickControls]] = {
        "greedy": partial(controls, temperature=0.0),
        "none": controls,
        "none, compare": partial(controls, compare=True),
        "top-k 20": partial(controls, top_k=20),
        "top-k 50": partial(controls, top_k=50),
        "top-k 1000": partial(controls, top_k=1000),
        "top-p .9": partial(controls, top_p=0.9),
        "top-p .95": partial(controls, top_p=0.95),
        "top-p .999": partial(controls, top_p=0.999),
        "min-p .05": partial(controls, min_p=0.05),
        "top-k 50, top-p .9": partial(controls, top_k=50, top_p=0.9),
        "top 20 log-probs": partial(controls, logprobs=20),
    }
    headline = ("greedy", "none", "none, compare")
    if bench.dry:
        asked = {name: asked[name] for name in ("none, compare", "top-k 20", "top 20 log-probs")}
    note = (
        f"us per step, V={bench.vocabulary}, bf16, one pair, temperature 0.8; {SHAPES_NOTE}; "
        "`alone`: one step per graph"
    )
    with bench.report.table("pick", note) as rows:
        # What the goals are about comes first.
        plan = [("mid", [name for name in asked if name in headline])]
        plan += [(shape, [name for name in asked if name not in headline]) for shape in SHAPES]
        for shape, names in plan[:2] if bench.dry else plan:
            bench.report.progress(f"pick, {shape}: {', '.join(names)}")
            for batch, name in product(bench.batches, names):
                if bench.over():
                    return
                rotation = bench.rotation(
                    batch, bench.vocabulary, torch.bfloat16, 1, asked[name], shape=shape,
                    cold=3 * SHORT if name in headline else SHORT,
                )  # fmt: skip
                timing = bench.clock.race({"": rotation.pick}, calls=rotation.calls)[""]
                rotation.tables = rotation.tables[:1]
                alone = bench.clock.race({"": rotation.pick})[""]
                rows.append({
                    "law": shape, "B": batch, "filters": name, "us": timing.us, "spread %": timing.spread,
                    "alone us": alone.us, "graph": timing.graphed,
                })  # fmt: skip
                if name == "none" and batch in STEPS_US:
                    bench.report.goal(
                        f"whole step, no filters, B={batch} V={bench.vocabulary}",
                        f"<= {STEPS_US[batch]:g} us",
                        timing.us,
                        "us",
                        timing.us <= STEPS_US[batch],
                        f"{timing.spread:.1f} %",
                    )


def features_section(bench: Bench) -> None:
    """What masks, penalties and bias add to a step."""
    note = f"us per step, V={bench.vocabulary}, bf16, one pair, no filters; the others add to `none`"
    with bench.report.table("features", note) as rows:
        for batch in bench.batches:
            if bench.over():
                return
            rotations = {
                name: bench.rotation(
                    batch, bench.vocabulary, torch.bfloat16, 1,
                    partial(_adjusted, vocabulary=bench.vocabulary, name=name), cold=SHORT,
                )
                for name in ("none", "mask", "penalties", "bias", "all")
            }  # fmt: skip
            calls = rotations["none"].calls
            timings = bench.clock.race({name: r.pick for name, r in rotations.items()}, calls=calls)
            rows += [
                {"B": batch, "feature": name, "us": timing.us, "adds us": timing.us - timings["none"].us,
                 "spread %": timing.spread}
                for name, timing in timings.items()
            ]  # fmt: skip


def _adjusted(rows: int, *, vocabulary: int, name: str) -> PickControls:
    """Controls of rows that have a mask of half the vocabulary, 200 seen tokens, or 100 tokens of bias."""
    generator = torch.Generator().manual_seed(1)
    wish = controls(rows)
    if name == "none":
        return wish
    adjustments = Adjustments.none()
    ids = torch.randperm(vocabulary, generator=generator)
    if name in ("mask", "all"):
        words = torch.randint(
            -(2**31), 2**31, (1, -(-vocabulary // 32)), generator=generator, dtype=torch.int64
        )
        adjustments = replace(
            adjustments, masks=words.to(torch.int32), mask_of=torch.zeros(rows, dtype=torch.int64)
        )
    if name in ("penalties", "all"):
        own = ids[:200]
        entries = rows * len(own)
        adjustments = replace(
            adjustments,
            seen_rows=torch.arange(rows).repeat_interleave(len(own)),
            seen_ids=own.repeat(rows),
            counts=torch.ones(entries),
            repetition=torch.full((entries,), 1.1),
            presence=torch.full((entries,), 0.1),
            frequency=torch.full((entries,), 0.1),
        )
    if name in ("bias", "all"):
        own = ids[-100:]
        adjustments = replace(
            adjustments,
            bias_rows=torch.arange(rows).repeat_interleave(len(own)),
            bias_ids=own.repeat(rows),
            bias_values=torch.ones(rows * len(own)),
        )
    return replace(wish, adjustments=adjustments)


def solver_section(bench: Bench) -> None:
    """Dynamic weights: one pass of each kind in a graph, and a whole solution as called."""
    note = f"V={bench.vocabulary}, bf16, one pair, mid; at most {STEPS} steps; `solve`, `pairs`: as called"
    with bench.report.table("solver", note) as rows:
        for batch in bench.batches:
            if bench.over():
                return
            batch_of = fused_batch(lanes(batch, bench.vocabulary, torch.bfloat16, bench.device, shape="mid"))
            table = build_table(batch_of.linear())
            curves = Curves(table)
            at = torch.ones(table.bucket, 1, dtype=torch.float64, device=bench.device)
            points = torch.linspace(0.1, 2.0, GRID, dtype=torch.float64, device=bench.device)
            grid = points.expand(table.bucket, -1).contiguous()
            passes = bench.clock.race({
                "one pass": lambda c=curves, a=at: c.moments(a),  # type: ignore[misc]
                f"pass over {GRID} multipliers": lambda c=curves, g=grid: c.grid(g),  # type: ignore[misc]
            })  # fmt: skip
            wishes = {
                f"solve {match.name}": SolveControls(
                    torch.full((batch,), int(match)), torch.full((batch,), 2.0), torch.ones(batch)
                )
                for match in (Match.FORWARD, Match.BOTH)
            }
            solved = {name: bench.backend.solve(batch_of, wish) for name, wish in wishes.items()}
            whole = bench.clock.race(
                {
                    "pairs": partial(bench.backend.pair_divergences, batch_of),
                    **{name: partial(bench.backend.solve, batch_of, wish) for name, wish in wishes.items()},
                },
                graph=False,
            )
            for name, timing in {**passes, **whole}.items():
                share = 100 * float(solved[name].converged.float().mean()) if name in solved else None
                rows.append({"B": batch, "what": name, "us": timing.us, "spread %": timing.spread,
                             "converged %": share, "graph": timing.graphed})  # fmt: skip


def verify_section(bench: Bench) -> None:
    """Speculative verification: drafts drawn from the base, judged by the fused law."""
    note = f"V={bench.vocabulary}, bf16, one pair, sharp, drafts of the base; `pick` of the target rows in a graph"
    with bench.report.table("verify", note) as rows:
        sizes = [1] if bench.dry else [size for size in bench.batches if size <= 64]
        for requests, k in product(sizes, (2,) if bench.dry else (2, 4, 8)):
            if bench.over():
                return
            batch, asked, drafts = speculation(bench, requests, k)
            verdicts = bench.backend.verify(batch, asked, drafts)
            padded = 1 << (batch.size - 1).bit_length()
            rotation = bench.rotation(
                padded, bench.vocabulary, torch.bfloat16, 1, controls, shape="sharp", cold=SHORT
            )
            graph = bench.clock.race({"": rotation.pick}, calls=rotation.calls)[""]
            called = bench.clock.race(
                {
                    "rejection": partial(bench.backend.verify, batch, asked, drafts),
                    "shared noise": partial(bench.backend.verify, batch, asked, drafts, "shared_noise"),
                },
                graph=False,
            )
            rows.append({
                "requests": requests, "k": k, "target rows": batch.size,
                "accepted": float(verdicts.accepted.float().mean()), "pick us": graph.us,
                "rejection us, as called": called["rejection"].us,
                "shared noise us, as called": called["shared noise"].us, "spread %": called["rejection"].spread,
            })  # fmt: skip


def speculation(bench: Bench, requests: int, k: int) -> tuple[RowBatch, PickControls, Drafts]:
    """`requests` with k drafts each; the row of place j of request i is i * (k + 1) + j."""
    rows = requests * (k + 1)
    sources = lanes(rows, bench.vocabulary, torch.bfloat16, bench.device, shape="sharp")
    target = fused_batch(sources)
    places = torch.arange(rows).view(requests, k + 1)
    laws = RowBatch.of(sources, [Row(Ref(0, int(row)), bench.vocabulary) for row in places[:, :k].flatten()])
    drawn = controls(requests * k)
    # Noise of its own: the drafts of a rejection scheme are independent of the judge.
    drawn = replace(drawn, seeds=drawn.seeds + 10_000)
    tokens = bench.backend.pick(laws, drawn).tokens.cpu().view(requests, k)
    drafts = Drafts(
        tokens=tokens,
        rows=places,
        laws=laws,
        law_controls=drawn,
        law_rows=torch.arange(requests * k).view(requests, k),
    )
    return target, controls(rows), drafts


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
