"""The torch backend beside eager torch, on a CPU. The machine may be noisy: read ratios, and their two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proxyserve_kernels import Backend, Match, PickControls, SolveControls, backend_for
from proxyserve_kernels.bench import baselines
from proxyserve_kernels.bench.inputs import SHAPES, SHAPES_NOTE, controls, fused_batch, lanes
from proxyserve_kernels.bench.report import Report
from proxyserve_kernels.bench.timing import HostClock
from proxyserve_kernels.torch_backend.pick import processed

TEMPERATURE = 0.8
TOP_P = 0.9
TOP_K = 50
TOP_N = 5
DTYPES = (torch.float32, torch.bfloat16)

#: Against sort-based top-p, at a vocabulary of 128k and batch 8.
GOAL = 3.0

Lanes = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to measure. `rounds`: turns of a pass."""

    vocabularies: list[int]
    batches: list[int]
    rounds: int


def run(report: Report, sizes: Sizes, only: list[str]) -> None:
    """All sections, or those of `only`."""
    backend = backend_for("cpu", "torch")
    for name, section in SECTIONS.items():
        if not only or name in only:
            section(report, sizes, backend)


def pick_section(report: Report, sizes: Sizes, backend: Backend) -> None:
    """`Backend.pick` and eager torch of the same law, which take turns."""
    clock = HostClock(sizes.rounds)
    cases: dict[str, tuple[Callable[[Lanes], object], Callable[[int], PickControls]]] = {
        "none": (
            lambda own: baselines.sample(*own, TEMPERATURE),
            lambda n: controls(n, temperature=TEMPERATURE),
        ),
        "top-p": (
            lambda own: baselines.sample_sorted(*own, TEMPERATURE, 0, TOP_P),
            lambda n: controls(n, temperature=TEMPERATURE, top_p=TOP_P),
        ),
        "top-k, top-p": (
            lambda own: baselines.sample_sorted(*own, TEMPERATURE, TOP_K, TOP_P),
            lambda n: controls(n, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P),
        ),
        "greedy": (lambda own: baselines.greedy(*own), lambda n: controls(n, temperature=0.0)),
        f"greedy, top {TOP_N}": (
            lambda own: baselines.greedy_logprobs(*own, TOP_N),
            lambda n: controls(n, temperature=0.0, logprobs=TOP_N),
        ),
    }
    note = (
        f"ms per step, one pair of experts, temperature {TEMPERATURE}, top-p {TOP_P}, top-k {TOP_K}; {SHAPES_NOTE}; "
        "ratio = eager / ours (low and high: of the two passes); `with KL`: ours comparing with the base as well"
    )
    with report.table("pick", note) as rows:
        for vocabulary in sizes.vocabularies:
            for batch in sizes.batches:
                for dtype in DTYPES:
                    kind = str(dtype).removeprefix("torch.")
                    report.progress(f"V={vocabulary} B={batch} {kind}")
                    for shape in SHAPES:
                        base, tuned, untuned = lanes(
                            batch, vocabulary, dtype, torch.device("cpu"), shape=shape
                        )
                        fused = fused_batch([base, tuned, untuned])
                        own = (base, tuned, untuned)
                        for name, (eager, asked) in cases.items():
                            silent = asked(batch)
                            told = replace(silent, compare=True)
                            what = f"V={vocabulary} B={batch} {kind} {shape} {name}"
                            kept = _check(report, what, own, silent, backend)
                            timings = clock.race(
                                {
                                    "eager": lambda e=eager, o=own: e(o),  # type: ignore[misc]
                                    "ours": lambda c=silent, f=fused: backend.pick(f, c),  # type: ignore[misc]
                                    "with KL": lambda c=told, f=fused: backend.pick(f, c),  # type: ignore[misc]
                                }
                            )
                            ratio = timings["eager"].over(timings["ours"])
                            rows.append(
                                {
                                    "V": vocabulary,
                                    "B": batch,
                                    "dtype": kind,
                                    "law": shape,
                                    "filters": name,
                                    "kept": kept,
                                    "eager ms": timings["eager"].ms,
                                    "ours ms": timings["ours"].ms,
                                    "with KL ms": timings["with KL"].ms,
                                    "ratio": ratio.value,
                                    "low": ratio.low,
                                    "high": ratio.high,
                                }
                            )
                            if name == "top-p" and (vocabulary, batch) == (128_256, 8):
                                report.goal(
                                    f"eager sort-based top-p / ours, V={vocabulary} B={batch} {kind} {shape}",
                                    f">= {GOAL:g}x",
                                    ratio.value,
                                    "x",
                                    ratio.value >= GOAL,
                                    f"{ratio.low:.2f} .. {ratio.high:.2f}",
                                )


def _check(report: Report, what: str, own: Lanes, asked: PickControls, backend: Backend) -> int | None:
    """Whether eager torch and the backend mean the same law. Returns how many tokens a row keeps, on average.

    The law is compared token by token. In float32 a token at the edge of a nucleus may fall on either side of it, so
    one that only one of the two keeps must lie within 1e-5 of the edge."""
    fused = fused_batch(list(own))
    n = fused.size
    scores = baselines.fused(*own)
    if float(asked.temperature[0]) == 0.0:
        picks = backend.pick(fused, asked)
        report.check(torch.equal(picks.tokens, scores.argmax(dim=-1)), f"{what}: greedy tokens")
        if picks.raw is not None:
            best = torch.log_softmax(scores.double(), dim=-1).topk(TOP_N, dim=-1).values
            close = torch.allclose(picks.raw.values.double(), best, atol=1e-4, rtol=0)
            report.check(close, f"{what}: log-probs")
        return None
    vocabulary = scores.shape[1]
    ours = processed(fused, asked, torch.arange(n))[:, :vocabulary].double().exp()
    top_k, top_p = int(asked.top_k[0]), float(asked.top_p[0])
    # Scaled as the backend does it: what rounding makes equal must be a tie on both sides. Logits of 16 bits have many.
    scaled = (scores * (1.0 / asked.temperature)[:, None]).double()
    ids, law = baselines.sorted_law(scaled, top_k, top_p, stable=True)
    whole = baselines.sorted_law(scaled, top_k, 1.0, stable=True)[1]
    edge = ((whole.cumsum(dim=-1) - whole) - top_p).abs() < 1e-5
    mine = ours.gather(1, ids)
    differ = (mine > 0) != (law > 0)
    sure = differ & ~edge if top_p < 1.0 else differ & (law > 1e-30)
    report.check(not bool(sure.any()), f"{what}: {int(sure.sum())} tokens kept by one of the two only")
    law = law / law.sum(dim=-1, keepdim=True)
    wrong = ((mine - law).abs() > 1e-4 * law + 1e-9) & ~differ
    report.check(not bool(wrong.any()), f"{what}: {int(wrong.sum())} probabilities differ")
    return int((ours > 0).sum(dim=1).double().mean())


def dynamic_section(report: Report, sizes: Sizes, backend: Backend) -> None:
    """What solving for a weight costs."""
    clock = HostClock(sizes.rounds)
    with report.table("dynamic", "`solve` of the weight of one expert, float32, mid; ms per row") as rows:
        for vocabulary in sizes.vocabularies:
            for batch in sizes.batches:
                report.progress(f"dynamic weights, V={vocabulary} B={batch}")
                own = lanes(batch, vocabulary, torch.float32, torch.device("cpu"), shape="mid")
                fused = fused_batch(own)
                asked = {
                    match.name: SolveControls(
                        torch.full((batch,), int(match)), torch.full((batch,), 2.0), torch.ones(batch)
                    )
                    for match in (Match.FORWARD, Match.BOTH)
                }
                solved = {name: backend.solve(fused, wish) for name, wish in asked.items()}
                timings = clock.race(
                    {
                        name: lambda f=fused, w=wish: backend.solve(f, w)  # type: ignore[misc]
                        for name, wish in asked.items()
                    }
                )
                rows += [
                    {
                        "V": vocabulary,
                        "B": batch,
                        "match": name,
                        "ms per row": timing.ms / batch,
                        "spread %": timing.spread,
                        "converged": int(solved[name].converged.sum()),
                    }
                    for name, timing in timings.items()
                ]


SECTIONS = {"pick": pick_section, "dynamic": dynamic_section}
