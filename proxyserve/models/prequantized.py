"""Bases whose files are quantised already, as transformers loads them.

    compressed-tensors, fp8      spelled out while they are loaded: smaller files, weights in the server's dtype
    torchao                      kept as they are stored
    gptq, awq, bitsandbytes, ... kept as they are stored, by kernels for GPUs

What is spelled out is a plain model, and whatever works with one works with it. compressed-tensors would do so by
itself at the first forward, after memory was planned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from proxyserve.errors import LoadError

_SPELLED_OUT = ("compressed-tensors", "fp8")
#: Kept as they are stored, on a CPU as well.
_ANYWHERE = ("torchao",)


def method_of(config: PreTrainedConfig) -> str | None:
    """How the weights in the files are quantised; None if they are not."""
    found = getattr(config, "quantization_config", None)
    return None if not found else str(found.get("quant_method", "unnamed"))


def is_spelled_out(method: str) -> bool:
    """Whether the model is one of plain weights when it is loaded."""
    return method in _SPELLED_OUT


def refuse_quantized(config: PreTrainedConfig, where: str, what: str) -> None:
    """Raise LoadError if the files are quantised: `what` must not be."""
    method = method_of(config)
    if method is not None:
        raise LoadError(
            f"{where}: its weights are quantised already ({method}), and {what} must not be; use the model in "
            "bfloat16, float16 or float32"
        )


def check_prequantized(config: PreTrainedConfig, device: torch.device, where: str) -> None:
    """Raise LoadError unless quantised weights of this configuration can be loaded, with what is installed."""
    method = method_of(config)
    if method is None:
        return
    if device.type == "cpu" and method not in (*_SPELLED_OUT, *_ANYWHERE):
        raise LoadError(
            f"{where}: its weights are quantised for kernels that need a GPU ({method}); on a CPU use one in "
            f"{', '.join((*_SPELLED_OUT, *_ANYWHERE))}, or in bfloat16 with --quantize"
        )
    try:
        quantizer = AutoHfQuantizer.from_config(stored_config(config), pre_quantized=True)
        quantizer.validate_environment(device_map=_device_map(device), weights_only=True)
    except ImportError as error:
        raise LoadError(
            f"{where}: its weights are quantised ({method}), and a package for that is missing: {error}"
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{where}: its quantised weights ({method}) cannot be used here: {error}") from error


def stored_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The files' quantization_config, as they are to be loaded."""
    found = dict(config.quantization_config)
    return found | {"dequantize": True} if is_spelled_out(str(found.get("quant_method"))) else found


def loading_options(device: torch.device) -> dict[str, Any]:
    """For `from_pretrained`, of weights that kernels for GPUs expect there from the start."""
    device_map = _device_map(device)
    return {} if device_map is None else {"device_map": device_map}


def _device_map(device: torch.device) -> dict[str, torch.device] | None:
    return None if device.type == "cpu" else {"": device}


def plain_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """The width of the head, and the number of parameters, that the model has without quantisation."""
    plain = type(config).from_dict(
        {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(plain)
    head: nn.Module = module.get_output_embeddings()
    return head.weight.shape[0], sum(parameter.numel() for parameter in module.parameters())  # type: ignore[index,return-value]
