"""What the CUDA device is asked for, on streams and graphs that only take notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from proxyserve.engine.cuda.graph_device import CudaGraphDevice, graph_device_for

DEVICE = torch.device("cuda", 0)


class Notes:
    """Stands in for `torch.cuda`: every call in order, with the stream it was made on."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.streams = 0
        self.current = Stream(self, "main")

    def note(self, what: str) -> None:
        self.lines.append(f"{self.current.name}: {what}")


class Stream:
    def __init__(self, notes: Notes, name: str) -> None:
        self.notes = notes
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.notes.lines.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.notes.lines.append(f"host waits for {self.name}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()

    def stream(device: torch.device, priority: int = 0) -> Stream:
        assert device == DEVICE
        notes.streams += 1
        return Stream(notes, f"first({priority})" if priority else f"side{notes.streams}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, notes.current = notes.current, stream
        yield
        notes.current = before

    class Graph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            notes.note(f"capture begins, {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            notes.note("capture ends")

        def replay(self) -> None:
            notes.note("replay")

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: notes.current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool{notes.streams}")
    return notes


def test_a_recording_forks_and_joins(notes: Notes) -> None:
    """The first on the stream with priority; whoever replays does so on the stream that it is on."""
    device = CudaGraphDevice(DEVICE)
    replay = device.record([lambda: notes.note("base"), lambda: notes.note("tuned")], "together")
    assert notes.lines == [
        "first(-1) waits for main",
        "first(-1): capture begins, pool1, thread_local",
        "side2 waits for first(-1)",
        "side2: tuned",
        "first(-1): base",
        "first(-1) waits for side2",
        "first(-1): capture ends",
    ]
    notes.lines.clear()
    replay()
    assert notes.lines == ["main: replay"]


def test_replays_side_by_side(notes: Notes) -> None:
    """On other streams than those that another thread may be recording on."""
    device = CudaGraphDevice(DEVICE)
    replays = [device.record([lambda: None], name) for name in ("base", "tuned", "untuned")]
    device.record([lambda: None, lambda: None], "together")
    notes.lines.clear()
    device.together(replays)
    assert notes.lines == [
        "side3 waits for main",
        "side3: replay",
        "side4 waits for main",
        "side4: replay",
        "main: replay",
        "main waits for side3",
        "main waits for side4",
    ]
    notes.lines.clear()
    device.together(replays[:1])
    assert notes.lines == ["main: replay"]


def test_what_fails_while_recording_ends_the_capture(notes: Notes) -> None:
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    device = CudaGraphDevice(DEVICE)
    with pytest.raises(RuntimeError, match="not permitted"):
        device.record([fail], "base")
    assert notes.lines[-1] == "first(-1): capture ends"


def test_warming_up_is_waited_for(notes: Notes) -> None:
    CudaGraphDevice(DEVICE).warm(lambda: notes.note("work"))
    assert notes.lines == ["first(-1) waits for main", "first(-1): work", "host waits for first(-1)"]


def test_a_cpu_records_nothing() -> None:
    assert graph_device_for(torch.device("cpu")) is None
