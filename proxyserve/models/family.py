"""Load a base and its experts from folders, sharing what can be shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement, choose_placement, load_model
from proxyserve.models.model_set import ModelSet, make_expert
from proxyserve.models.quantization import Bits, check_quantization, quantized
from proxyserve.models.remote import load_remote
from proxyserve.models.upstream import RemoteSource
from proxyserve.types import NAME, ModelKey


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """Folders of one expert. `untuned` None loads the tuned model alone."""

    name: str
    tuned: Path
    untuned: Path | None = None


def load_family(
    base: Path | RemoteSource,
    experts: Sequence[ExpertSource] = (),
    *,
    base_name: str | None = None,
    placement: Placement | None = None,
    quantize: Bits | None = None,
    load_base: Callable[[Path, ModelKey], LoadedModel] | None = None,
    progress: Callable[[str], None] = lambda message: None,
    read: Callable[..., LoadedModel] = load_model,
) -> ModelSet:
    """Load everything, each folder once. The base is called `base_name` or after its folder (a remote one after its
    name there); an untuned model that several experts share is called after its folder. `quantize` stores the linear
    layers of a local base in fewer bits; `load_base` loads it in another way than into this process alone. `read` makes
    a model of a folder, as `load_model` does; somebody who only plans needs no weights. Raises LoadError; `progress`
    is told what is being loaded."""
    placement = placement or choose_placement()
    remote = None
    if quantize is not None:
        if isinstance(base, RemoteSource):
            raise LoadError("--quantize is for a base in this process, not for one on another server")
        check_quantization(quantize, placement.device, placement.dtype)
    if isinstance(base, RemoteSource):
        progress(f"asking {base.url}")
        remote = load_remote(base, name=base_name, device=placement.device)
        name = remote.name
    else:
        name = base_name or _name_of(base)
    if not NAME.fullmatch(name):
        raise LoadError(
            f"'{name}' cannot name the base; give --served-name letters, digits, '_' and '-' only"
        )
    loaded: dict[Path, LoadedModel] = {}
    taken = {name} | {f"{expert.name}.tuned" for expert in experts}

    def load(path: Path, wanted_name: str) -> LoadedModel:
        folder = path.expanduser().resolve()
        if folder not in loaded:
            progress(f"loading {wanted_name} from {path}")
            key = ModelKey(wanted_name)
            loaded[folder] = read(path, key, placement, quantized=path == base)
        return loaded[folder]

    def untuned_name(path: Path) -> str:
        """After its folder, with a number where two folders have one name."""
        folder, candidate, number = path.expanduser().resolve(), _name_of(path), 1
        if folder in loaded:
            return loaded[folder].name
        while candidate in taken:
            number += 1
            candidate = f"{_name_of(path)}-{number}"
        taken.add(candidate)
        return candidate

    if load_base is not None and isinstance(base, Path):
        progress(f"loading {name} from {base}")
        loaded[base.expanduser().resolve()] = load_base(base, ModelKey(name))
    base_model = load(base, name) if isinstance(base, Path) else remote
    assert base_model is not None
    if quantize is not None:
        assert isinstance(base_model, LoadedModel)
        if base_model.quantized is not None:
            raise LoadError(
                f"{base_model.path}: its weights are quantised already ({base_model.quantized.how}); "
                "leave out --quantize"
            )
        progress(f"quantising {name} to {quantize}")
        base_model = loaded[base_model.path] = quantized(base_model, quantize)
    pairs = []
    for expert in experts:
        if not NAME.fullmatch(expert.name):
            raise LoadError(
                f"'{expert.name}' is no expert name; use letters, digits, '_' and '-', at most 64"
            )
        tuned = load(expert.tuned, f"{expert.name}.tuned")
        untuned = load(expert.untuned, untuned_name(expert.untuned)) if expert.untuned else None
        pairs.append(make_expert(expert.name, base_model, tuned, untuned))
    return ModelSet(base_model, pairs)


def _name_of(path: Path) -> str:
    return path.expanduser().resolve().name
