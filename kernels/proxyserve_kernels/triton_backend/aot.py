"""Compile the kernels for a GPU that need not be there, and read what the compiler made of them.

    python -m proxyserve_kernels.triton_backend.aot [--json FILE]

prints one line per variant: registers, bytes spilled, load widths and instructions, beside the budget. A change that
makes a kernel spill, load two bytes at a time or grow is seen on any machine; how fast it is needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proxyserve_kernels.triton_backend.device import layout
from proxyserve_kernels.triton_backend.tuning import EXACT

#: NVIDIA Hopper (H100, H200).
HOPPER = GPUTarget("cuda", 90, 32)

#: Pointer arguments by name; `*_stride`, counts and the like are int32.
POINTERS = {
    "*i1": "valid flips",
    "*i32": "unsure counts",
    "*i64": (
        "ints p_ints q_ints orders buffers lasts list_ids tokens subjects matches target_rows draft_rows listed"
    ),
    "*fp32": (
        "floats p_floats q_floats stats out planes thresholds list_values scores kl raw_scores raw_logprobs "
        "processed_scores processed_logprobs raw_partitions processed_partitions removed masses forward reverse"
    ),
    "*fp64": (
        "multipliers centres done partitions state limits forward_targets reverse_targets p_values q_values"
    ),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a variant may cost at most. `instructions` is per token of a tile, 0 where a kernel has no fixed tile.
    `narrow`: loads of 16 bits, which a tile must not have; a program that reads single tokens may."""

    registers: int
    instructions: float = 0.0
    narrow: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One variant: a kernel, its compile-time values, its warps, and its budget. `types` are those of arguments that
    are not what `POINTERS` says."""

    name: str
    kernel: Any
    constants: Mapping[str, int | bool | str]
    warps: int
    budget: Budget
    types: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made. `loads` counts global loads by width in bits; `instructions` as in Budget; `layout` says
    how a tile is spread over a program: entries per thread, threads and warps along tokens."""

    name: str
    registers: int
    spilled: int
    loads: dict[int, int]
    instructions: float
    layout: str
    over: tuple[str, ...]


def compile_case(case: Case, target: GPUTarget = HOPPER) -> Report:
    """Compile one case and hold it against its budget. Raises RuntimeError in Triton's interpreter mode."""
    if not hasattr(case.kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    names = case.kernel.arg_names
    types = {**TYPES, **case.types, **dict.fromkeys(case.constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": case.warps, **EXACT})
    registers, spilled = _resources(compiled.asm["cubin"])
    sass = _sass(compiled.asm["cubin"])
    loads: dict[int, int] = {}
    for line in re.findall(r"LDG\.[\w.]+", sass):
        width = next((int(w) for w in ("128", "64") if f".{w}" in line), 16 if "16" in line else 32)
        loads[width] = loads.get(width, 0) + 1
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", sass, flags=re.MULTILINE))
    tile = int(case.constants.get("TILE", 0))
    per_token = instructions * case.warps * 32 / (tile * layout.TOKENS.value) if tile else 0.0
    spread = _layout(compiled.asm["ttgir"])
    over = []
    if spilled:
        over.append(f"{spilled} bytes spilled")
    if registers > case.budget.registers:
        over.append(f"{registers} registers, budget {case.budget.registers}")
    if case.budget.narrow < loads.get(16, 0):
        over.append(f"{loads[16]} loads of 16 bits, budget {case.budget.narrow}")
    if case.budget.instructions and per_token > case.budget.instructions:
        over.append(f"{per_token:.1f} instructions per token, budget {case.budget.instructions:g}")
    return Report(case.name, registers, spilled, loads, round(per_token, 1), spread, tuple(over))


def _layout(ttgir: str) -> str:
    """The two-dimensional layouts of a kernel, as `threads x entries of a token row, warps`, sorted."""
    found = re.findall(
        r"sizePerThread = \[\d+, (\d+)\], threadsPerWarp = \[\d+, (\d+)\], warpsPerCTA = \[\d+, (\d+)\]",
        ttgir,
    )
    return ", ".join(sorted({f"{threads}x{entries}/{warps}" for entries, threads, warps in found}))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory) of the one function in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (line,) = re.findall(r"REG:\d+.*", usage)
    values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return values["REG"], values["STACK"] + values["LOCAL"]


def _sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def main() -> int:
    """Compile every case; the exit status says whether all keep their budgets."""
    from proxyserve_kernels.triton_backend.budgets import cases

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the reports there")
    parser.add_argument("--only", default="", help="only variants whose name this regular expression finds")
    arguments = parser.parse_args()
    reports = []
    for case in cases():
        if re.search(arguments.only, case.name):
            report = compile_case(case)
            reports.append(report)
            loads = " ".join(f"{width}b:{count}" for width, count in sorted(report.loads.items()))
            verdict = "; ".join(report.over) or "ok"
            print(f"{report.name:44} reg {report.registers:3} instr/token {report.instructions:6} "
                  f"loads {loads:22} {verdict}", flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if any(report.over for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
