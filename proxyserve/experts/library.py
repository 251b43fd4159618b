"""The small models in memory: each set of weights once, however many experts share it, and gone with the last of them.

    recipe ──load──▶ LoadedExpert ──verify──▶ ──warm──▶ adopted by the engine ──▶ released

Loading, verifying and warming touch nothing that steps use, so that they may happen on another thread.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from weakref import WeakValueDictionary

from proxyserve.engine.arena import Layout, expected_layout
from proxyserve.engine.runner import Runner
from proxyserve.engine.verify import verify_adapter, verify_paged, warm_paged
from proxyserve.errors import LoadError
from proxyserve.experts.changed import changed_bytes, changed_state
from proxyserve.experts.recipe import Ingredient, Recipe
from proxyserve.models.formats.build import load_changed
from proxyserve.models.formats.companions import TOKENIZER_FILES
from proxyserve.models.formats.detect import (
    TEMPLATES,
    content_files,
    content_hash,
    sampled_hash,
    weight_bytes,
)
from proxyserve.models.formats.lora import LoraWeights, read_lora
from proxyserve.models.loaded_model import Expert, LoadedModel, ParkedExpert
from proxyserve.models.loading import Placement, context_length, load_config, load_model, make_loaded
from proxyserve.models.model_set import make_expert
from proxyserve.models.remote import AnyModel
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

#: What of a model's configuration its tokenizer depends on.
_TOKENIZER_CONFIG = ("model_type", "tokenizer_class", "transformers_version")

#: Names, times and sizes of files.
Stamp = list[tuple[str, int, int]]
#: Told how far loading is, from 0 to 1.
Progress = Callable[[float], None]


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


@dataclass(frozen=True, eq=False)
class LoadedExpert:
    """An expert in memory. `trunks` are the weights that it uses, to be released with it, `fresh` those of them that
    were loaded for it. `digest` is the SHA-256 of everything that it was made of. `bytes` are those of what was loaded
    for it alone. `origins` are the folders of the models that its sources' `of` named."""

    expert: Expert
    trunks: tuple[ModelKey, ...]
    fresh: tuple[Runner, ...]
    digest: str
    bytes: int
    origins: Mapping[str, str]

    @property
    def over_trunks(self) -> tuple[LoadedModel, ...]:
        """Its models that run as rows of a trunk."""
        tuned = self.expert.tuned
        return (tuned,) if tuned.over is not None else ()


class Library:
    """Loads experts of one base. Thread-safe, but only one thread may load at a time."""

    def __init__(self, base: AnyModel, base_runner: Runner | None, placement: Placement) -> None:
        """`base_runner` is None for a base on another server, over which nothing can run."""
        self.base = base
        self.placement = placement
        self._lock = threading.RLock()
        self._base: Resident | None = None
        if base_runner is not None:
            folder = base_runner.model.path
            digest = f"base {sampled_hash(folder)}"  # it may be too large to be read for that
            self._base = Resident(base_runner, digest, folder, _stamp(folder), users=1)
        self._residents: dict[ModelKey, Resident] = {}
        #: Told the trunks that nothing needs after a failed load: it may have shared them with an expert that left.
        self.on_unneeded: Callable[[tuple[ModelKey, ...]], object] = lambda _: None
        self._numbers: Counter[str] = Counter()
        self._tokenizers: WeakValueDictionary[str, Tokenizer] = WeakValueDictionary()
        self._adapters: WeakValueDictionary[str, LoraWeights] = WeakValueDictionary()
        if base_runner is not None:
            model = base_runner.model
            self._tokenizers[_tokenizer_digest(model.path)] = model.tokenizer

    def named(self, name: str) -> Resident:
        """The weights that a source's `of` means: an untuned model's own name, or the base's. Raises LoadError."""
        with self._lock:
            if self._base is not None and name in ("base", self.base.name):
                return self._base
            for key, resident in reversed(self._residents.items()):
                if key.name == name:
                    return resident
            names = {
                self.base.name,
                *(key.name for key in self._residents if not key.name.endswith(".tuned")),
            }
        raise LoadError(
            f"There is no loaded model '{name}' to be changed; there are: {', '.join(sorted(names))}."
        )

    def estimate(self, recipe: Recipe) -> int:
        """Bytes that the weights will need at most, by the headers of the files. Raises LoadError."""
        itemsize = self.placement.dtype.itemsize
        total = sum(weight_bytes(folder, itemsize) for folder in self._gone(recipe))
        for ingredient in (recipe.untuned, recipe.tuned):
            if ingredient is None or ingredient.kind == "loaded" or self._is_here(ingredient.path):
                continue
            if ingredient.kind in ("folder", "lora"):
                assert ingredient.path is not None
                total += weight_bytes(ingredient.path, itemsize)
            else:
                total += changed_bytes(ingredient, self._changed_folder(ingredient, recipe), itemsize)
        return total

    def as_parked(self, recipe: Recipe, created: float) -> ParkedExpert:
        """What is known of an expert without its weights. Raises LoadError."""
        untuned = recipe.untuned
        folders = [
            part.path for part in (recipe.tuned, untuned) if part is not None and part.kind == "folder"
        ]
        contexts = [context_length(load_config(path), str(path)) for path in folders if path is not None]
        name = None
        if untuned is not None:
            name = untuned.source.of if untuned.path is None else untuned.path.name
        return ParkedExpert(
            name,
            min(contexts, default=self.base.context_length),
            int(created),
        )

    def expected_layouts(self, recipe: Recipe) -> list[tuple[Layout, int]]:
        """What the KV of models that are new will look like, and their contexts, by their configurations. Raises
        LoadError."""
        folders = self._gone(recipe)
        for ingredient in (recipe.untuned, recipe.tuned):
            if ingredient is not None and ingredient.kind == "folder" and not self._is_here(ingredient.path):
                assert ingredient.path is not None
                folders.append(ingredient.path)
        found = []
        for folder in folders:
            config = load_config(folder)
            layout = expected_layout(config, self.placement.dtype, self.placement.device)
            found.append((layout, context_length(config, str(folder))))
        return found

    def _is_here(self, folder: Path | None) -> bool:
        """Whether what is in this folder now seems to be in memory."""
        if folder is None:
            return False
        stamp = _stamp(folder)
        with self._lock:
            residents = [*self._residents.values(), *([] if self._base is None else [self._base])]
            return any(resident.folder == folder and resident.stamp == stamp for resident in residents)

    def _gone(self, recipe: Recipe) -> list[Path]:
        """The folders of models that `of` names and that are not in memory any more."""
        sources = (part.source for part in (recipe.untuned, recipe.tuned) if part is not None)
        names = dict.fromkeys(source.of for source in sources if source.of is not None)
        folders = (recipe.spec.origins[name] for name in names if name in recipe.spec.origins)
        return [Path(folder) for folder in folders if self._digest_at(Path(folder)) is None]

    def _changed_folder(self, ingredient: Ingredient, recipe: Recipe) -> Path:
        """Where the model lies that a diff or a merge is a change of. Raises LoadError."""
        name = ingredient.source.of
        if name is None:
            assert recipe.untuned is not None  # a recipe has one
            if recipe.untuned.path is not None:
                return recipe.untuned.path
            name = recipe.untuned.source.of
            assert name is not None  # it has no path
        if name in recipe.spec.origins:
            return Path(recipe.spec.origins[name])
        resident = self.named(name)
        return _folder_of(resident, ingredient)

    def keep(self, recipe: Recipe) -> tuple[ModelKey, ...]:
        """Keep the models that `of` names in memory, whatever is evicted, until `let_go` is given what this returns."""
        sources = (part.source for part in (recipe.untuned, recipe.tuned) if part is not None)
        names = {source.of for source in sources if source.of is not None}
        folders = {Path(recipe.spec.origins[name]) for name in names if name in recipe.spec.origins}
        kept = []
        with self._lock:
            for key, resident in self._residents.items():
                if key.name in names or resident.folder in folders:
                    resident.users += 1
                    kept.append(key)
        return tuple(kept)

    # From a recipe to an expert that steps can run ---------------------------------------------------------------

    def load(
        self,
        recipe: Recipe,
        name: str,
        generation: int,
        *,
        progress: Progress = lambda _: None,
        expected: str | None = None,
    ) -> LoadedExpert:
        """Read everything, sharing what is here already. `expected` is the digest that it must have, where these are
        the files of a generation that has been here before. Raises LoadError; then nothing is kept."""
        loading = _Loading(self, recipe, name, generation, progress, expected)
        try:
            loaded = loading.run()
        except BaseException:
            self.on_unneeded(self.let_go(loading.trunks))
            raise
        return loaded

    def verify(self, loaded: LoadedExpert) -> None:
        """Try everything that is new. Raises LoadError for weights that give NaN, or other logits in paged mode."""
        for runner in loaded.fresh:
            verify_paged(runner)
        for model in loaded.over_trunks:
            verify_adapter(self._runner(model.trunk.key), model)

    def warm(self, loaded: LoadedExpert, max_batch: int) -> None:
        for runner in loaded.fresh:
            warm_paged(runner, max_batch)

    def release(self, loaded: LoadedExpert) -> tuple[ModelKey, ...]:
        """The expert is not needed any more. Returns the trunks that nothing needs now, to be dropped by the engine if
        it has them."""
        return self.let_go(loaded.trunks)

    def runners(self) -> list[Runner]:
        """Of everything here, the base included if it is here."""
        with self._lock:
            base = [] if self._base is None else [self._base.runner]
            return base + [resident.runner for resident in self._residents.values()]

    # What loading shares ---------------------------------------------------------------------------------------

    def _runner(self, trunk: ModelKey) -> Runner:
        with self._lock:
            if self._base is not None and trunk == self.base.key:
                return self._base.runner
            return self._residents[trunk].runner

    def let_go(self, trunks: Iterable[ModelKey]) -> tuple[ModelKey, ...]:
        """One user less for each. Returns those that nothing needs now."""
        gone = []
        with self._lock:
            for key in trunks:
                resident = self._residents[key]
                resident.users -= 1
                if resident.users == 0:
                    del self._residents[key]
                    gone.append(key)
        return tuple(gone)

    def _find(self, digest: str) -> Resident | None:
        """Weights of this content, with one more user."""
        with self._lock:
            for resident in self._residents.values():
                if resident.digest == digest:
                    resident.users += 1
                    return resident
        return None

    def _digest_at(self, folder: Path) -> str | None:
        """Of what was loaded from this folder and is in memory."""
        with self._lock:
            found = (resident.digest for resident in self._residents.values() if resident.folder == folder)
            return next(found, None)

    def _add(self, resident: Resident) -> None:
        with self._lock:
            resident.users = 1
            self._residents[resident.model.key] = resident

    def _key(self, wanted: str) -> ModelKey:
        """A key that no model has or had: the wanted name, with a number where another model has it now."""
        with self._lock:
            taken = {self.base.name, "base", *(key.name for key in self._residents)}
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted}-{number}"
            self._numbers[name] += 1
            return ModelKey(name, self._numbers[name])

    def _tokenizer(self, folder: Path) -> Tokenizer:
        """The folder's tokenizer; equal files are loaded once. That matters to steps: whatever loads a tokenizer keeps
        the interpreter to itself, for half a second if the vocabulary is large."""
        digest = _tokenizer_digest(folder)
        found = self._tokenizers.get(digest)
        if found is None:
            found = self._tokenizers[digest] = Tokenizer.load(folder)
        return found


class _Loading:
    """One `Library.load`. `trunks` are those taken so far, to be let go if it fails."""

    def __init__(
        self,
        library: Library,
        recipe: Recipe,
        name: str,
        generation: int,
        progress: Progress,
        expected: str | None,
    ) -> None:
        self._library = library
        self._recipe = recipe
        self._key = ModelKey(f"{name}.tuned", generation)
        self._name = name
        self._progress = progress
        self._expected = expected
        self._digests: dict[Path, str] = {}
        self.trunks: list[ModelKey] = []
        self._fresh: list[Runner] = []
        self._origins: dict[str, str] = {}

    def run(self) -> LoadedExpert:
        recipe = self._recipe
        paths = list(dict.fromkeys(recipe.paths()))
        stamps = {path: _stamp(path) for path in paths}
        for number, path in enumerate(paths):
            # Reading for the hash is about half of the work, and brings the files into the page cache.
            self._digests[path] = content_hash(path, self._share(number / len(paths) / 2, 0.5 / len(paths)))
        untuned = None if recipe.untuned is None else self._untuned(recipe.untuned)
        self._progress(0.6)
        tuned, digest = self._tuned(recipe.tuned, untuned)
        expert = make_expert(
            self._name,
            self._library.base,
            tuned,
            None if untuned is None else untuned.model,
            generation=self._key.generation,
            protected=recipe.spec.protected,
        )
        for path, stamp in stamps.items():
            if _stamp(path) != stamp:
                raise LoadError(f"{path}: changed while it was being loaded; publish it when it is complete")
        self._progress(1.0)
        size = sum(runner.model.bytes for runner in self._fresh)
        if tuned.adapter is not None:
            size += tuned.adapter.bytes
        return LoadedExpert(
            expert,
            tuple(self.trunks),
            tuple(self._fresh),
            _expert_digest(digest, untuned),
            size,
            self._origins,
        )

    def _untuned(self, ingredient: Ingredient) -> Resident:
        if ingredient.path is None:
            return self._take_loaded(ingredient)
        library, base = self._library, self._library._base
        if base is not None and ingredient.path == base.folder:
            return base
        resident = self._take(self._digests[ingredient.path])
        if resident is None:
            key = library._key(ingredient.path.name)
            resident = self._load_folder(ingredient.path, key)
        return resident

    def _tuned(self, ingredient: Ingredient, untuned: Resident | None) -> tuple[LoadedModel, str]:
        """The model and the digest of what it was made of."""
        if ingredient.kind == "folder":
            assert ingredient.path is not None
            digest, base = self._digests[ingredient.path], self._library._base
            self._require_expected(digest, untuned)
            if base is not None and ingredient.path == base.folder:
                return self._as_tuned(base), digest
            resident = self._take(digest) or self._load_folder(ingredient.path, self._key)
            return self._as_tuned(resident), digest
        if ingredient.kind == "loaded":
            resident = self._take_loaded(ingredient)
            self._require_expected(resident.digest, untuned)
            return self._as_tuned(resident), resident.digest
        origin = self._take_loaded(ingredient) if ingredient.source.of is not None else untuned
        assert origin is not None  # a recipe has one
        digest = self._recipe_digest(ingredient, origin)
        self._require_expected(digest, untuned)
        if ingredient.kind == "lora":
            return self._adapted(ingredient, origin, digest), digest
        resident = self._take(digest) or self._load_changed(ingredient, origin, digest)
        return self._as_tuned(resident), digest

    def _require_expected(self, digest: str, untuned: Resident | None) -> None:
        """Before weights are read: those of a generation that comes back go under the key that it had, and another
        expert may still share what is there, which is then of the same content. Raises LoadError."""
        if self._expected is not None and _expert_digest(digest, untuned) != self._expected:
            raise LoadError(
                f"the files of generation {self._key.generation} have changed since it was published; publish them as "
                "a new one"
            )

    def _share(self, start: float, size: float) -> Progress:
        """Progress of a part of the work, from `start` to `start + size` of the whole."""
        return lambda share: self._progress(start + size * share)

    # Weights ---------------------------------------------------------------------------------------------------

    def _take(self, digest: str) -> Resident | None:
        resident = self._library._find(digest)
        if resident is not None:
            self.trunks.append(resident.model.key)
        return resident

    def _take_loaded(self, ingredient: Ingredient) -> Resident:
        """The model that `of` names. Where it came from counts more than what it is called now, and it is read again
        from there if it is gone."""
        name, library = ingredient.source.of, self._library
        assert name is not None
        if name not in self._recipe.spec.origins:
            resident = library.named(name)
            if resident is library._base:
                return resident
            if resident.folder is not None:
                self._origins[name] = str(resident.folder)
            return self._take(resident.digest) or self._take_loaded(ingredient)
        folder = Path(self._recipe.spec.origins[name])
        self._origins[name] = str(folder)
        digest = library._digest_at(folder)
        if digest is None:
            digest = self._digests[folder] = content_hash(folder)
        return self._take(digest) or self._load_folder(folder, library._key(name))

    def _load_folder(self, folder: Path, key: ModelKey) -> Resident:
        library = self._library
        model = load_model(folder, key, library.placement, library._tokenizer(folder), beside_steps=True)
        return self._keep(model, self._digests[folder], folder)

    def _load_changed(self, ingredient: Ingredient, origin: Resident, digest: str) -> Resident:
        library = self._library
        folder = _folder_of(origin, ingredient)
        if origin is not library._base and content_hash(folder) != origin.digest:
            raise LoadError(f"{folder}: changed since '{origin.model.name}' was loaded from it")
        own = ingredient.path if ingredient.path is not None and ingredient.path.is_dir() else None
        state = changed_state(
            ingredient,
            folder,
            origin.model.module,
            library.placement.dtype,
            self._share(0.6, 0.3),
        )
        module = load_changed(folder, state, library.placement, own=own)
        tokenizer = origin.model.tokenizer
        if own is not None and (own / "tokenizer.json").is_file():
            tokenizer = library._tokenizer(own)
        where = ingredient.path or folder
        model = make_loaded(where, self._key, module, tokenizer, library.placement)
        return self._keep(model, digest, None)

    def _keep(self, model: LoadedModel, digest: str, folder: Path | None) -> Resident:
        resident = Resident(Runner(model), digest, folder, [] if folder is None else _stamp(folder))
        self._library._add(resident)
        self.trunks.append(model.key)
        self._fresh.append(resident.runner)
        return resident

    def _as_tuned(self, resident: Resident) -> LoadedModel:
        """The weights under this expert's name: as they are if they were loaded for it, else over those that are
        here."""
        model = resident.model
        if model.key == self._key:
            return model
        return replace(model, key=self._key, over=model, parameters=0, bytes=0)

    def _adapted(self, ingredient: Ingredient, origin: Resident, digest: str) -> LoadedModel:
        assert ingredient.path is not None
        library, trunk = self._library, origin.model
        adapter = library._adapters.get(digest)
        if adapter is None:
            adapter = read_lora(
                ingredient.path,
                trunk.module,
                dtype=trunk.dtype,
                device=trunk.device,
                scale=ingredient.source.scale,
            )
            library._adapters[digest] = adapter
        tokenizer = trunk.tokenizer
        if (ingredient.path / "tokenizer.json").is_file():
            tokenizer = library._tokenizer(ingredient.path)
        return replace(
            trunk,
            key=self._key,
            path=ingredient.path,
            tokenizer=tokenizer,
            eos_ids=trunk.eos_ids | tokenizer.eos_ids,
            created=int(time()),
            parameters=sum(module.a.numel() + module.b.numel() for module in adapter.modules.values()),
            bytes=adapter.bytes,
            over=trunk,
            adapter=adapter,
        )

    def _recipe_digest(self, ingredient: Ingredient, origin: Resident) -> str:
        """Of a changed model: of what it is made of, and how."""
        how = [origin.digest, ingredient.kind]
        for weight, part in ingredient.parts or ((1.0, ingredient),):
            assert part.path is not None
            how += [repr(weight), repr(part.source.scale), repr(part.source.layers), self._digests[part.path]]
        return _digest_of(*how)


def _folder_of(origin: Resident, change: Ingredient) -> Path:
    """Raises LoadError if a diff or a merge has nothing on the disk to be a change of."""
    if origin.folder is None:
        raise LoadError(
            f"'{origin.model.name}' was put together from several files itself; a {change.kind} needs the folder of a "
            "whole model"
        )
    return origin.folder


def _expert_digest(tuned: str, untuned: Resident | None) -> str:
    return _digest_of(tuned, "" if untuned is None else untuned.digest)


def _digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
    return _digest_of(*parts, *(repr(config.get(name)) for name in _TOKENIZER_CONFIG))


def _stamp(path: Path) -> Stamp:
    """Changes when a file that counts does."""
    stats = [(str(file), file.stat()) for file in content_files(path)]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
