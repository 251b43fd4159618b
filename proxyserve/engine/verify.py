"""Prove, when a model is loaded, that paging does not change its logits.

A class may take part in the attention registry and still keep state of its own, or use an argument that
`paged_attention` does not know. Comparing logits on a few tokens finds both before a user does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner, probe_ids
from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork

_CHUNKS = (5, 1, 3)
_BLOCK = 4
_LARGEST_WARM = 64
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 3e-2}


def logit_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to how far the expected logits spread."""
    spread = expected.float().std().clamp(min=1e-6)
    return float(((got.float() - expected.float()).abs().max() / spread).item())


def logit_tolerance(dtype: torch.dtype) -> float:
    """The most that `logit_error` may be where nothing but the order of sums differs."""
    return _TOLERANCE.get(dtype, 0.15)


def verify_adapter(runner: Runner, model: LoadedModel) -> None:
    """Raise LoadError unless an adapter over the runner's model gives finite logits. May be called during steps."""
    if model.adapter is not None and not bool(torch.isfinite(runner.probe(model.adapter)).all()):
        raise LoadError(f"{model.path}: the adapter gives logits that are NaN or infinite")


@torch.inference_mode()
def warm_paged(runner: Runner, max_batch: int) -> None:
    """Run steps of several sizes, so that nobody's first token waits for memory, kernels or layouts that are made at
    their first use. For a model that no step runs yet."""
    sizes = [1 << power for power in range(max_batch.bit_length()) if 1 << power <= _LARGEST_WARM]
    model = runner.model
    runner.attach(
        KVStorage(runner.shapes, num_blocks=max(sizes), block_size=1, dtype=model.dtype, device=model.device)
    )
    for size in sizes:
        output: list[int] = []
        lanes = [Lane(model.key, probe_ids(model)[:1], output, blocks=[number]) for number in range(size)]
        request = ScheduledRequest("warm", tuple(lanes), output)
        runner.run([LaneWork(request, lane, 0, 1, rows=1) for lane in lanes])
    runner.detach()


@torch.inference_mode()
def verify_paged(runner: Runner) -> None:
    """Run a short text in three paged chunks; raise LoadError unless the last logits are finite and agree (relative to
    their spread) with those of the model as its authors wrote it. For a model that no step runs yet; its blocks are
    taken away again afterwards."""
    model = runner.model
    ids = probe_ids(model)
    length = len(ids)
    storage = KVStorage(
        runner.shapes,
        num_blocks=-(-length // _BLOCK),
        block_size=_BLOCK,
        dtype=model.dtype,
        device=model.device,
    )
    runner.attach(storage)
    expected = runner.reference
    output: list[int] = []
    lane = Lane(model.key, ids, output)
    request = ScheduledRequest("verify", (lane,), output)
    lane.blocks = list(reversed(range(storage.num_blocks)))  # not in order of use on purpose
    got = expected
    for count in _CHUNKS:
        count = min(count, length - lane.computed)
        if count:
            got = runner.run([LaneWork(request, lane, lane.computed, count, rows=1)])[0]
            lane.computed += count
    runner.detach()
    error = logit_error(got, expected)
    # Quantised layers round their inputs to bfloat16, whatever the model's dtype.
    if not error <= logit_tolerance(torch.bfloat16 if model.quantized else model.dtype):  # NaN fails too
        raise LoadError(
            f"{model.path}: {type(model.module).__name__} gives other logits in paged mode (error {error:.2g} of their "
            "spread, or NaN); this class cannot be served correctly"
        )
