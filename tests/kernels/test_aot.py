"""The kernels compiled for sm_90, without a GPU: registers, spills, load widths and instructions keep their budgets.

In processes of their own, because Triton cannot compile where it interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

KERNELS = Path(__file__).parents[2] / "kernels"


def compile_all(folder: Path, only: str) -> tuple[int, str, list[dict[str, object]]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    out = folder / "aot.json"
    command = [
        sys.executable,
        "-m",
        "proxyserve_kernels.triton_backend.aot",
        "--only",
        only,
        "--json",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(out.read_text())


@pytest.mark.parametrize("kernels", ["^fuse", "^(best|search)", "^(?!fuse|best|search)"])
def test_budgets(kernels: str, tmp_path: Path) -> None:
    code, table, reports = compile_all(tmp_path, kernels)
    assert reports
    assert code == 0, table


def test_a_block_belongs_to_one_warp_in_every_tile(tmp_path: Path) -> None:
    """So its sum is made in one order: threads x entries of a row of 256 tokens, over one warp, alike in all tiles."""
    _, _, reports = compile_all(tmp_path, "T1 bare")
    layouts = {(str(r["name"]).split()[1], r["layout"]) for r in reports}
    assert layouts == {("bf16", "32x8/1"), ("fp32", "32x4/1")}, reports


def test_a_broken_budget_fails() -> None:
    """Of the check itself: the cheapest kernel does not fit into one register."""
    code = """
from dataclasses import replace
from proxyserve_kernels.triton_backend import aot, budgets
case = next(case for case in budgets.cases() if case.name.startswith("gather_sums"))
report = aot.compile_case(replace(case, budget=aot.Budget(1)))
assert len(report.over) == 1 and "budget 1" in report.over[0], report
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
