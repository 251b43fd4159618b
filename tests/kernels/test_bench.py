"""The benchmark runs, checks what it measures, and writes what it found. Its figures are not tested."""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from proxyserve_kernels.bench import baselines, cpu
from proxyserve_kernels.bench.__main__ import main
from proxyserve_kernels.bench.report import Report
from proxyserve_kernels.bench.timing import GraphClock, HostClock, Timing
from tests.kernels.conftest import quick_sort


def written(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values


def test_a_quick_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for column in ("eager ms", "ours ms", "ratio", "low", "high"):
        assert column in printed.out
    assert "V=1000 B=1" in printed.err
    rows = written(tmp_path, "kernels-cpu-pick.json")["rows"]
    assert {row["filters"] for row in rows} >= {"none", "top-p", "top-k, top-p", "greedy"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
    whole = written(tmp_path, "kernels-cpu.json")
    assert whole["wrong"] == whole["failed"] == []
    assert list(whole["sections"]) == ["environment", "pick", "dynamic", "summary"]
    assert {row["match"] for row in whole["sections"]["dynamic"]["rows"]} == {"FORWARD", "BOTH"}
    text = (tmp_path / "kernels-cpu.txt").read_text()
    assert "python -m proxyserve_kernels.bench --device cpu --quick" in text
    assert str(tmp_path) not in text + json.dumps(whole)


def test_only_one_section(tmp_path: Path) -> None:
    asked = ["--device", "cpu", "--quick", "--only", "dynamic", "--vocab", "300", "--batch", "1"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    assert list(written(tmp_path, "kernels-cpu.json")["sections"]) == ["environment", "dynamic", "summary"]
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--only", "nothing"])


def test_a_wrong_law_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline that keeps other tokens is noticed before anything is timed, and missing a goal is not an error."""
    right = baselines.sorted_law

    def wrong(
        scores: torch.Tensor, top_k: int, top_p: float, *, stable: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return right(scores, top_k, 0.5 * top_p, stable=stable)

    report = Report("kernels", None)
    report.goal("speed", ">= 3x", 1.0, "x", met=False)
    assert report.finish() == 0
    monkeypatch.setattr(baselines, "sorted_law", wrong)
    cpu.run(report, cpu.Sizes([1000], [2], 1), ["pick"])
    assert report.finish() == 1 and any("top-p" in line for line in report.wrong)


def test_passes_and_ratios() -> None:
    slow, quick = Timing(4.0, 6.0), Timing(2.0, 2.0)
    assert slow.seconds == 5.0 and slow.spread == 40.0
    ratio = slow.over(quick)
    assert (ratio.value, ratio.low, ratio.high) == (2.5, 2.0, 3.0)
    order: list[str] = []
    HostClock(2).race({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order == ["a", "b"] * 5, "one turn to warm up, then two passes of two turns each"


class FakeCuda:
    """As much of torch.cuda as the clock uses. Every call of the measured function takes a millisecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 0.0
        self.capturing = False
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.ms

            def elapsed_time(self, later: Event) -> float:
                return later.at - self.at

        class Graph:
            def replay(self) -> None:
                fake.ms += 3.0

        class Stream:
            def wait_stream(self, other: object) -> None:
                assert not fake.capturing

        class Capture:
            def __init__(self, graph: Graph) -> None:
                pass

            def __enter__(self) -> None:
                fake.capturing = True

            def __exit__(self, *_: object) -> None:
                fake.capturing = False

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "graph": Capture,
            "stream": lambda _: nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_are_replayed_and_what_cannot_be_captured_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def step() -> None:
        cuda.ms += 1.0

    def asks_the_host() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        step()

    timings = GraphClock().race({"graph": step, "called": asks_the_host}, calls=2)
    assert timings["graph"].graphed and timings["graph"].ms == pytest.approx(1.5)
    assert not timings["called"].graphed and timings["called"].ms == pytest.approx(0.5)
    assert not GraphClock().race({"graph": step}, graph=False)["graph"].graphed


@pytest.mark.slow
def test_the_gpu_sections_run_in_the_interpreter(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the triton package is not installed")
    import triton

    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("only in Triton's interpreter; on a GPU the benchmark itself runs")
    quick_sort()
    sections = ["ceilings", "k1", "pick", "features", "verify"]
    asked = ["--device", "cpu", "--dry-gpu", "--quick", "--only", ",".join(sections), "--batch", "1"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    whole = written(tmp_path, "kernels-dry.json")
    assert whole["wrong"] == whole["failed"] == []
    assert all(whole["sections"][name]["rows"] for name in sections)
