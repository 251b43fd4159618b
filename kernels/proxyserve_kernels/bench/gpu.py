"""The GPU run: its sections in order, each with its own time limit. What matters most comes first.

A section that fails is reported and the next one begins; the whole run ends before eight minutes are over.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable

import torch

from proxyserve_kernels.bench import checks, kernels, machine, rivals
from proxyserve_kernels.bench.report import Report
from proxyserve_kernels.bench.shared import LIMIT, VOCABULARY, Bench
from proxyserve_kernels.bench.timing import GraphClock, HostClock
from proxyserve_kernels.triton_backend.backend import TritonBackend

#: Sections and the seconds after which they stop before the next measurement.
SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "env": (machine.environment_section, 5),
    "ceilings": (machine.ceilings_section, 25),
    "correct": (checks.correct_section, 75),
    "warm-up": (checks.warm_up_section, 60),
    "pick": (kernels.pick_section, 70),
    "k1": (kernels.sweep_section, 90),
    "baselines": (rivals.baselines_section, 70),
    "features": (kernels.features_section, 15),
    "solver": (kernels.solver_section, 20),
    "verify": (kernels.verify_section, 20),
    "compile": (checks.compile_section, 45),
}


def run(
    report: Report,
    device: torch.device,
    only: list[str],
    vocabularies: list[int] | None,
    batches: list[int] | None,
    *,
    quick: bool,
) -> None:
    """All sections, or those of `only`. On a CPU device in the interpreter, at tiny sizes."""
    dry = device.type != "cuda"
    if dry:
        sizes, rows = [600], [1, 2]
    elif quick:
        sizes, rows = [32_000, VOCABULARY], [1, 64]
    else:
        sizes, rows = [VOCABULARY, 32_000, 151_936, 256_000, 50_257], [1, 8, 64, 256]
    sizes, rows = vocabularies or sizes, batches or rows
    gc.freeze()  # a capture begins with a collection, which need not look at all of torch every time
    bench = Bench(
        report=report,
        device=device,
        clock=HostClock(1) if dry else GraphClock(),
        backend=TritonBackend(device),
        vocabularies=sizes,
        batches=rows,
        vocabulary=VOCABULARY if VOCABULARY in sizes else sizes[0],
        dry=dry,
    )
    for name, (section, cap) in SECTIONS.items():
        if only and name not in only:
            continue
        if not dry and time.monotonic() - bench.started > LIMIT:
            report.progress(f"no time left for {name}")
            report.failed.append(f"{name}: no time left")
            continue
        report.progress(f"section {name}")
        bench.begin(cap)
        try:
            section(bench)
        except Exception as error:  # the other sections must still run
            report.progress(traceback.format_exc())
            line = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            report.failed.append(line)
            if name == "correct":  # what cannot be run is not right
                report.check(False, line)
        if bench.over():
            report.progress(f"{name} was cut off after {cap:g} s")
