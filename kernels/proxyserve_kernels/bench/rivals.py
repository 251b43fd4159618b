"""What others need for the same step: eager torch, torch.compile, FlashInfer. One pair of experts, bf16 logits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from proxyserve_kernels import PickControls
from proxyserve_kernels.bench import baselines
from proxyserve_kernels.bench.inputs import controls
from proxyserve_kernels.bench.report import Table
from proxyserve_kernels.bench.shared import Bench
from proxyserve_kernels.bench.timing import Function, Ratio, Timing

TEMPERATURE = 0.8
TOP_K = 50
TOP_P = 0.9

#: Batches that torch.compile is measured at: each costs a compilation.
COMPILED = (1, 64)

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
Asked = Callable[[int], PickControls]


def baselines_section(bench: Bench) -> None:
    """Each rival races against ours; the ratio is of that race."""
    note = (
        f"us per step, V={bench.vocabulary}, mid, temperature {TEMPERATURE}; 5 batches in turn; "
        "ratio = rival / ours"
    )
    with bench.report.table("baselines", note) as rows:
        order: tuple[int, ...] = (1,) if bench.dry else (64, 1, 256, 8)
        sizes = [size for size in order if size in bench.batches]
        for batch in sizes:
            for name, goal, step, asked in _rivals(batch):
                if bench.over():
                    return
                bench.report.progress(f"baseline {name}, B={batch}")
                try:
                    _race(bench, rows, batch, name, goal, step, asked)
                except Exception as error:  # one rival that cannot run must not hide the others
                    rows.append({"B": batch, "rival": name, "note": _first_line(error)})
        _pieces(bench, rows, sizes)


def _rivals(batch: int) -> list[tuple[str, float | None, Step, Asked]]:
    """(name, goal for the ratio, the rival's step, what we are asked)."""
    plain = partial(controls, temperature=TEMPERATURE)
    nucleus, both = partial(plain, top_p=TOP_P), partial(plain, top_p=TOP_P, top_k=TOP_K)
    rivals: list[tuple[str, float | None, Step, Asked]] = [
        ("eager, no filter", 8.0, partial(baselines.sample, temperature=TEMPERATURE), plain),
        (
            "eager, sorted top-p",
            25.0,
            partial(baselines.sample_sorted, temperature=TEMPERATURE, top_k=0, top_p=TOP_P),
            nucleus,
        ),
    ]
    if batch in COMPILED:
        compiled = torch.compile(partial(baselines.sample, temperature=TEMPERATURE), dynamic=False)
        rivals.append(("torch.compile, no filter", 2.0, compiled, plain))
    if importlib.util.find_spec("flashinfer") is not None:
        rivals.append(("eager fusion, then FlashInfer top-k top-p", 2.0, _flashinfer, both))
    return rivals


def _flashinfer(base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
    sampling = importlib.import_module("flashinfer.sampling")
    logits = baselines.fused(base, tuned, untuned) / TEMPERATURE
    drawn: Tensor = sampling.top_k_top_p_sampling_from_logits(
        logits, TOP_K, TOP_P, filter_apply_order="top_k_first"
    )
    return drawn


def _race(
    bench: Bench, rows: Table, batch: int, name: str, goal: float | None, step: Step, asked: Asked
) -> None:
    # Not `cold`: eager intermediates push everything out of the cache anyway.
    ours = bench.rotation(
        batch, bench.vocabulary, torch.bfloat16, 1,
asked, cold=1.0,
    )  # fmt: skip
    base, tuned, untuned = (source.split(batch) for source in ours.sources)

    def rival() -> None:
        for lanes in zip(base, tuned, untuned, strict=True):
            step(*lanes)

    timings = bench.clock.race({"ours": ours.pick, "rival": rival}, calls=ours.calls)
    ratio = timings["rival"].over(timings["ours"])
    rows.append(_row(batch, name, timings["rival"], timings["ours"], ratio))
    if goal is not None:
        bench.report.goal(
            f"{name} / ours, B={batch}",
            f">= {goal:g}x",
            ratio.value,
            "x",
            ratio.value >= goal,
            f"{ratio.low:.2f} .. {ratio.high:.2f}",
        )


def _row(batch: int, name: str, rival: Timing, ours: Timing, ratio: Ratio) -> dict[str, object]:
    return {
        "B": batch, "rival": name, "rival us": rival.us, "ours us": ours.us, "ratio": ratio.value,
        "low": ratio.low, "high": ratio.high, "note": "" if rival.graphed else "rival without a graph",
    }  # fmt: skip


def _pieces(bench: Bench, rows: Table, sizes: list[int]) -> None:
    """Single operations on fused float32 logits that are there already."""
    for batch in sizes:
        if bench.over():
            return
        fused = torch.randn(batch, bench.vocabulary, device=bench.device)
        law = fused.softmax(dim=-1)
        pieces: dict[str, Function] = {
            f"torch.topk {TOP_K} alone": partial(torch.topk, fused, TOP_K),
            "torch.softmax alone": partial(torch.softmax, fused, -1),
            "torch.sort alone": partial(torch.sort, fused, dim=-1, descending=True),
            "torch.multinomial alone": partial(torch.multinomial, law, 1),
        }
        if importlib.util.find_spec("flashinfer") is not None:
            sampling = importlib.import_module("flashinfer.sampling")
            pieces["FlashInfer top-k top-p alone"] = partial(
                sampling.top_k_top_p_sampling_from_logits, fused, TOP_K, TOP_P
            )
        for name, piece in pieces.items():
            try:
                timing = bench.clock.race({name: piece})[name]
                note = "" if timing.graphed else "without a graph"
                rows.append({"B": batch, "rival": name, "rival us": timing.us, "note": note})
            except Exception as error:
                rows.append({"B": batch, "rival": name, "note": _first_line(error)})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]
