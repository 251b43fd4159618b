"""What a path holds, which of its files decide what the expert is, and how much memory it will need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from proxyserve.errors import LoadError
from proxyserve.models.formats import compressed, diff
from proxyserve.models.formats.companions import GENERATION, TOKENIZER_FILES
from proxyserve.models.formats.tensors import FolderTensors, explained

#: A whole Hugging Face folder; a PEFT LoRA adapter; a diff vector (tuned minus untuned); a compressed one.
Kind = Literal["folder", "lora", "diff", "compressed"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_KINDS: dict[str, Kind] = {diff.FORMAT: "diff", compressed.FORMAT: "compressed"}
_FILES: dict[str, Kind] = {diff.FILE: "diff", compressed.FILE: "compressed"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
#: A folder of further chat templates, which transformers reads as well.
TEMPLATES = "additional_chat_templates"
_CONFIGURATION = ("config.json", GENERATION, ADAPTER_CONFIG, *TOKENIZER_FILES)
_PIECE = 1 << 20
_SAMPLES, _SAMPLE = 64, 1 << 12
_EXPECTED = (
    f"a Hugging Face folder (config.json and safetensors), a PEFT adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}), "
    f"{diff.FILE}, or {compressed.FILE}"
)


def detect(path: Path) -> Kind:
    """Seen from names and headers alone. Raises LoadError for pickles, and for whatever else is none of the kinds."""
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        raise LoadError(f"{path}: no such file or folder")
    if (path / ADAPTER_CONFIG).is_file():
        if not (path / ADAPTER_WEIGHTS).is_file():
            _refuse_pickles(path)
            raise LoadError(f"{path}: {ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}; save the adapter again")
        return "lora"
    changes = [name for name in _FILES if (path / name).is_file()]
    others = [file for file in path.glob("*.safetensors") if file.name not in changes]
    if len(changes) == 1 and not others:
        kind = _kind_of_file(path / changes[0])
        if kind != _FILES[changes[0]]:
            raise LoadError(f"{path / changes[0]}: by its header a {kind} file; give it the name of one")
        return kind
    if changes:
        raise LoadError(f"{path}: {changes[0]} lies beside other weights; give it a folder of its own")
    if others and (path / "config.json").is_file():
        return "folder"
    if not others:
        _refuse_pickles(path)
    raise LoadError(f"{path}: nothing that can be an expert; expected is {_EXPECTED}")


def content_files(path: Path) -> list[Path]:
    """The files that decide what the expert is: weights, configuration, tokenizer and chat template; sorted by name.
    Raises LoadError if there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LoadError(f"{path}: no such file or folder")
    files = {*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")}
    # Also links that lead nowhere: whether there is anything at their ends is not for everybody to know.
    named = (path / name for name in _CONFIGURATION)
    files |= {file for file in named if file.is_file() or file.is_symlink()}
    files |= {*path.glob(f"{TEMPLATES}/*.jinja")}
    if not files:
        _refuse_pickles(path)
        raise LoadError(f"{path}: nothing that can be an expert; expected is {_EXPECTED}")
    odd = [file for file in sorted(files) if file.exists() and not file.is_file()]
    if odd:  # a pipe would keep its reader waiting for ever
        raise LoadError(f"{odd[0]}: no regular file")
    return sorted(files)


def content_hash(path: Path, progress: Callable[[float], None] = lambda share: None) -> str:
    """SHA-256, in hexadecimal digits, over names, sizes and contents of `content_files`; where the folder lies makes no
    difference. `progress` is told which share of the bytes has been read. Raises LoadError."""
    files = content_files(path)
    with explained(path):
        sizes = [file.stat().st_size for file in files]
    total, done = max(1, sum(sizes)), 0
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name}\0{size}\0".encode())
        with explained(file), file.open("rb") as content:
            while piece := content.read(_PIECE):
                digest.update(piece)
                done += len(piece)
                progress(min(1.0, done / total))
    return digest.hexdigest()


def sampled_hash(path: Path) -> str:
    """As `content_hash`, of some pieces of each file: tells models from each other that are too large to be read for
    that. Raises LoadError."""
    digest = hashlib.sha256()
    for file in content_files(path):
        with explained(file), file.open("rb") as content:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            for number in range(_SAMPLES):
                content.seek(number * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()


def weight_bytes(path: Path, itemsize: int) -> int:
    """Bytes that the weights of a model folder or an adapter will take at `itemsize` bytes each, tied ones once; read
    from headers alone. A diff makes a whole model of its untuned one: ask for that one's. Raises LoadError."""
    file = path / ADAPTER_WEIGHTS
    with FolderTensors(file if file.is_file() else path) as tensors:
        return tensors.parameters * itemsize


def _kind_of_file(file: Path) -> Kind:
    if file.suffix in _PICKLES:
        raise _pickle(file)
    if file.suffix != ".safetensors":
        raise LoadError(f"{file}: nothing that can be an expert; expected is {_EXPECTED}")
    with explained(file), safe_open(file, framework="pt") as tensors:
        named = (tensors.metadata() or {}).get("format")
    if named not in _KINDS:
        raise LoadError(
            f"{file}: its header does not say what it is; if it is a diff vector (tuned minus untuned), give the "
            'format, "diff"'
        )
    return _KINDS[named]


def _refuse_pickles(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLES:
            raise _pickle(file)


def _pickle(file: Path) -> LoadError:
    return LoadError(f"{file}: a pickle, which could run code and is never opened; save it as safetensors")
