"""Weight-only quantisation of a base through torchao: its linear layers in fewer bits, all else as it was.

The head stays as it is, as in most published quantised models, and so do embeddings and norms. What it changes is
measured where it is done: the logits of a few tokens before and after.

torchao 0.18 has int8 for every device, but on a CPU it spells the whole matrix out for each product. There the numbers
that it makes go into an `Int8Linear`, which uses PyTorch's own kernel for few rows. Measured on a 2-core AVX-512
machine, one thread, 4096 x 4096, ms for 1 / 4 / 32 rows: bfloat16 packed 0.9 / 1.4 / 3.5, torchao's int8 21 / 20 / 23,
`Int8Linear` 1.4 / 1.3 / 9.5. So it is memory that it saves on a CPU, not time. int4 it has for GPUs alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from proxyserve.errors import LoadError

if TYPE_CHECKING:
    from proxyserve.models.loaded_model import LoadedModel

Bits = Literal["int8", "int4"]

#: Tokens whose logits are compared.
_COMPARED = 32
#: Rows up to which the kernel for few rows is faster than spelling the matrix out.
_FEW_ROWS = 64
#: Weights that share a scale in int4, as published models have it.
_INT4_GROUP = 128


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a model's linear layers are stored: in bits, or by the method that its files name. `error` is the root mean
    square change of its logits on a few tokens, as a part of their standard deviation; None where the files were
    quantised, since what they were before is not known."""

    how: str
    error: float | None = None


def check_quantization(bits: Bits, device: torch.device, dtype: torch.dtype) -> None:
    """Raise LoadError for what cannot be done here, before anything is loaded."""
    if bits == "int4" and device.type == "cpu":
        raise LoadError("--quantize int4 needs a GPU: torchao has no int4 for a CPU; use --quantize int8")
    if bits == "int4" and dtype != torch.bfloat16:
        raise LoadError(f"--quantize int4 needs --dtype bfloat16, not {str(dtype).removeprefix('torch.')}")
    _torchao()


def quantized(model: LoadedModel, bits: Bits) -> LoadedModel:
    """The model with its linear layers quantised in place, one by one. Not for one that runs or is shared already.
    Raises LoadError."""
    check_quantization(bits, model.device, model.dtype)
    quantize, config = _torchao()[bits]
    module, head = model.module, model.module.get_output_embeddings()
    before = _logits(model)
    quantize(module, config(), filter_fn=lambda layer, _: type(layer) is nn.Linear and layer is not head)
    if model.device.type == "cpu":
        _use_int8_layers(module)
    error = (_logits(model) - before).square().mean().sqrt() / before.std()
    if not bool(torch.isfinite(error)):
        raise LoadError(
            f"{model.path}: its logits are NaN or infinite in {bits}; serve it without --quantize"
        )
    return replace(model, bytes=_stored_bytes(module), quantized=Quantized(bits, error.item()))


def kept_quantized(model: LoadedModel) -> LoadedModel:
    """A model whose files are quantised, and that keeps its weights as they are stored. Not for one that runs or is
    shared already."""
    if model.device.type == "cpu":
        _use_int8_layers(model.module)
    return replace(model, bytes=_stored_bytes(model.module))


class Int8Linear(nn.Module):
    """Takes the place of an `nn.Linear` whose weights torchao has quantised, with a scale per row. Inputs are rounded
    to bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight: Any = linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("numbers", weight.qdata.contiguous(), persistent=False)
        self.register_buffer("scales", weight.scale.flatten().bfloat16(), persistent=False)
        self.numbers: Tensor
        self.scales: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features).bfloat16()
        if rows.shape[0] <= _FEW_ROWS:
            output = torch._weight_int8pack_mm(rows, self.numbers, self.scales)
        else:
            output = rows @ self.numbers.bfloat16().t() * self.scales
        output = output.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


def _use_int8_layers(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _is_scaled_by_row(child):
                setattr(parent, name, Int8Linear(child))


def _is_scaled_by_row(linear: nn.Linear) -> bool:
    """Whether its weights are torchao's int8 with one scale per row, and its inputs are not to be rounded to int8."""
    weight: Any = linear.weight
    if getattr(weight, "qdata", None) is None or weight.qdata.dtype != torch.int8:
        return False
    return weight.scale.numel() == linear.out_features and getattr(weight, "act_quant_kwargs", None) is None


def _stored_bytes(module: nn.Module) -> int:
    """Of all weights as they lie in memory, tied ones once: parameters, and what kernels keep in buffers."""
    saved = module.state_dict().keys()
    buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
    for layer in module.modules():
        if isinstance(layer, Int8Linear):
            buffers += [layer.numbers, layer.scales]
    return sum(_bytes(tensor) for tensor in (*module.parameters(), *buffers))


def _bytes(tensor: Any) -> int:
    if type(tensor) in (Tensor, nn.Parameter):
        return int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


@torch.inference_mode()
def _logits(model: LoadedModel) -> Tensor:
    length = min(_COMPARED, model.context_length)
    ids = torch.arange(1, length + 1, device=model.device) * 7 % model.vocabulary.size
    logits: Tensor = model.module(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float()


def _torchao() -> dict[Bits, tuple[Callable[..., object], Callable[[], object]]]:
    """Its function, and a configuration for each number of bits."""
    # It warns of every compiled extension that does not fit this Python.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise LoadError(f"--quantize needs torchao: pip install 'proxyserve[quantize]' ({error})") from error

    def int4() -> object:
        return Int4WeightOnlyConfig(group_size=_INT4_GROUP, int4_packing_format="tile_packed_to_4d")

    return {"int8": (quantize_, Int8WeightOnlyConfig), "int4": (quantize_, int4)}
