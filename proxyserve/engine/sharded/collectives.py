"""What the processes of a divided model exchange while they run it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from proxyserve.models.loaded_model import Sharding


def connect(module: nn.Module, sharding: Sharding) -> None:
    """Have the layers of a part exchange what they must, over the default group of `torch.distributed`. Layers must not
    be replaced by others afterwards."""
    for name, together in sharding.layers.items():
        layer = module.get_submodule(name)
        match together.how:
            case "sum":
                layer.register_forward_hook(_sum)
            case "split and sum":
                layer.register_forward_pre_hook(_Split(*sharding.part(together.whole)))
                layer.register_forward_hook(_sum)
            case "gather":
                layer.register_forward_hook(_Gather(together.whole, sharding.size))
            case "look up":
                table = _LookUp(*sharding.part(together.whole))
                layer.register_forward_pre_hook(table.before)
                layer.register_forward_hook(table.after)


def _sum(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    output = output.contiguous()
    dist.all_reduce(output)
    return output


class _Split:
    """This rank's columns of an input that every rank has whole."""

    def __init__(self, start: int, stop: int) -> None:
        self._columns = slice(start, stop)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][..., self._columns], *inputs[1:])


class _Gather:
    """The columns of all ranks side by side, on every rank."""

    def __init__(self, whole: int, size: int) -> None:
        self._whole, self._size, self._most = whole, size, -(-whole // size)

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        missing = self._most - output.shape[-1]
        own = nn.functional.pad(output, (0, missing)) if missing else output.contiguous()
        parts = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=-1)[..., : self._whole]


class _LookUp:
    """Rows of a table of which each rank has some: zeros where another rank has them, and the sum. For one thread."""

    def __init__(self, start: int, stop: int) -> None:
        self._start, self._last = start, stop - start - 1
        self._elsewhere: Tensor | None = None

    def before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = inputs[0] - self._start
        self._elsewhere = (own < 0) | (own > self._last)
        return (own.clamp(0, self._last), *inputs[1:])

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._elsewhere is not None
        return _sum(layer, inputs, output.masked_fill(self._elsewhere[..., None], 0))
