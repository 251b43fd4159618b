"""Weights in safetensors files: read one tensor at a time, under one name each whatever wrote the files, and written
the same way."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from proxyserve.errors import LoadError
from proxyserve.models.formats.architecture import Architecture

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Shape = tuple[int, ...]


class FolderTensors:
    """The tensors of a Hugging Face folder (one safetensors file, or shards with an index), or of one safetensors file.

    `names` are in the order of the files. In a folder, a weight that is tied to another has no name of its own, and
    buffers of old files have none. What is read may lie in memory that is mapped from the files: copy what is to
    outlive `close`. Raises LoadError for files that are missing, damaged or contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.architecture = Architecture.of(path) if path.is_dir() else None
        self._stack = ExitStack()
        self._places: dict[str, tuple[Path, str]] = {}
        self._handles: dict[Path, Any] = {}
        self._twins: dict[str, str] = {}
        try:
            for file in weight_files(path):
                self._open(file)
            if self.architecture is not None:
                self._rename(self.architecture)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path) -> None:
        with explained(file):
            handle = self._handles[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            for name in handle.keys():  # noqa: SIM118 (it is no mapping)
                if name in self._places:
                    raise LoadError(f"{self.path}: {name} is in two files; save the model again")
                self._places[name] = (file, name)

    def _rename(self, architecture: Architecture) -> None:
        canonical = architecture.canonical(self._places)
        self._places = {
            canonical[name]: place
            for name, place in self._places.items()
            if not architecture.is_ignored(canonical[name])
        }
        # As transformers does it: what the files have of a tied pair stands for both, and if they have both and these
        # differ, the configuration is wrong and they are not tied.
        for target, source in architecture.ties.items():
            if target in self._places and source not in self._places:
                self._places[source] = self._places.pop(target)
            elif target in self._places and not torch.equal(self.get(target), self.get(source)):
                continue
            self._places.pop(target, None)
            if source in self._places:
                self._twins[target] = source

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    @property
    def bytes(self) -> int:
        """Of all named tensors as they are stored."""
        return sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self._places)

    @property
    def parameters(self) -> int:
        """The number of weights, tied ones counted once."""
        return sum(math.prod(self.shape(name)) for name in self._places)

    @property
    def metadata(self) -> dict[str, str]:
        """The free entries in the header of the first file."""
        return dict(next(iter(self._handles.values())).metadata() or {})

    def __contains__(self, name: object) -> bool:
        """Whether `get` knows `name`: one of `names`, or a weight that is tied to one of them."""
        return name in self._places or name in self._twins

    def twin(self, name: str) -> str | None:
        """The weight that `name` is tied to; None if it is not."""
        return self._twins.get(name)

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises LoadError for numbers of a kind that no weight served here has."""
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise LoadError(
                f"{self.path}: {name} is stored as {code}; use the model in bfloat16, float16 or float32"
            )
        return _DTYPES[code]

    def get(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises LoadError."""
        self.dtype(name)
        file, raw = self._place(name)
        with explained(file):
            tensor: Tensor = self._handles[file].get_tensor(raw)
            return tensor

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _place(self, name: str) -> tuple[Path, str]:
        place = self._places.get(self._twins.get(name, name))
        if place is None:
            raise LoadError(f"{self.path}: there is no weight {name}")
        return place

    def _slice(self, name: str) -> Any:
        file, raw = self._place(name)
        return self._handles[file].get_slice(raw)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the weights: `path` itself if it is a file, else what transformers would load
    from the folder. Raises LoadError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LoadError(f"{path}: no such folder")
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.is_file():
        raise LoadError(f"{path}: no {WEIGHTS}; other weight formats are not loaded, convert them first")
    try:
        places = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: not a readable index of weight files: {error}") from error
    names = sorted(set(places.values()))
    if not names or any(Path(name).name != name for name in names):
        raise LoadError(f"{index}: the files must lie in the same folder; save the model again")
    lost = [name for name in names if not (path / name).is_file()]
    if lost:
        raise LoadError(f"{path}: {len(lost)} of {len(names)} weight files are missing, first {lost[0]}")
    for file in names:
        with explained(path / file), safe_open(path / file, framework="pt") as shard:
            absent = {name for name, place in places.items() if place == file}.difference(shard.keys())
        if absent:
            raise LoadError(f"{path / file}: {min(absent)} should be in it by {INDEX}; save the model again")
    return [path / name for name in names]


def write_tensors(
    file: Path,
    layout: Mapping[str, tuple[torch.dtype, Shape]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> int:
    """Write a safetensors file and return its size in bytes; it is there whole or not at all. `tensors` come in the
    order of `layout` and are written before the next one is asked for. The folder is made. Raises LoadError."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as output:
                output.write(len(text).to_bytes(8, "little") + text)
                for (name, (dtype, shape)), (given, tensor) in zip(layout.items(), tensors, strict=True):
                    if (given, tensor.dtype, tuple(tensor.shape)) != (name, dtype, shape):
                        raise ValueError(f"{given} was written where {name} belongs")
                    output.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                output.flush()
                os.fsync(output.fileno())
                os.fchmod(output.fileno(), 0o644)
            Path(unfinished).replace(file)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    return 8 + len(text) + end


@contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turns what reading or writing `file` raises into LoadError."""
    try:
        yield
    except SafetensorError as error:
        raise LoadError(f"{file}: incomplete or damaged ({error}); copy it again") from error
    except OSError as error:
        raise LoadError(f"{file}: cannot be read or written: {error.strerror or error}") from error
