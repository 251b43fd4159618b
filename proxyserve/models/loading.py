"""From a folder on disk to a model in memory. Everything that can be wrong with the folder is found here, and said."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel, Sharding
from proxyserve.models.prequantized import (
    check_prequantized,
    is_spelled_out,
    loading_options,
    method_of,
    plain_sizes,
    refuse_quantized,
    stored_config,
)
from proxyserve.models.quantization import Quantized, kept_quantized
from proxyserve.models.support import refuse_unsupported_config, refuse_unsupported_module
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

#: While transformers makes a model it patches its own classes, and puts back what it found there. Of two threads that
#: do so at once the second may put back what the first had put in: no model of the process would be tied after that.
#: Whoever calls `from_pretrained` holds this.
MAKING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights are kept."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Whole:
    """What cannot be read off a part of a model: how many logits its head makes, and how many parameters it has."""

    width: int
    parameters: int
    sharding: Sharding | None = None


def choose_placement(device: str = "auto", dtype: str = "auto") -> Placement:
    """Resolve "auto": the first CUDA device if there is one, bfloat16 there and float32 on a CPU."""
    chosen = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LoadError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    if dtype == "auto":
        return Placement(chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise LoadError(f"dtype '{dtype}' is not one of auto, {', '.join(known)}")
    return Placement(chosen, known[dtype])


def load_model(
    path: str | Path,
    key: ModelKey,
    placement: Placement,
    tokenizer: Tokenizer | None = None,
    *,
    beside_steps: bool = False,
    quantized: bool = False,
) -> LoadedModel:
    """Load a Hugging Face folder (safetensors only, no code from the folder is run). `tokenizer` is the folder's, where
    it has been loaded already. `beside_steps`: other threads run models meanwhile (see `loading_dtype`). `quantized`:
    its files may be. Raises LoadError."""
    folder = Path(path).expanduser()
    config = load_config(folder)
    method = method_of(config)
    whole: Whole | None = None
    options: dict[str, Any] = {}
    if method is not None:
        if not quantized:
            refuse_quantized(config, str(folder), "an expert's models")
        check_prequantized(config, placement.device, str(folder))
        whole = Whole(*plain_sizes(config))
        config.quantization_config = stored_config(config)
        options = loading_options(placement.device)
    tokenizer = tokenizer or Tokenizer.load(folder)
    module = whole_model(
        AutoModelForCausalLM,
        folder,
        str(folder),
        config=config,
        dtype=loading_dtype(placement) if beside_steps else placement.dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    if method is None:
        return make_loaded(folder, key, module, tokenizer, placement)
    stored = None if is_spelled_out(method) else Quantized(method)
    loaded = make_loaded(folder, key, module, tokenizer, placement, whole=whole, quantized=stored)
    return loaded if stored is None else kept_quantized(loaded)


def whole_model(model_class: Any, folder: Path | None, where: str, **options: Any) -> PreTrainedModel:
    """`model_class.from_pretrained(folder, ...)` on any thread, one at a time. Raises LoadError, which begins with
    `where`, also if a weight is missing."""
    transformers.utils.logging.disable_progress_bar()  # loading progress is the caller's to show
    try:
        with MAKING:
            module, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise LoadError(f"{where}: the weights cannot be loaded: {error}") from error
    weights_missing(where, report["missing_keys"])
    whole: PreTrainedModel = module
    return whole


def weights_missing(where: str | Path, absent: Collection[str]) -> None:
    """Raise LoadError, which begins with `where`, if there are any."""
    if absent:
        raise LoadError(
            f"{where}: {len(absent)} weights are missing from the files, first {min(absent)}; they would be random. "
            "Save the model again."
        )


def loading_dtype(placement: Placement) -> torch.dtype:
    """What to have transformers load while other threads compute. For any other dtype it changes torch's default, for
    all threads, until it is done. `own_weights` brings the weights into the wanted dtype afterwards, at the price of
    memory for both."""
    return torch.get_default_dtype()


def own_weights(module: PreTrainedModel, placement: Placement) -> None:
    """Move a module to its place. Its weights are in memory of their own afterwards: as they were loaded they may be
    the file, mapped, and whoever overwrites that would change the model. Buffers keep their dtype, and so do weights
    that the model's class wants in float32."""
    exempt = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    exempt += tuple(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():  # quantised
            owner, _, own = name.rpartition(".")
            copied = parameter.detach().clone().to(placement.device)
            setattr(module.get_submodule(owner), own, nn.Parameter(copied, requires_grad=False))
            continue
        kept = any(part in exempt for part in name.split("."))
        parameter.data = parameter.data.to(
            placement.device, parameter.dtype if kept else placement.dtype, copy=True
        )
    module.to(placement.device)
    module.config.dtype = placement.dtype


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder that has all its weight files and can be served. Raises LoadError."""
    _check_folder(folder)
    config = _read_config(folder)
    refuse_unsupported_config(config, str(folder))
    return config


def make_loaded(
    folder: Path,
    key: ModelKey,
    module: PreTrainedModel,
    tokenizer: Tokenizer,
    placement: Placement,
    *,
    whole: Whole | None = None,
    quantized: Quantized | None = None,
) -> LoadedModel:
    """A module with weights as a model that can be served; it is put where `placement` says. `whole` is what it is a
    part of, if it is one. Raises LoadError."""
    module.eval().requires_grad_(False)
    own_weights(module, placement)
    refuse_unsupported_module(module, str(folder))
    if whole is None:
        whole = Whole(module.get_output_embeddings().weight.shape[0], parameter_count(module))
    return LoadedModel(
        key=key,
        path=folder.resolve(),
        module=module,
        tokenizer=tokenizer,
        context_length=context_length(module.config, str(folder)),
        eos_ids=_eos_ids(module, tokenizer),
        vocabulary=SharedVocabulary.of(tokenizer.token_to_id, whole.width),
        parameters=whole.parameters,
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()),
        quantized=quantized,
        sharding=whole.sharding,
    )


def parameter_count(module: PreTrainedModel) -> int:
    """Tied ones once; of distributed ones all parts."""
    return sum(parameter.numel() for parameter in module.parameters())


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise LoadError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder}: no config.json; a Hugging Face model folder is expected")
    if (folder / "adapter_config.json").is_file():
        # Where peft is installed, transformers would load the model that this file names, wherever it lies.
        raise LoadError(f"{folder}: adapter_config.json lies beside a whole model; take it away")
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"{index}: not a readable index of weight files: {error}") from error
        if any(Path(name).name != name for name in names):
            raise LoadError(f"{index}: the files must lie in the same folder; save the model again")
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            raise LoadError(
                f"{folder}: {len(lost)} of {len(names)} weight files are missing, first {lost[0]}"
            )
        files = [folder / name for name in names]
    if not files:
        raise LoadError(
            f"{folder}: no .safetensors file; other weight formats are not loaded, convert them first"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{file}: incomplete or damaged ({error}); copy it again") from error


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{folder}: config.json cannot be used: {error}") from error


def context_length(config: PreTrainedConfig, where: str) -> int:
    """In tokens. Raises LoadError if the configuration does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise LoadError(f"{where}: config.json does not say max_position_embeddings, the longest context")


def _eos_ids(module: torch.nn.Module, tokenizer: Tokenizer) -> frozenset[int]:
    """All ids that end a text: the model's configuration may list several, the tokenizer names one."""
    found = set(tokenizer.eos_ids)
    for config in (getattr(module, "generation_config", None), getattr(module, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        if isinstance(eos, int):
            found.add(eos)
        elif eos is not None:
            found.update(int(token_id) for token_id in eos)
    return frozenset(found)
