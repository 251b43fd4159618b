"""From a recipe to an expert in memory, sharing what is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import time

from proxyserve.engine.runner import Runner
from proxyserve.errors import LoadError
from proxyserve.experts.changed import changed_state
from proxyserve.experts.recipe import Ingredient, Recipe
from proxyserve.experts.shelf import Resident, Shelf, stamp_of
from proxyserve.models.formats.build import load_changed
from proxyserve.models.formats.detect import content_hash
from proxyserve.models.formats.lora import read_lora
from proxyserve.models.loaded_model import Expert, LoadedModel
from proxyserve.models.loading import Placement, load_model, make_loaded
from proxyserve.models.model_set import make_expert
from proxyserve.types import ModelKey

#: Told how far loading is, from 0 to 1.
Progress = Callable[[float], None]


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
        """Its own models that run as rows of a trunk."""
        own = (self.expert.tuned, self.expert.untuned)
        return tuple(model for model in own if model is not None and model.over is not None)


class Loading:
    """One load of an expert. `trunks` are those taken so far, to be let go if it fails."""

    def __init__(
        self,
        shelf: Shelf,
        placement: Placement,
        recipe: Recipe,
        name: str,
        generation: int,
        progress: Progress,
        expected: str | None,
    ) -> None:
        self._shelf = shelf
        self._placement = placement
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
        stamps = {path: stamp_of(path) for path in paths}
        for number, path in enumerate(paths):
            # Reading for the hash is about half of the work, and brings the files into the page cache.
            self._digests[path] = content_hash(path, self._share(number / len(paths) / 2, 0.5 / len(paths)))
        untuned = None if recipe.untuned is None else self._untuned(recipe.untuned)
        self._progress(0.6)
        tuned, digest = self._tuned(recipe.tuned, untuned)
        expert = make_expert(
            self._name,
            self._shelf.model,
            tuned,
            None if untuned is None else self._as_untuned(untuned),
            generation=self._key.generation,
            protected=recipe.spec.protected,
        )
        for path, stamp in stamps.items():
            if stamp_of(path) != stamp:
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
        shelf, base = self._shelf, self._shelf.base
        if base is not None and ingredient.path == base.folder:
            return base
        resident = self._take(self._digests[ingredient.path])
        if resident is None:
            key = shelf.new_key(ingredient.path.name)
            resident = self._load_folder(ingredient.path, key)
        return resident

    def _tuned(self, ingredient: Ingredient, untuned: Resident | None) -> tuple[LoadedModel, str]:
        """The model and the digest of what it was made of."""
        if ingredient.kind == "folder":
            assert ingredient.path is not None
            digest, base = self._digests[ingredient.path], self._shelf.base
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
        if origin.model.sharding is not None:
            raise LoadError(
                f"'{origin.model.name}' is divided over several processes (--tensor-parallel): there can be no adapter "
                "over it and no changed copy of it; make the expert of a small model"
            )
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
        resident = self._shelf.take(digest)
        if resident is not None:
            self.trunks.append(resident.model.key)
        return resident

    def _take_loaded(self, ingredient: Ingredient) -> Resident:
        """The model that `of` names. Where it came from counts more than what it is called now, and it is read again
        from there if it is gone."""
        name, shelf = ingredient.source.of, self._shelf
        assert name is not None
        if name not in self._recipe.spec.origins:
            resident = shelf.named(name)
            if resident is shelf.base:
                return resident
            if resident.folder is not None:
                self._origins[name] = str(resident.folder)
            return self._take(resident.digest) or self._take_loaded(ingredient)
        folder = Path(self._recipe.spec.origins[name])
        self._origins[name] = str(folder)
        digest = shelf.digest_at(folder)
        if digest is None:
            digest = self._digests[folder] = content_hash(folder)
        return self._take(digest) or self._load_folder(folder, shelf.new_key(name))

    def _load_folder(self, folder: Path, key: ModelKey) -> Resident:
        shelf = self._shelf
        model = load_model(folder, key, self._placement, shelf.tokenizer(folder), beside_steps=True)
        return self._keep(model, self._digests[folder], folder)

    def _load_changed(self, ingredient: Ingredient, origin: Resident, digest: str) -> Resident:
        shelf = self._shelf
        folder = folder_of(origin, ingredient)
        if origin is not shelf.base and content_hash(folder) != origin.digest:
            raise LoadError(f"{folder}: changed since '{origin.model.name}' was loaded from it")
        own = ingredient.path if ingredient.path is not None and ingredient.path.is_dir() else None
        state = changed_state(
            ingredient,
            folder,
            origin.model.module,
            self._placement.dtype,
            self._share(0.6, 0.3),
        )
        module = load_changed(folder, state, self._placement, own=own)
        tokenizer = origin.model.tokenizer
        if own is not None and (own / "tokenizer.json").is_file():
            tokenizer = shelf.tokenizer(own)
        where = ingredient.path or folder
        model = make_loaded(where, self._key, module, tokenizer, self._placement)
        return self._keep(model, digest, None)

    def _keep(self, model: LoadedModel, digest: str, folder: Path | None) -> Resident:
        resident = Resident(Runner(model), digest, folder, [] if folder is None else stamp_of(folder))
        self._shelf.add(resident)
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

    def _as_untuned(self, resident: Resident) -> LoadedModel:
        """The weights under their name, which experts share; those of another expert's tuned model under a name of
        this one's, so that requests for the one do not count for the other."""
        model = resident.model
        if not model.name.endswith(".tuned"):
            return model
        key = ModelKey(f"{self._name}.untuned", self._key.generation)
        return replace(model, key=key, over=model, parameters=0, bytes=0)

    def _adapted(self, ingredient: Ingredient, origin: Resident, digest: str) -> LoadedModel:
        assert ingredient.path is not None
        shelf, trunk = self._shelf, origin.model
        adapter = shelf.adapters.get(digest)
        if adapter is None:
            adapter = read_lora(
                ingredient.path,
                trunk.module,
                dtype=trunk.dtype,
                device=trunk.device,
                scale=ingredient.source.scale,
            )
            shelf.adapters[digest] = adapter
        tokenizer = trunk.tokenizer
        if (ingredient.path / "tokenizer.json").is_file():
            tokenizer = shelf.tokenizer(ingredient.path)
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


def folder_of(origin: Resident, change: Ingredient) -> Path:
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
