"""What a process takes at most while it serves a full batch of long prompts, beside what it was given: weights and KV.

Measured in a process of its own, since one that has measured before has memory that it keeps. What an interpreter takes
that has imported everything and loaded nothing is not counted, and said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from proxyserve.bench.models import BASE, EXPERT, VOCABULARY, ModelShape, build_bench_family
from proxyserve.config import EngineConfig
from proxyserve.engine.cpu_linear import PackedLinear
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.errors import ProxyserveError
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement
from proxyserve.types import SamplingParams

#: Of weights and KV: what may come on top.
MOST_OVER = 0.1
BATCH = 32
PROMPT = 512
_NEW = 16
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Bytes of the process that held `models`; `loading`, `starting` and `serving` are its peaks while it loaded them,
    made the engine, and served `batch` prompts of `prompt` tokens, `after` is what it held then. `bare` is what it held
    before. `weights` and `kv` are what the engine accounts for, `copies` the packed weights that a CPU holds beside
    plain ones."""

    models: str
    batch: int
    prompt: int
    dtype: str
    bare: int
    loading: int
    starting: int
    serving: int
    after: int
    weights: int
    kv: int
    copies: int

    @property
    def allowed(self) -> float:
        """Weights, KV and a tenth."""
        return (self.weights + self.kv) * (1.0 + MOST_OVER)

    @property
    def ratios(self) -> dict[str, float]:
        """Of what was taken while serving, and at any time, by weights and KV: at most 1.1 is the target."""
        given = self.weights + self.kv
        return {
            "serving / given": (self.serving - self.bare) / given,
            "peak / given": (max(self.loading, self.starting, self.serving) - self.bare) / given,
        }

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "allowed": self.allowed, "ratios": self.ratios}


def measure_memory(
    placement: Placement,
    *,
    base: ModelShape = BASE,
    expert: ModelShape = EXPERT,
    batch: int = BATCH,
    prompt: int = PROMPT,
    kv_memory: int = 2**29,
    progress: Callable[[str], None] = lambda message: None,
) -> list[MemoryRow]:
    """Of a base and two experts over one untuned model, on the CPU. Raises ProxyserveError where the system does not
    say what a process takes (it is Linux that does)."""
    if not _STATUS.is_file():
        raise ProxyserveError("What a process takes is read from /proc/self/status, which only Linux has.")
    progress(f"memory: {batch} prompts of {prompt} tokens in a process of its own")
    with TemporaryDirectory() as folder:
        build_bench_family(Path(folder), base=base, expert=expert, context=prompt + _NEW)
        job = {
            "folder": folder,
            "batch": batch,
            "prompt": prompt,
            "kv_memory": kv_memory,
            "dtype": str(placement.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        child = subprocess.run(
            [sys.executable, "-m", "proxyserve.bench.memory", json.dumps(job)],
            stdout=subprocess.PIPE,
            check=False,
        )
    if child.returncode != 0:
        raise ProxyserveError(f"The process whose memory was measured ended with {child.returncode}.")
    return [MemoryRow(**json.loads(child.stdout.splitlines()[-1]))]


def packed_copies(module: nn.Module, weights: int, itemsize: int) -> int:
    """Bytes of a model's packed layers that are there in another form as well, where its parameters were `weights`
    bytes before they were packed. What oneDNN pads is not in it."""
    plain = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for layer in module.modules()
        for tensor in (*layer.parameters(recurse=False), getattr(layer, "_plain", None))
        if tensor is not None
    }
    packed = sum(
        layer.in_features * layer.out_features * itemsize
        for layer in module.modules()
        if isinstance(layer, PackedLinear)
    )
    return sum(plain.values()) + packed - weights


class _Process:
    """This one."""

    @property
    def resident(self) -> int:
        return self._bytes("VmRSS")

    def peak(self, work: Callable[[], object]) -> int:
        """Most resident bytes while `work` was done."""
        _RESET.write_text("5")
        work()
        return self._bytes("VmHWM")

    def _bytes(self, name: str) -> int:
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
        return int(line.split()[1]) * 1024


class _Serving:
    """What the process of its own does, step by step."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._placement = Placement(torch.device("cpu"), getattr(torch, job["dtype"]))

    def load(self) -> None:
        folder = Path(self._job["folder"])
        experts = [ExpertSource(name, folder / name, folder / "untuned") for name in ("tuned", "second")]
        self._models = load_family(folder / "base", experts, placement=self._placement)

    def start(self) -> None:
        config = EngineConfig(max_batch=self._job["batch"], kv_memory=self._job["kv_memory"])
        self._engine = Engine(self._models, config)

    def serve(self) -> None:
        """As many requests as fit, without and with one expert or both, drawn from their nuclei."""
        batch, prompt = self._job["batch"], self._job["prompt"]
        fusions = (Fusion(), proxy({"tuned": 1.0}), proxy({"tuned": 0.5, "second": 0.5}))
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1, VOCABULARY, (batch, prompt), generator=generator).tolist()
        for number, ids in enumerate(prompts):
            sampling = SamplingParams(
                max_tokens=_NEW, temperature=1.0, top_p=0.9, seed=number, ignore_eos=True
            )
            fusion = fusions[number % len(fusions)]
            self._engine.submit(Submission(str(number), LanePrompts(tuple(ids)), sampling, fusion))
        while self._engine.has_work:
            self._engine.step()

    def measure(self) -> MemoryRow:
        process = _Process()
        bare = process.resident
        loading, starting, serving = map(process.peak, (self.load, self.start, self.serve))
        engine = self._engine
        local = [runner.model for runner in engine.residents.local]
        return MemoryRow(
            models=", ".join(model.name for model in local),
            batch=self._job["batch"],
            prompt=self._job["prompt"],
            dtype=self._job["dtype"],
            bare=bare,
            loading=loading,
            starting=starting,
            serving=serving,
            after=process.resident,
            weights=sum(model.bytes for model in local),
            kv=sum(arena.bytes for arena in engine.residents.arenas.values()),
            copies=sum(
                packed_copies(model.module, model.bytes, self._placement.dtype.itemsize) for model in local
            ),
        )


def _main(arguments: Sequence[str]) -> None:
    job = json.loads(arguments[0])
    torch.set_num_threads(job["threads"])
    print(json.dumps(asdict(_Serving(job).measure())))


if __name__ == "__main__":
    _main(sys.argv[1:])
