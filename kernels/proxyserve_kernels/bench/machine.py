"""What the machine can do at best: everything else is read as a share of this."""

from __future__ import annotations

import shutil
import subprocess

import torch
from torch import Tensor

from proxyserve_kernels.bench.report import environment
from proxyserve_kernels.bench.shared import Bench
from proxyserve_kernels.bench.timing import Timing

#: Reads of one L2-resident tensor in a graph, so that the first one does not matter.
READS = 20


def environment_section(bench: Bench) -> None:
    """Versions, clocks, caches."""
    with bench.report.table("env") as rows:
        rows += [{"what": key, "value": value} for key, value in environment(bench.device).items()]
        if not bench.dry and shutil.which("nvidia-smi"):
            wanted = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version,mig.mode.current"
            answer = subprocess.run(
                ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader", "-i", "0"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            values = answer.stdout.strip().split(", ")
            rows += [
                {"what": key, "value": value} for key, value in zip(wanted.split(","), values, strict=False)
            ]


def ceilings_section(bench: Bench) -> None:
    """Bandwidths and the price of a launch."""
    with bench.report.table(
        "ceilings", "GB/s count reads and writes; the goal of a read is the copy"
    ) as rows:
        size = 2**16 if bench.dry else 4 * 2**30
        timings = _stream(bench, size)
        for name, timing in timings.items():
            moved = 2 * size if name == "copy" else size
            rate = moved / timing.seconds / 1e9
            rows.append({"what": name, "MB": size / 1e6, "us": timing.us, "GB/s": rate,
                         "spread %": timing.spread})  # fmt: skip
        bench.copy_rate = 2 * size / timings["copy"].seconds
        read = size / timings["read-only (torch.sum)"].seconds
        bench.report.goal("read-only stream", ">= 4300 GB/s", read / 1e9, "GB/s", read >= 4.3e12)
        for megabytes in (8, 16, 32, 48):
            if bench.over():
                return
            size = 2**16 if bench.dry else megabytes * 2**20
            resident = _filled(bench, size)
            calls = 1 if bench.dry else READS

            def read_all(tensor: Tensor = resident, calls: int = calls) -> None:
                for _ in range(calls):
                    tensor.sum()

            timing = bench.clock.race({"read": read_all}, calls=calls)["read"]
            rows.append({"what": "read again (L2)", "MB": size / 1e6, "us": timing.us,
                         "GB/s": size / timing.seconds / 1e9, "spread %": timing.spread})  # fmt: skip
        one = torch.zeros(1, device=bench.device)
        for kernels in (1, 2, 4, 8):

            def launch(kernels: int = kernels) -> None:
                for _ in range(kernels):
                    one.add_(1.0)

            timing = bench.clock.race({"launch": launch})["launch"]
            rows.append({"what": f"graph of {kernels} tiny dependent kernels", "us": timing.us,
                         "spread %": timing.spread})  # fmt: skip


def copy_rate(bench: Bench) -> float:
    """Bytes per second, read and written, of a large copy."""
    if not bench.copy_rate:
        size = 2**16 if bench.dry else 4 * 2**30
        bench.copy_rate = 2 * size / _stream(bench, size)["copy"].seconds
    return bench.copy_rate


def _stream(bench: Bench, size: int) -> dict[str, Timing]:
    """A copy and a sum of `size` bytes."""
    source, target = _filled(bench, size), _filled(bench, size)
    return bench.clock.race(
        {"copy": lambda: target.copy_(source), "read-only (torch.sum)": lambda: source.sum()}
    )


def _filled(bench: Bench, size: int) -> Tensor:
    """`size` bytes of random float32."""
    return torch.rand(size // 4, device=bench.device)
