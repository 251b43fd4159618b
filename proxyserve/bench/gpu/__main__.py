"""Command line: python -m proxyserve.bench.gpu."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from proxyserve.bench.gpu.run import LIMIT, standard
from proxyserve.engine.cuda.graph_device import GraphDevice
from proxyserve_kernels.bench.report import Report, environment


def main(words: Sequence[str] | None = None, *, graph_device: GraphDevice | None = None) -> int:
    """Measure. The exit status is 1 where a result is wrong, and 0 also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m proxyserve.bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=Path, help="folder for JSON and text; default: the environment variable OUT"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which nothing new begins")
    arguments = parser.parse_args(words)
    cuda = torch.cuda.is_available() if arguments.device == "auto" else arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    report = Report("decoding-cuda" if cuda else "decoding-dry", out)
    with report.table("environment") as rows:
        rows += [{"what": key, "value": value} for key, value in environment(device).items()]
    standard(report, device, graph_device, arguments.limit).run()
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
