"""Loads, checks and gives back experts.

    recipe ──load──▶ LoadedExpert ──verify──▶ ──warm──▶ adopted by the engine ──▶ released

Loading, verifying and warming touch nothing that steps use, so that they may happen on another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from proxyserve.engine.arena import Layout, expected_layout
from proxyserve.engine.runner import Runner
from proxyserve.engine.verify import verify_adapter, verify_paged, warm_paged
from proxyserve.experts.changed import changed_bytes
from proxyserve.experts.loading import LoadedExpert, Loading, Progress, folder_of
from proxyserve.experts.recipe import Ingredient, Recipe
from proxyserve.experts.shelf import Shelf
from proxyserve.models.formats.detect import weight_bytes
from proxyserve.models.loaded_model import ParkedExpert
from proxyserve.models.loading import Placement, context_length, load_config
from proxyserve.models.remote import AnyModel
from proxyserve.types import ModelKey


class Library:
    """Of one base. Thread-safe, but only one thread may load at a time."""

    def __init__(self, base: AnyModel, base_runner: Runner | None, placement: Placement) -> None:
        """`base_runner` is None for a base on another server, over which nothing can run."""
        self.base = base
        self.placement = placement
        self.shelf = Shelf(base, base_runner)
        #: Told the trunks that nothing needs after a failed load: it may have shared them with an expert that left.
        self.on_unneeded: Callable[[tuple[ModelKey, ...]], object] = lambda _: None

    # Before loading ---------------------------------------------------------------------------------------------

    def estimate(self, recipe: Recipe) -> int:
        """Bytes that the weights will need at most, by the headers of the files. Raises LoadError."""
        itemsize = self.placement.dtype.itemsize
        total = sum(weight_bytes(folder, itemsize) for folder in self._gone(recipe))
        for ingredient in (recipe.untuned, recipe.tuned):
            if ingredient is None or ingredient.kind == "loaded" or self.shelf.is_here(ingredient.path):
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
            if (
                ingredient is not None
                and ingredient.kind == "folder"
                and not self.shelf.is_here(ingredient.path)
            ):
                assert ingredient.path is not None
                folders.append(ingredient.path)
        found = []
        for folder in folders:
            config = load_config(folder)
            layout = expected_layout(config, self.placement.dtype, self.placement.device)
            found.append((layout, context_length(config, str(folder))))
        return found

    def _gone(self, recipe: Recipe) -> list[Path]:
        """The folders of models that `of` names and that are not in memory any more."""
        sources = (part.source for part in (recipe.untuned, recipe.tuned) if part is not None)
        names = dict.fromkeys(source.of for source in sources if source.of is not None)
        folders = (recipe.spec.origins[name] for name in names if name in recipe.spec.origins)
        return [Path(folder) for folder in folders if self.shelf.digest_at(Path(folder)) is None]

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
        resident = self.shelf.named(name)
        return folder_of(resident, ingredient)

    def keep(self, recipe: Recipe) -> tuple[ModelKey, ...]:
        """Keep the models that `of` names in memory, whatever is evicted, until `let_go` is given what this returns."""
        sources = (part.source for part in (recipe.untuned, recipe.tuned) if part is not None)
        names = {source.of for source in sources if source.of is not None}
        folders = {Path(recipe.spec.origins[name]) for name in names if name in recipe.spec.origins}
        return self.shelf.keep(names, folders)

    def let_go(self, kept: Iterable[ModelKey]) -> None:
        self.on_unneeded(self.shelf.let_go(kept))

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
        loading = Loading(self.shelf, self.placement, recipe, name, generation, progress, expected)
        try:
            loaded = loading.run()
        except BaseException:
            self.let_go(loading.trunks)
            raise
        return loaded

    def verify(self, loaded: LoadedExpert) -> None:
        """Try everything that is new. Raises LoadError for weights that give NaN, or other logits in paged mode."""
        for runner in loaded.fresh:
            verify_paged(runner)
        for model in loaded.over_trunks:
            verify_adapter(self.shelf.runner(model.trunk.key), model)

    def warm(self, loaded: LoadedExpert, max_batch: int) -> None:
        for runner in loaded.fresh:
            warm_paged(runner, max_batch)

    def release(self, loaded: LoadedExpert) -> tuple[ModelKey, ...]:
        """The expert is not needed any more. Returns the trunks that nothing needs now, to be dropped by the engine if
        it has them."""
        return self.shelf.let_go(loaded.trunks)

    def runners(self) -> list[Runner]:
        """Of everything in memory, the base first if it is here."""
        return self.shelf.runners()
