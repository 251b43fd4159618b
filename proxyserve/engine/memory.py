"""The memory plan: what weights, KV blocks and the scoring of prompts take, and how many blocks each arena gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from proxyserve.config import EngineConfig
from proxyserve.engine.arena import Layout
from proxyserve.engine.heads import logits_dtype
from proxyserve.errors import LoadError, NoRoom
from proxyserve.models.remote import AnyModel, RemoteModel

_CPU_SHARE, _CPU_MOST = 0.25, 2 * 2**30
_GPU_SHARE = 0.85
#: Of what the machine or its container has, for weights and KV together.
_CPU_LIMIT, _GPU_LIMIT = 0.8, 0.92
#: An arena has room for this many lanes of each request, where it has that many models: an expert's two, and a second
#: expert over the same untuned model.
_LANES = 3
#: Tokens whose laws are fused at once, and how many float32 copies of them the plain backend makes at most (22 for a
#: power mean of three laws; 4 to 10 for other rules).
_FUSED_AT_ONCE, _FUSED_COPIES = 32, 24
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Tenants:
    """The models that share an arena: how many, and the longest context among them in tokens."""

    models: int
    context: int

    @property
    def lanes(self) -> int:
        """Of one request that the arena should have room for."""
        return min(self.models, _LANES)


def plan_arenas(
    tenants: Mapping[Layout, Tenants], *, budget: int, block_size: int, max_batch: int
) -> dict[Layout, int]:
    """Blocks of each arena. Each lane gets the same number, as many as `budget` bytes allow, since the lanes of a
    request grow by the same tokens, but none more than `max_batch` full contexts.

    Raises LoadError if the budget does not hold even two blocks per lane.
    """
    if not tenants:
        return {}
    least = sum(layout.block_bytes(block_size) * group.lanes for layout, group in tenants.items())
    blocks = budget // least
    if blocks < 2:
        raise LoadError(
            f"a KV budget of {budget} bytes holds {blocks} blocks of {block_size} tokens for "
            f"{sum(group.lanes for group in tenants.values())} lanes; give --kv-memory at least {2 * least} bytes"
        )
    return {
        layout: min(blocks, max_batch * -(-group.context // block_size)) * group.lanes
        for layout, group in tenants.items()
    }


def blocks_of_new_arena(
    layout: Layout, context: int, *, wanted: int | None, room: int, block_size: int, max_batch: int
) -> int:
    """Blocks of an arena for the two lanes of an expert that comes while the server runs: `wanted` for each lane, as
    the other arenas have (None: `max_batch` full contexts), or as many as `room` bytes allow. Raises NoRoom if that is
    less than `least_arena_bytes`."""
    full = max_batch * -(-context // block_size)
    most = 2 * (full if wanted is None else min(wanted, full))
    blocks = min(most, room // layout.block_bytes(block_size))
    least = least_arena_bytes(layout, context, block_size, wanted)
    if blocks * layout.block_bytes(block_size) < least:
        needed, left = spelled([least, max(0, room)])
        raise NoRoom(
            f"The KV blocks of its two lanes need at least {needed}, and {left} of memory are left; unload "
            "experts, or start the server with a larger --memory."
        )
    return blocks


def least_arena_bytes(layout: Layout, context: int, block_size: int, wanted: int | None) -> int:
    """Of an arena that holds one full context for each of an expert's two lanes, or, where that is less, the `wanted`
    blocks."""
    contexts = -(-context // block_size)
    return 2 * (contexts if wanted is None else min(wanted, contexts)) * layout.block_bytes(block_size)


def blocks_of_remote(model: RemoteModel, *, block_size: int, max_batch: int, lanes: int) -> int:
    """Blocks without bytes, enough for `max_batch` full contexts and for one request with `lanes` lanes on the
    model."""
    return (max_batch + lanes) * -(-model.context_length // block_size)


def scoring_bytes(base: AnyModel, config: EngineConfig) -> int:
    """What a step may take to score prompts: rows of logits of its models, and the laws that are fused at once."""
    width = base.vocabulary.size
    rows = config.max_scored_rows * width * logits_dtype(base.dtype, base.device).itemsize
    return rows + fused_at_once(config) * _FUSED_COPIES * width * torch.float32.itemsize


def fused_at_once(config: EngineConfig) -> int:
    """Most tokens of prompts that are fused in one call; none more than are sampled in one."""
    return min(config.max_batch, _FUSED_AT_ONCE)


def kv_budget(device: torch.device, wanted: int | None, aside: int = 0) -> int:
    """Bytes for KV: those wanted, or a default for the device, of which `aside` bytes are set aside."""
    if wanted is not None:
        return wanted
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int((free - aside) * _GPU_SHARE)
    return min(int(_physical_bytes() * _CPU_SHARE), _CPU_MOST) - aside


def memory_limit(device: torch.device, wanted: int | None, aside: int = 0) -> int:
    """Bytes that weights and KV may take together: those wanted, or most of what the device has, of which `aside` bytes
    are set aside."""
    if wanted is not None:
        return wanted
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The rest is other processes'.
        return int((free + torch.cuda.memory_reserved(device)) * _GPU_LIMIT) - aside
    return int(_physical_bytes() * _CPU_LIMIT) - aside


def spelled(sizes: Sequence[int]) -> list[str]:
    """Bytes for people: `1.5 GiB`."""
    return [_spell(size) for size in sizes]


def _spell(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _physical_bytes() -> int:
    """Of the machine, or of the container that this process runs in, if that has less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _cgroup_limits():
        with suppress(OSError, ValueError):  # no such file, or "max"
            physical = min(physical, int(file.read_text()))
    return physical


def _cgroup_limits() -> list[Path]:
    """Files with the bytes that this process, or what it is part of, may take, under cgroups 2 and 1."""
    files = [_CGROUPS / "memory.max", _CGROUPS / "memory" / "memory.limit_in_bytes"]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = _CGROUPS / line[4:]
                files += [folder / "memory.max" for folder in (own, *own.parents)]
    return [file for file in files if file.is_relative_to(_CGROUPS)]
