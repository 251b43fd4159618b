"""A device that records and replays as CUDA graphs do, on a CPU.

A recording is a list of operations with the tensors they were called with. Replaying it calls the same operations on
the same tensors, and what they give goes to where the first call's results lie. So all that Python computed while
recording is frozen: a shape, a number, an index that a later step would have had otherwise gives wrong results, and an
operation that would make the host wait for a device is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

#: Operations whose result's shape, or whose caller, depends on what is in a tensor: a device would have to be asked.
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item")


class _Recorder(TorchDispatchMode):
    current: _Recorder | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        if name in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


def one_operation(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel that torch knows nothing of, as one operation: what is inside is the kernel's business."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        recorder = _Recorder.current
        with _disable_current_modes():
            result = function(*args, **kwargs)
        if recorder is not None:
            recorder.calls.append((function, args, kwargs, result))
        return result

    return call


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class PretendGraphDevice:
    """`GraphDevice`. `replays` counts those of each recording, `sizes` says how many models each has, `uploads` counts
    copies; `side_by_side`: how many recordings were started together each time."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        self.uploads = 0
        self.side_by_side: list[int] = []
        self.sizes: list[int] = []

    def upload(self, source: Tensor, target: Tensor) -> None:
        self.uploads += 1
        target.copy_(source)

    def warm(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Sequence[Callable[[], None]], pool: Hashable) -> Callable[[], None]:
        recorder = _Recorder()
        _Recorder.current = recorder
        try:
            with recorder:
                for part in work:
                    part()
        finally:
            _Recorder.current = None
        number = len(self.replays)
        self.replays.append(0)
        self.sizes.append(len(work))

        def replay() -> None:
            self.replays[number] += 1
            for function, args, kwargs, result in recorder.calls:
                places = _tensors(result)
                addresses = [tensor.data_ptr() for tensor in places]
                for place, new in zip(places, _tensors(function(*args, **kwargs)), strict=True):
                    assert new.shape == place.shape
                    if new.data_ptr() != place.data_ptr():
                        place.copy_(new)
                assert [tensor.data_ptr() for tensor in places] == addresses

        return replay

    def together(self, replays: Sequence[Callable[[], None]]) -> None:
        self.side_by_side.append(len(replays))
        for replay in replays:
            replay()
