"""What a CPU server settles by a measurement when it starts: the dtype of the weights, and how many threads compute.

The dtype is settled before anything is loaded, on matrices of the base's sizes; threads on a step of the base itself.
Measurements alternate, and the best round of each contestant counts: whatever else runs only ever adds time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Generic, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from proxyserve.engine.cpu_linear import pack_linears
from proxyserve.engine.runner import Runner
from proxyserve.models.loading import Placement, choose_placement, load_config
from proxyserve.models.stored import half_dtype

#: As few threads as come so close to the best: the HTTP side needs a core as well, and threads that wait for each other
#: on a busy machine are far slower than one.
_ENOUGH = 1.2
#: Two dtypes are as fast as each other if they measure within this factor: the stored one is taken.
_SAME = 1.1
#: A base with fewer parameters computes with one thread: a step of it is mostly calls.
_SMALLEST_SHARED = 20_000_000
#: Bytes of weights that are measured, more than caches hold, and the rows of the two steps.
_MEASURED_BYTES = 96 * 2**20
_ROWS = (1, 8)
_SECONDS, _ROUNDS = 0.8, 5

ValueT = TypeVar("ValueT")
KeyT = TypeVar("KeyT")

#: (in, out) of one layer's matrices, and how many layers there are.
Sizes = tuple[Sequence[tuple[int, int]], int]


@dataclass(frozen=True, slots=True)
class Settled(Generic[ValueT]):
    """A value and, for the operator, why it is this one."""

    value: ValueT
    reason: str


def settle_dtype(
    device: str,
    dtype: str,
    base: Path | None,
    experts: Sequence[Path] = (),
    *,
    measure: Callable[[Sizes, Sequence[torch.dtype]], Mapping[torch.dtype, float]] | None = None,
) -> Settled[Placement]:
    """Where models are put. On a CPU, `auto` keeps what is stored in float32 in float32. Where all folders are stored
    in one half-precision dtype it takes that or float32, which holds the same numbers, whichever is faster, and that
    where they are as fast; `fastest` takes the faster of float32 and bfloat16 whatever is stored. On a GPU both are
    bfloat16. `experts` that are no whole models do not count. Raises LoadError."""
    if dtype not in ("auto", "fastest"):
        return Settled(choose_placement(device, dtype), "asked for")
    placement = choose_placement(device)
    if placement.device.type != "cpu":
        return Settled(placement, "for a GPU")
    if base is None:
        return Settled(placement, "for a base on another server")
    folders = [base, *(path for path in experts if (path / "config.json").is_file())]
    stored = {half_dtype(folder.expanduser()) for folder in folders}
    other: torch.dtype | None = torch.bfloat16
    if dtype == "auto":
        other = stored.pop() if len(stored) == 1 else None
    if other is None:
        return Settled(placement, "as stored")
    seconds = (measure or time_dtypes)(_sizes(load_config(base.expanduser())), (torch.float32, other))
    ratio = seconds[torch.float32] / seconds[other]
    name = str(other).removeprefix("torch.")
    needed = 1 / _SAME if dtype == "auto" else 1.0
    chosen = other if ratio > needed else torch.float32
    return Settled(
        Placement(placement.device, chosen), f"{name} measured {ratio:.2g} times as fast as float32"
    )


def _sizes(config: PreTrainedConfig) -> Sizes:
    """By the configuration alone, which is near enough for a choice."""
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    keys = size * (getattr(text, "num_key_value_heads", None) or heads)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    layer = [(hidden, heads * size), (hidden, keys), (hidden, keys), (heads * size, hidden)]
    return [*layer, (hidden, inner), (hidden, inner), (inner, hidden)], text.num_hidden_layers


@torch.inference_mode()
def time_dtypes(sizes: Sizes, dtypes: Sequence[torch.dtype]) -> Mapping[torch.dtype, float]:
    """Seconds that the matrices of some layers of these sizes take, for one row and for a few, by dtype."""
    layer, layers = sizes
    copies = max(1, min(layers, _MEASURED_BYTES // (4 * sum(wide * out for wide, out in layer))))
    stacks: dict[torch.dtype, nn.ModuleList] = {}
    for dtype in dtypes:
        stack = nn.ModuleList(
            nn.Linear(wide, out, bias=False, dtype=dtype) for _ in range(copies) for wide, out in layer
        )
        pack_linears(stack)
        stacks[dtype] = stack

    def run(dtype: torch.dtype) -> None:
        for rows in _ROWS:
            inputs = {wide: torch.ones(rows, wide, dtype=dtype) for wide, _ in layer}
            for number, linear in enumerate(stacks[dtype]):
                linear(inputs[layer[number % len(layer)][0]])

    return _best(dtypes, run)


def settle_threads(
    threads: int | Literal["auto"] | None,
    runner: Runner | None,
    *,
    cores: int | None = None,
    measure: Callable[[Sequence[int], Runner], Mapping[int, float]] | None = None,
) -> Settled[int | None]:
    """How many threads compute, None for torch's own choice: the number asked for, or, for `auto` and a base on a CPU,
    by a measurement of 1, 2, 4, ... and all `cores`. `runner` is that of the base, None for one on another server. The
    caller sets them."""
    if threads != "auto":
        return Settled(threads, "torch's choice" if threads is None else "asked for")
    if runner is not None and runner.model.device.type != "cpu":
        return Settled(None, "torch's choice")
    cores = cores or torch.get_num_threads()
    if cores == 1:
        return Settled(1, "there is one core")
    if runner is None or runner.model.parameters < _SMALLEST_SHARED:
        return Settled(1, "for small models")
    numbers = [*(2**power for power in range((cores - 1).bit_length())), cores]
    seconds = (measure or time_threads)(numbers, runner)
    best = min(numbers, key=seconds.__getitem__)
    chosen = next(number for number in numbers if seconds[number] <= _ENOUGH * seconds[best])
    told = [
        f"{number} measured {seconds[1] / seconds[number]:.2g} times as fast as 1" for number in numbers[1:]
    ]
    return Settled(chosen, ", ".join(told))


def time_threads(numbers: Sequence[int], runner: Runner) -> Mapping[int, float]:
    """Seconds of a step of the model with one token and of one with a few, by number of threads."""
    before = torch.get_num_threads()

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        for rows in _ROWS:
            runner.rehearse(rows)

    try:
        return _best(numbers, run)
    finally:
        torch.set_num_threads(before)


def _best(contestants: Sequence[KeyT], run: Callable[[KeyT], None]) -> Mapping[KeyT, float]:
    """Each contestant's best seconds; the first, of everybody, only warms up."""
    for contestant in contestants:
        run(contestant)
    best: dict[KeyT, float] = dict.fromkeys(contestants, float("inf"))
    begun = perf_counter()
    for _ in range(_ROUNDS):
        for contestant in contestants:
            started = perf_counter()
            run(contestant)
            best[contestant] = min(best[contestant], perf_counter() - started)
        if perf_counter() - begun > _SECONDS:
            break
    return best
