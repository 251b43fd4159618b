"""The small models in memory: each set of weights once, however many experts share it, and gone with the last of them.
Tokenizers and adapters are shared as well."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from proxyserve.engine.runner import Runner
from proxyserve.errors import LoadError
from proxyserve.models.formats.companions import TOKENIZER_FILES
from proxyserve.models.formats.detect import TEMPLATES, content_files, sampled_hash
from proxyserve.models.formats.lora import LoraWeights
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.remote import AnyModel
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

#: What of a model's configuration its tokenizer depends on.
_TOKENIZER_CONFIG = ("model_type", "tokenizer_class", "transformers_version")

#: Names, times and sizes of files.
Stamp = list[tuple[str, int, int]]


@dataclass(eq=False)
class Resident:
    """Weights in memory, with the runner that runs them. `digest` says what they were made of; `folder` is where they
    can be read again, None where they were put together from several, and `stamp` what its files looked like. `users`
    counts the loaded experts that need them."""

    runner: Runner
    digest: str
    folder: Path | None
    stamp: Stamp
    users: int = 0

    @property
    def model(self) -> LoadedModel:
        return self.runner.model


class Shelf:
    """What is in memory beside the engine's own bookkeeping. Thread-safe."""

    def __init__(self, model: AnyModel, runner: Runner | None) -> None:
        """`model` is the base; `runner` is None for one on another server, over which nothing can run."""
        self.model = model
        self.base: Resident | None = None
        self.residents: dict[ModelKey, Resident] = {}
        #: Adapters by the digest of what they were made of.
        self.adapters: WeakValueDictionary[str, LoraWeights] = WeakValueDictionary()
        self._lock = threading.RLock()
        self._numbers: Counter[str] = Counter()
        self._tokenizers: WeakValueDictionary[str, Tokenizer] = WeakValueDictionary()
        if runner is not None:
            folder = runner.model.path
            digest = f"base {sampled_hash(folder)}"  # it may be too large to be read for that
            self.base = Resident(runner, digest, folder, stamp_of(folder), users=1)
            self._tokenizers[_tokenizer_digest(folder)] = runner.model.tokenizer

    def named(self, name: str) -> Resident:
        """The weights that a source's `of` means: an untuned model's own name, or the base's. Raises LoadError."""
        with self._lock:
            if self.base is not None and name in ("base", self.model.name):
                return self.base
            for key, resident in reversed(self.residents.items()):
                if key.name == name:
                    return resident
            names = {
                self.model.name,
                *(key.name for key in self.residents if not key.name.endswith(".tuned")),
            }
        raise LoadError(
            f"There is no loaded model '{name}' to be changed; there are: {', '.join(sorted(names))}."
        )

    def is_here(self, folder: Path | None) -> bool:
        """Whether what is in this folder now seems to be in memory."""
        if folder is None:
            return False
        stamp = stamp_of(folder)
        with self._lock:
            residents = [*self.residents.values(), *([] if self.base is None else [self.base])]
            return any(resident.folder == folder and resident.stamp == stamp for resident in residents)

    def runners(self) -> list[Runner]:
        """Of everything here, the base first if it is here."""
        with self._lock:
            base = [] if self.base is None else [self.base.runner]
            return base + [resident.runner for resident in self.residents.values()]

    def runner(self, trunk: ModelKey) -> Runner:
        with self._lock:
            if self.base is not None and trunk == self.model.key:
                return self.base.runner
            return self.residents[trunk].runner

    def keep(self, names: Collection[str], folders: Collection[Path]) -> tuple[ModelKey, ...]:
        """One user more for the weights that have one of these names or come from one of these folders, until `let_go`
        is given what this returns."""
        kept = []
        with self._lock:
            for key, resident in self.residents.items():
                if key.name in names or resident.folder in folders:
                    resident.users += 1
                    kept.append(key)
        return tuple(kept)

    def bytes_of(self, trunks: Sequence[ModelKey]) -> int:
        """Bytes that would be free if each of these had one user less."""
        with self._lock:
            uses = Counter(trunks)
            found = ((self.residents.get(key), count) for key, count in uses.items())
            return sum(
                resident.model.bytes
                for resident, count in found
                if resident is not None and resident.users <= count
            )

    def let_go(self, trunks: Iterable[ModelKey]) -> tuple[ModelKey, ...]:
        """One user less for each. Returns those that nothing needs now."""
        gone = []
        with self._lock:
            for key in trunks:
                resident = self.residents[key]
                resident.users -= 1
                if resident.users == 0:
                    del self.residents[key]
                    gone.append(key)
        return tuple(gone)

    def take(self, digest: str) -> Resident | None:
        """Weights of this content, with one more user."""
        with self._lock:
            for resident in self.residents.values():
                if resident.digest == digest:
                    resident.users += 1
                    return resident
        return None

    def digest_at(self, folder: Path) -> str | None:
        """Of what was loaded from this folder and is in memory."""
        with self._lock:
            found = (resident.digest for resident in self.residents.values() if resident.folder == folder)
            return next(found, None)

    def add(self, resident: Resident) -> None:
        with self._lock:
            resident.users = 1
            self.residents[resident.model.key] = resident

    def new_key(self, wanted: str) -> ModelKey:
        """A key that no model has or had: the wanted name, with a number where another model has it now."""
        with self._lock:
            taken = {self.model.name, "base", *(key.name for key in self.residents)}
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted}-{number}"
            self._numbers[name] += 1
            return ModelKey(name, self._numbers[name])

    def tokenizer(self, folder: Path) -> Tokenizer:
        """The folder's tokenizer; equal files are loaded once. That matters to steps: whatever loads a tokenizer keeps
        the interpreter to itself, for half a second if the vocabulary is large."""
        digest = _tokenizer_digest(folder)
        found = self._tokenizers.get(digest)
        if found is None:
            found = self._tokenizers[digest] = Tokenizer.load(folder)
        return found


def stamp_of(path: Path) -> Stamp:
    """Changes when a file that counts does."""
    stats = [(str(file), file.stat()) for file in content_files(path)]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]


def _tokenizer_digest(folder: Path) -> str:
    """Of everything that the tokenizer in a model's folder is made from."""
    parts = []
    templates = sorted(file.name for file in folder.glob(f"{TEMPLATES}/*.jinja"))
    for name in (*TOKENIZER_FILES, *(f"{TEMPLATES}/{template}" for template in templates)):
        file = folder / name
        if file.is_file():
            parts += [name, hashlib.sha256(file.read_bytes()).hexdigest()]
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):  # none, or a damaged one, which is found elsewhere
        config = {}
    parts += [repr(config.get(name)) for name in _TOKENIZER_CONFIG]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
