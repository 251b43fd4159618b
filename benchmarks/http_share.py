"""What the HTTP side takes from the engine: many streams through a server beside the same engine without one.

    python -m benchmarks.http_share --streams 64

The two take turns in one run, over the same random models, with fused requests of the same lengths. While the server
is asked, the processor time of each of its threads is read from /proc (Linux only): its main thread is the event loop,
which tokenises, validates and writes events; the other busy one is the engine's, which detokenises as tokens come.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

from proxyserve.bench.load.drive import Load, Target
from proxyserve.bench.load.lengths import Lengths
from proxyserve.bench.load.prompts import Prompts
from proxyserve.bench.load.run import measure
from proxyserve.bench.load.workload import Workload
from proxyserve.bench.models import BenchFamily, build_bench_family
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.fusion.fusion import proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import choose_placement
from proxyserve.types import SamplingParams

_KV_MEMORY = 2**30
_START_SECONDS = 300.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens per second of both, and seconds of processor time per token of the server's threads."""

    served: float
    in_process: float
    loop_cpu: float
    engine_cpu: float

    @property
    def ratio(self) -> float:
        return self.served / self.in_process


def thread_seconds(pid: int) -> dict[int, float]:
    """Processor time that each thread of a process has used so far, by its number; the main thread's is `pid`."""
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        # The name, in brackets, may have spaces: fields are counted after it.
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        seconds[int(task.name)] = (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
    return seconds


def shares(before: Mapping[int, float], after: Mapping[int, float], pid: int) -> tuple[float, float]:
    """Seconds of the main thread, and of the busiest other one."""
    used = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    return used.pop(pid), max(used.values(), default=0.0)


@contextmanager
def serving(family: BenchFamily, port: int, streams: int) -> Iterator[int]:
    """A server over the family, for so many streams at once: its process id, once it is ready."""
    command = [sys.executable, "-m", "proxyserve", "serve", str(family.base)]
    command += ["--expert", f"expert={family.tuned},{family.untuned}", "--port", str(port), "--threads", "1"]
    command += ["--speculate", "off", "--max-batch", str(streams), "--kv-memory", str(_KV_MEMORY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}/ready")
            yield server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = monotonic() + _START_SECONDS
    while monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"The server ended with exit code {server.returncode}; is the port free?")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            sleep(0.5)
    raise SystemExit(f"The server was not ready after {_START_SECONDS:.0f} seconds.")


class InProcess:
    """The same engine without a server."""

    def __init__(self, family: BenchFamily, streams: int) -> None:
        experts = [ExpertSource("expert", family.tuned, family.untuned)]
        config = EngineConfig(max_batch=streams, kv_memory=_KV_MEMORY, speculate="off", prefix_cache=False)
        self._engine = Engine(load_family(family.base, experts, placement=choose_placement("cpu")), config)
        self._named = 0

    def run(self, workload: Workload, first: int, streams: int) -> float:
        """Tokens per second."""
        tokens, started = 0, perf_counter()
        for number in range(streams):
            ask = workload.ask(first + number)
            assert not isinstance(ask.prompt, str)
            sampling = SamplingParams(max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True)
            self._named += 1
            self._engine.submit(
                Submission(
                    f"r{self._named}", LanePrompts(tuple(ask.prompt)), sampling, proxy({"expert": 1.0})
                )
            )
        while self._engine.has_work:
            tokens += sum(len(event.token_ids) for event in self._engine.step())
        return tokens / (perf_counter() - started)


def run(streams: int, prompt: int, new: int, rounds: int, port: int) -> list[Round]:
    """Alternate, `rounds` times, after one round that is not counted."""
    torch.set_num_threads(1)
    found = []
    with TemporaryDirectory() as folder:
        family = build_bench_family(Path(folder))
        workload = Workload(
            {"base+expert": 1.0},
            Lengths.parse(str(prompt)),
            Lengths.parse(str(new)),
            Prompts(family.base, as_text=False),
        )
        target = Target(f"http://127.0.0.1:{port}", extra={"temperature": 0})
        load = Load(streams, clients=streams)
        alone = InProcess(family, streams)
        with serving(family, port, streams) as pid:
            for number in range(rounds + 1):
                print(f"round {number} of {rounds}" if number else "warm-up", file=sys.stderr)
                before = thread_seconds(pid)
                served = measure(target, workload, load, first=number * streams)
                loop_cpu, engine_cpu = shares(before, thread_seconds(pid), pid)
                if served.failures:
                    raise SystemExit(f"The server refused: {served.failures[0]}")
                in_process = alone.run(workload, number * streams, streams)
                if number:
                    tokens = served.tokens
                    found.append(
                        Round(tokens / served.seconds, in_process, loop_cpu / tokens, engine_cpu / tokens)
                    )
    return found


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Medians, and every round."""
    names = ("served", "in_process", "loop_cpu", "engine_cpu", "ratio")
    return {
        "medians": {name: median(getattr(one, name) for one in rounds) for name in names},
        "rounds": [{**asdict(one), "ratio": one.ratio} for one in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8719)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    wanted = parser.parse_args()
    result = summary(run(wanted.streams, wanted.prompt, wanted.new, wanted.rounds, wanted.port))
    medians = result["medians"]
    print(f"{wanted.streams} streams, fused, medians of {wanted.rounds} rounds")
    print(f"  served        {medians['served']:7.0f} tokens/s")
    print(f"  in process    {medians['in_process']:7.0f} tokens/s")
    print(f"  served / in process {medians['ratio']:.2f}x")
    print(f"  processor time per token: event loop {medians['loop_cpu'] * 1e6:.0f} us, ", end="")
    print(f"engine {medians['engine_cpu'] * 1e6:.0f} us")
    if wanted.output is not None:
        wanted.output.write_text(json.dumps({"streams": wanted.streams, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
