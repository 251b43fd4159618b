"""The backends that every kernel test runs with."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from proxyserve_kernels import Backend, backend_for
from tests.kernels.strategies import DEVICE

# A failing example prints its tensors; the corners of a vocabulary say enough.
torch.set_printoptions(threshold=20)


def quick_sort() -> None:
    """Sort with numpy in the interpreter, where Triton's network of comparisons takes a second per row. The network
    itself is tested in test_device_functions.py."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from proxyserve_kernels.triton_backend.device import select

    def sort_descending(keys: tl.tensor) -> tl.tensor:
        ordered = np.sort(keys.handle.data)[::-1].copy()
        return tl.tensor(TensorHandle(ordered, keys.handle.dtype), keys.type)

    select.sort_descending = sort_descending


@pytest.fixture(scope="session")
def torch_backend() -> Backend:
    """For what is too slow or too plain to run on both."""
    return backend_for(DEVICE, "torch")


@pytest.fixture(scope="session", params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Eager torch, then the Triton kernels: compiled on a CUDA device, interpreted elsewhere."""
    if request.param == "torch":
        return backend_for(DEVICE, "torch")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the triton package is not installed")
    if DEVICE.type != "cuda":
        import triton

        if not triton.knobs.runtime.interpret:
            pytest.skip("triton needs a CUDA device or TRITON_INTERPRET=1")
        quick_sort()
    # Without a CUDA device `backend_for` refuses triton, rightly: the interpreter is for tests only.
    from proxyserve_kernels.triton_backend.backend import TritonBackend

    return TritonBackend(torch.device(DEVICE))
