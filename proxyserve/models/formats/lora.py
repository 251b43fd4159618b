"""PEFT LoRA adapters: low-rank changes of a loaded model's linear layers.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with two matrices per changed module,
`base_model.model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]; the module then computes
`W x + scaling * B (A x)`, `scaling` being `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` with `use_rslora`. What
else a configuration may ask for changes other things than this sum and is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from proxyserve.errors import LoadError

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MERGE = "merge it into a full folder with peft's merge_and_unload and load that"
_RETRAIN = "it cannot be merged either; train a plain LoRA adapter"

#: Fields that are read below, or that only say where an adapter came from and how it was trained.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
}
#: Fields that, where they are set, make an adapter more than a low-rank sum: why, and what to do instead.
_REFUSED = {
    "alora_invocation_tokens": ("activated LoRA begins in the middle of a text", _RETRAIN),
    "arrow_config": ("Arrow chooses among adapters token by token", _RETRAIN),
    "kasa_config": ("KaSA changes the weights of the model itself", _MERGE),
    "layer_replication": ("it repeats layers of the model", _MERGE),
    "lora_bias": ("it adds a bias", _MERGE),
    "modules_to_save": ("it replaces whole modules", _MERGE),
    "target_parameters": ("it changes stacked parameters, as of a mixture of experts", _MERGE),
    "trainable_token_indices": ("it changes embeddings", _MERGE),
    "use_bdlora": ("BD-LoRA stores block-diagonal matrices", _MERGE),
    "use_dora": ("DoRA rescales the merged weights", _MERGE),
    "use_qalora": ("QA-LoRA pools the inputs", _MERGE),
}
#: Initialisations that leave the model's own weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not.
_INITS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
#: A regular expression with more repetitions than this could take for ever on a module's name.
_MOST_REPEATS = 4


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The change of one linear layer: `a` [rank, in], `b` [out, rank], `b` multiplied by all scales already. `a` and
    `b.t()` are contiguous, which on a CPU is the fastest for `x @ a.t() @ b.t()`. `transposed`: the layer stores its
    weight as [in, out] (GPT-2's Conv1D)."""

    a: Tensor
    b: Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer's weight."""
        size_out, size_in = self.b.shape[0], self.a.shape[1]
        return (size_in, size_out) if self.transposed else (size_out, size_in)

    def delta(self) -> Tensor:
        """What is added to the layer's weight, in its shape, float32."""
        product = self.b.float() @ self.a.float()
        return product.t() if self.transposed else product


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter. `rank` is the largest of its modules; `modules` maps the names that the modules have in the trunk
    (`model.layers.0.self_attn.q_proj`) to their changes; `bytes` are those of all tensors."""

    rank: int
    modules: Mapping[str, LoraModule]
    bytes: int


def read_lora(
    folder: Path, trunk: nn.Module, *, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> LoraWeights:
    """Read an adapter over `trunk`; `scale` multiplies its change. Raises LoadError if a file is damaged, if a tensor
    fits no linear layer of the trunk, or if the adapter is more than a low-rank sum."""
    config = _read_config(folder)
    _refuse_unsupported(config, str(folder))
    scaling = _Scaling.of(config, str(folder))
    named = dict(trunk.named_modules())
    find_head = getattr(trunk, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    modules: dict[str, LoraModule] = {}
    for name, (a, b) in sorted(_read_pairs(folder / _WEIGHTS).items()):
        where = f"{folder / _WEIGHTS}: {name}"
        size_in, size_out, transposed = _linear_shape(name, named.get(name), head, where)
        rank = scaling.rank(name)
        if tuple(a.shape) != (rank, size_in) or tuple(b.shape) != (size_out, rank):
            raise LoadError(
                f"{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} should be [{rank}, {size_in}] and "
                f"[{size_out}, {rank}] by {_CONFIG} and the model; the adapter is for another model, or damaged"
            )
        factor = scaling.factor(name, rank) * scale
        down = a.to(device=device, dtype=dtype).contiguous()
        up = (b.t().float() * factor).to(device=device, dtype=dtype).contiguous()
        if not (down.isfinite().all() and up.isfinite().all()):
            raise LoadError(
                f"{where}: NaN or infinity among the weights (as {dtype}); train or save it again"
            )
        modules[name] = LoraModule(down, up.t(), transposed)
    tensors = [tensor for module in modules.values() for tensor in (module.a, module.b)]
    return LoraWeights(
        rank=max(module.a.shape[0] for module in modules.values()),
        modules=modules,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def merge_lora(trunk_state: Mapping[str, Tensor], weights: LoraWeights) -> dict[str, Tensor]:
    """The state of a full model that computes what trunk and adapter do: `W + B A`, added in float32."""
    merged = dict(trunk_state)
    for name, module in weights.modules.items():
        key = f"{name}.weight"
        if key not in merged:
            raise LoadError(f"{key}: the adapter changes it, but the model's state does not have it")
        weight = merged[key]
        merged[key] = (weight.float() + module.delta().to(weight.device)).to(weight.dtype)
    return merged


@dataclass(frozen=True, slots=True)
class _Scaling:
    """Ranks and alphas: those of all modules, and those of modules whose names fit a pattern (the first that does)."""

    r: int
    alpha: float
    square_root: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> _Scaling:
        ranks = _patterns(config, "rank_pattern", where)
        alphas = _patterns(config, "alpha_pattern", where)
        return cls(
            r=_rank(config.get("r"), "r", where),
            alpha=_alpha(config.get("lora_alpha"), "lora_alpha", where),
            square_root=bool(config.get("use_rslora")),
            ranks=tuple((key, _rank(value, "rank_pattern", where)) for key, value in ranks),
            alphas=tuple((key, _alpha(value, "alpha_pattern", where)) for key, value in alphas),
        )

    def rank(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.r)

    def factor(self, module: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.square_root else rank)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise LoadError(f"{folder}: no such folder")
    file = folder / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{folder}: no {_CONFIG}; a PEFT adapter folder is expected") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise LoadError(f"{file}: a JSON object is expected")
    return config


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoadError(
            f"{where}: {_CONFIG} has peft_type {kind!r}; only LORA can be served. If peft can merge it, {_MERGE}"
        )
    for name, value in config.items():
        if name in _HARMLESS or value in (None, False, "", [], {}):
            continue
        reason, advice = _REFUSED.get(name, ("it is not known here and may change the results", _MERGE))
        raise LoadError(f"{where}: {_CONFIG} sets {name} ({reason}), which cannot be served; {advice}")
    bias = config.get("bias")
    if bias not in (None, "none"):
        raise LoadError(f"{where}: {_CONFIG} has bias {bias!r}; only 'none' can be served; {_MERGE}")
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise LoadError(
            f"{where}: {_CONFIG} has init_lora_weights {init!r}, which changes the weights of the model itself; "
            f"convert it with peft's path_initial_model_for_weight_conversion, or {_MERGE}"
        )


def _rank(value: Any, field: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoadError(f"{where}: {field} in {_CONFIG} must be a positive whole number, not {value!r}")
    return value


def _alpha(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoadError(f"{where}: {field} in {_CONFIG} must be a finite number, not {value!r}")
    return float(value)


def _patterns(config: Mapping[str, Any], field: str, where: str) -> list[tuple[re.Pattern[str], Any]]:
    """Patterns with their values, in the order of the file. As in peft, one fits the end of a module's name, from the
    name's start or from a dot on."""
    entries = config.get(field) or {}
    if not isinstance(entries, dict):
        raise LoadError(f"{where}: {field} in {_CONFIG} must be an object")
    compiled = []
    for pattern, value in entries.items():
        plain = pattern.replace("(?:", "(")
        if len(re.findall(r"[*+?{]", plain)) > _MOST_REPEATS or re.search(r"\)[*+{]", plain):
            raise LoadError(
                f"{where}: '{pattern}' under {field} in {_CONFIG} could take too long to match; name the modules"
            )
        try:
            compiled.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            raise LoadError(
                f"{where}: '{pattern}' under {field} in {_CONFIG} is no regular expression: {error}"
            ) from error
    return compiled


def _read_pairs(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices A and B, on the CPU as they are stored, by the module's name in the trunk."""
    if not file.is_file():
        pickles = [
            name for name in ("adapter_model.bin", "adapter_model.pt") if file.with_name(name).is_file()
        ]
        pickled = f"{pickles[0]} is a pickle and is never opened; " if pickles else ""
        raise LoadError(f"{file.parent}: no {file.name}; {pickled}save the adapter as safetensors")
    sides: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                match = _TENSOR.fullmatch(key)
                if match is None:
                    raise LoadError(f"{file}: {key}: {_why_not_lora(key)}; {_MERGE}")
                tensor = tensors.get_tensor(key)
                if not tensor.is_floating_point() or tensor.dim() != 2:
                    raise LoadError(
                        f"{file}: {key}: a matrix of floating-point numbers is expected, not {tensor.dtype} "
                        f"{list(tensor.shape)}; save the adapter again"
                    )
                pair = sides.setdefault(match["module"], {})
                if match["side"] in pair:
                    raise LoadError(f"{file}: {key}: the file has this matrix twice; save the adapter again")
                pair[match["side"]] = tensor
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file}: incomplete or damaged ({error}); copy it again") from error
    if not sides:
        raise LoadError(f"{file}: no LoRA weights in it; save the adapter again")
    for module, pair in sides.items():
        if len(pair) < 2:
            absent = "B" if "A" in pair else "A"
            raise LoadError(f"{file}: {module}.lora_{absent}.weight is missing; save the adapter again")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _why_not_lora(key: str) -> str:
    if "lora_embedding_" in key:
        return "adapters on embeddings cannot be served"
    if "lora_magnitude" in key:
        return "DoRA cannot be served"
    if key.endswith(".bias"):
        return "trained biases cannot be served"
    return "this is no LoRA matrix but a weight in full, which cannot be served"


def _linear_shape(name: str, module: nn.Module | None, head: object, where: str) -> tuple[int, int, bool]:
    """(in, out, whether stored transposed) of a linear layer of the trunk, told by its attributes: layers may have
    been replaced by others that compute the same."""
    if "experts" in name.split("."):
        raise LoadError(f"{where}: adapters on experts of a mixture of experts cannot be served; {_MERGE}")
    if module is None:
        raise LoadError(f"{where}: the model has no such module; the adapter is for another model")
    if module is head:
        raise LoadError(f"{where}: adapters on the LM head cannot be served; {_MERGE}")
    if hasattr(module, "num_embeddings"):
        raise LoadError(f"{where}: adapters on embeddings cannot be served; {_MERGE}")
    for names, transposed in ((("in_features", "out_features"), False), (("nx", "nf"), True)):
        size_in, size_out = (getattr(module, name, None) for name in names)
        if isinstance(size_in, int) and isinstance(size_out, int):
            return size_in, size_out, transposed
    raise LoadError(f"{where}: {type(module).__name__} is no linear layer; {_MERGE}")
