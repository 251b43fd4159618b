"""Attention of one layer in a decoding step: the kernel of recorded steps, and gathering blocks first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from proxyserve.bench.gpu.models import Pair
from proxyserve.engine.attention import AttentionPlan, Span, SpanMath
from proxyserve.engine.cuda.choose import reserve_triton
from proxyserve.engine.kv_storage import KVStorage, LayerShape
from proxyserve_kernels.bench.report import Report
from proxyserve_kernels.bench.timing import Clock

_BLOCK = 16
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@torch.inference_mode()
def measure_attention(
    report: Report,
    clock: Clock,
    pairs: Mapping[str, Pair],
    batches: tuple[int, ...],
    context: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Of the bases of `pairs`. Few requests' keys and values are still in the L2 cache from the call before."""
    with report.table("attention", "one layer, GB/s count keys and values once") as rows:
        for name, pair in pairs.items():
            for batch in batches:
                shape = pair.base
                size = shape.hidden // shape.heads
                layer = LayerShape(shape.kv_heads, size, size)
                storage, spans = _filled(layer, batch, context, device, dtype)
                query = torch.randn(batch, shape.heads, size, dtype=dtype, device=device)
                how = SpanMath(size**-0.5, None, None)
                paged = reserve_triton(batch, storage, context)
                paged.fill([0] * batch, spans, _copy)
                gathered = AttentionPlan.of(spans, storage)
                by_triton = partial(paged.attend, 0, query, how, None)
                by_gathering = partial(gathered.attend, 0, query, how, None)
                error = (by_triton().float() - by_gathering().float()).abs().max().item()
                report.check(
                    error <= _TOLERANCE[dtype], f"attention, {name}, {batch} requests: off by {error:.2g}"
                )
                moved = batch * context * layer.bytes_per_token(dtype)
                timings = clock.race({"triton": by_triton, "gather": by_gathering})
                for kernel, timing in timings.items():
                    rows.append(
                        {
                            "base of": name,
                            "requests": batch,
                            "by": kernel,
                            "us": timing.us,
                            "GB/s": moved / timing.seconds / 1e9,
                            "spread %": timing.spread,
                        }
                    )


def _filled(
    layer: LayerShape, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> tuple[KVStorage, list[Span]]:
    """Lanes of `context` tokens, whose last one is to attend, with their blocks in no order."""
    each = -(-context // _BLOCK)
    storage = KVStorage(
        [layer], num_blocks=batch * each, block_size=_BLOCK, dtype=dtype, device=device, spare=True
    )
    for pool in (*storage.keys, *storage.values):
        pool.normal_()
    blocks = torch.randperm(batch * each).tolist()
    return storage, [Span(blocks[n * each : (n + 1) * each], context - 1, 1) for n in range(batch)]


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
