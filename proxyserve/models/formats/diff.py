"""Diff vectors: what tuning added to each weight, as one safetensors file with the names of the model's own files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from proxyserve.errors import LoadError
from proxyserve.models.formats.companions import copy_companions
from proxyserve.models.formats.tensors import FolderTensors, Shape, explained, write_tensors

FILE = "diff.safetensors"
FORMAT = "proxyserve-diff"
VERSION = "1"

#: Settings by which two models may differ and still compute the same from the same weights.
_NO_PART_IN_THE_FORWARD = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "initializer_range",
        "max_position_embeddings",
        "max_window_layers",  # layer_types says what follows from it
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "tie_word_embeddings",  # the files say which weights there are
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to the weights of a model: by weight, a float32 tensor of the same shape; none where nothing is.
    `path` is where it comes from. Iterating reads one tensor at a time."""

    path: Path
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]

    def delta(self, name: str) -> Tensor:
        """float32, not to be written to. Raises LoadError where it is damaged."""
        delta = self.read(name)
        if not bool(delta.isfinite().all()):
            raise LoadError(f"{self.path}: {name} has NaN or infinite entries; make it again")
        return delta

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.delta(name)) for name in self.shapes)


def difference(tuned: FolderTensors, untuned: FolderTensors) -> Change:
    """Tuned minus untuned, while both are open. Raises LoadError for models of different architecture."""
    _require_one_architecture(tuned, untuned)
    names = dict.fromkeys([*untuned.names, *tuned.names])
    lost = [name for name in names if name not in tuned or name not in untuned]
    if lost:
        one, other = (tuned, untuned) if lost[0] in tuned else (untuned, tuned)
        raise LoadError(f"{one.path}: {len(lost)} weights are not in {other.path} as well, first {lost[0]}")
    wrong = [name for name in names if tuned.shape(name) != untuned.shape(name)]
    if wrong:
        raise LoadError(
            f"{tuned.path}: {len(wrong)} weights have another shape than in {untuned.path}, first {wrong[0]}: "
            f"{list(tuned.shape(wrong[0]))} and {list(untuned.shape(wrong[0]))}"
        )

    def read(name: str) -> Tensor:
        ours, theirs = tuned.get(name), untuned.get(name)
        if torch.float64 in (ours.dtype, theirs.dtype):
            return (ours.double() - theirs.double()).float()
        # Of numbers that float32 holds, its difference is the exact one rounded once, as it is by way of float64.
        return ours.float() - theirs.float()

    return Change(tuned.path, {name: tuned.shape(name) for name in names}, read)


def fitted(change: Change, untuned: FolderTensors) -> Change:
    """The change under the names of the untuned model. Raises LoadError if it is one of another model."""
    names = {name: name for name in change.shapes}
    if untuned.architecture is not None:
        names = untuned.architecture.canonical(change.shapes)
    unknown = [name for name, own in names.items() if own not in untuned]
    if unknown:
        raise LoadError(
            f"{change.path}: {len(unknown)} of {len(names)} names are no weights of {untuned.path}, first "
            f"{unknown[0]}; it was made for another model"
        )
    wrong = [name for name, own in names.items() if change.shapes[name] != untuned.shape(own)]
    if wrong:
        first = wrong[0]
        raise LoadError(
            f"{change.path}: {len(wrong)} of {len(names)} weights have another shape than in {untuned.path}, first "
            f"{first}: {list(change.shapes[first])} instead of {list(untuned.shape(names[first]))}; it was made for "
            "another model"
        )
    raw = {own: name for name, own in names.items()}
    return replace(
        change,
        shapes={own: change.shapes[name] for own, name in raw.items()},
        read=lambda own: change.read(raw[own]),
    )


def make_diff(
    tuned: Path,
    untuned: Path,
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> int:
    """Write tuned minus untuned, stored as `dtype`, and return the size of the file in bytes. `target` is a file if it
    ends in .safetensors, else a folder, which gets the tuned model's tokenizer too where that is another one.
    `progress` is told which share is done. Raises LoadError."""
    with FolderTensors(tuned) as ours, FolderTensors(untuned) as theirs:
        size = write_diff(difference(ours, theirs), target_file(target, FILE), dtype=dtype, progress=progress)
    keep_companions(tuned, untuned, target)
    return size


def write_diff(
    change: Change,
    file: Path,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> int:
    """Write a change as a plain diff and return the size of the file in bytes. Raises LoadError."""
    layout = {name: (dtype, shape) for name, shape in change.shapes.items()}
    tensors = ((name, delta.to(dtype)) for name, delta in tracked(change, progress))
    return write_tensors(file, layout, tensors, {"format": FORMAT, "version": VERSION})


def read_diff(path: Path) -> Change:
    """A diff of ours or of anybody: a file, `diff.safetensors` in a folder, or the only safetensors file in one. Raises
    LoadError."""
    file = _diff_file(path)
    tensors = FolderTensors(file)
    metadata = tensors.metadata
    if metadata.get("format") == FORMAT and metadata.get("version") != VERSION:
        raise LoadError(
            f"{file}: a diff of version {metadata.get('version')}, and this program reads {VERSION}; make it again"
        )
    for name in tensors.names:
        if not tensors.dtype(name).is_floating_point:
            raise LoadError(
                f"{file}: {name} is stored as {tensors.dtype(name)}; a diff has floating-point numbers"
            )
    if not tensors.names:
        raise LoadError(f"{file}: it holds no tensors; make it again")
    return Change(
        file,
        {name: tensors.shape(name) for name in tensors.names},
        lambda name: tensors.get(name).float(),
    )


def target_file(target: Path, name: str) -> Path:
    """Where to write: `target` itself if it is to be a file, else `name` in the folder `target`."""
    return target if target.suffix == ".safetensors" else target / name


def keep_companions(tuned: Path, untuned: Path, target: Path) -> None:
    """Copy what else the tuned model has of its own into `target`, if that is a folder. Raises LoadError."""
    if target.is_dir():
        with explained(target):
            copy_companions(tuned, untuned, target)


def tracked(change: Change, progress: Callable[[float], None]) -> Iterator[tuple[str, Tensor]]:
    """Iterate, and say after each tensor which share of the weights is behind."""
    total = sum(math.prod(shape) for shape in change.shapes.values())
    done = 0
    for name, delta in change:
        yield name, delta
        done += delta.numel()
        progress(done / total if total else 1.0)


def _require_one_architecture(tuned: FolderTensors, untuned: FolderTensors) -> None:
    """A diff says nothing of the configuration, so two models may not differ in what it makes of the weights."""
    if tuned.architecture is None or untuned.architecture is None:
        return
    ours, theirs = (side.architecture.config.to_dict() for side in (tuned, untuned) if side.architecture)
    for key in sorted((ours.keys() | theirs.keys()) - _NO_PART_IN_THE_FORWARD):
        if ours.get(key) != theirs.get(key):
            raise LoadError(
                f"{tuned.path}: config.json says {key} {ours.get(key)!r}, that of {untuned.path} {theirs.get(key)!r}; "
                "a diff changes weights only, use the tuned folder itself"
            )


def _diff_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise LoadError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.safetensors"))
    if path / FILE in files:
        return path / FILE
    if len(files) != 1:
        raise LoadError(
            f"{path}: {len(files)} safetensors files and none is {FILE}; name the file of the diff"
        )
    return files[0]
