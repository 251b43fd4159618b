"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from proxyserve_kernels.bench import cpu
from proxyserve_kernels.bench.report import Report, environment


def main(words: Sequence[str] | None = None) -> int:
    """Measure on one device. The exit status is 1 where a result is wrong, and 0 also where a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyserve_kernels.bench", description="Measure the kernels."
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=Path, help="folder for JSON and text; default: the environment variable OUT"
    )
    parser.add_argument(
        "--only", default="", metavar="SECTION[,SECTION]", help="leave out all other sections"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few rounds, to see that it runs"
    )
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabulary sizes instead of the usual ones")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes instead of the usual ones")
    # Runs the GPU sections in Triton's interpreter, to find their mistakes where there is no GPU.
    parser.add_argument("--dry-gpu", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    cuda = torch.cuda.is_available() if arguments.device == "auto" else arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    device = torch.device("cuda" if cuda else "cpu")
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    only = [name for name in arguments.only.split(",") if name]
    on_gpu = cuda or arguments.dry_gpu
    if on_gpu:
        from proxyserve_kernels.bench import gpu  # needs triton

        known = [*gpu.SECTIONS]
        if any(batch.bit_count() != 1 for batch in arguments.batch or []):
            parser.error("the GPU sections take batches of 1, 2, 4, 8 .. rows, as captured graphs have")
    else:
        known = [*cpu.SECTIONS]
    if unknown := sorted(set(only) - set(known)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(known)}")
    report = Report("kernels-cuda" if cuda else "kernels-dry" if on_gpu else "kernels-cpu", out)
    with report.table("environment") as rows:
        command = " ".join(["python -m proxyserve_kernels.bench", *_shown(words)])
        rows += [{"what": key, "value": value} for key, value in environment(device).items()]
        rows.append({"what": "command", "value": command})
    if on_gpu:
        gpu.run(report, device, only, arguments.vocab, arguments.batch, quick=arguments.quick)
    else:
        quick = arguments.quick
        sizes = cpu.Sizes(
            arguments.vocab or ([1000] if quick else [32_000, 128_256]),
            arguments.batch or ([1, 2] if quick else [1, 8, 32]),
            1 if quick else 9,
        )
        cpu.run(report, sizes, only)
    return report.finish()


def _shown(words: Sequence[str] | None) -> list[str]:
    """The arguments without the folder, which says something about a machine."""
    shown: list[str] = []
    skip = False
    for word in sys.argv[1:] if words is None else words:
        if not skip and not word.startswith("--out"):
            shown.append(word)
        skip = word == "--out"
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
