"""What a spec asks for, with its files found: every path checked, every format known, nothing loaded yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from proxyserve.errors import Forbidden, InvalidRequest, LoadError
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.models.formats.detect import content_files, detect

#: A source's format, or what it is without files of its own.
Kind = Literal["folder", "lora", "diff", "compressed", "merge", "loaded"]
#: Kinds that change a small model which must be known.
_CHANGES: frozenset[Kind] = frozenset({"lora", "diff", "compressed", "merge"})


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One model's source. `path` is None for merges, whose `parts` have theirs, and for loaded models; `from_hub`: it
    was a hub id."""

    source: Source
    kind: Kind
    path: Path | None = None
    parts: tuple[tuple[float, Ingredient], ...] = ()
    from_hub: bool = False

    @property
    def is_change(self) -> bool:
        return self.kind in _CHANGES


@dataclass(frozen=True, slots=True)
class Recipe:
    """`tuned` is made of the model that its `of` names if it has one, else of `untuned`. Where the spec has no untuned
    model, that is what the tuned one is made of (so that `untuned` here is its `of`), or none."""

    spec: ExpertSpec
    tuned: Ingredient
    untuned: Ingredient | None

    @property
    def formats(self) -> dict[str, str]:
        formats = {"tuned": self.tuned.kind}
        if self.untuned is not None:
            formats["untuned"] = self.untuned.kind
        return {role: str(kind) for role, kind in formats.items()}

    def paths(self) -> Iterator[Path]:
        """Everything that will be read."""
        for ingredient in (self.tuned, self.untuned):
            if ingredient is not None:
                yield from (part.path for _, part in ingredient.parts if part.path is not None)
                if ingredient.path is not None:
                    yield ingredient.path


def make_recipe(spec: ExpertSpec, roots: Roots) -> Recipe:
    """Find the files of a spec. Raises InvalidRequest and Forbidden with the field at fault (`tuned.merge[1].path`),
    and LoadError for files of no known format."""
    trusted = spec.trusted
    tuned = _ingredient(spec.tuned, "tuned", roots, trusted)
    untuned = None if spec.untuned is None else _ingredient(spec.untuned, "untuned", roots, trusted)
    if untuned is not None and untuned.is_change:
        raise InvalidRequest(
            f"The untuned model is a {untuned.kind}; it must be a whole folder or a loaded model ('of').",
            param="untuned.format",
        )
    if tuned.is_change:
        if spec.tuned.of is None and untuned is None:
            raise InvalidRequest(
                f"A {tuned.kind} changes a small model: name a loaded one with 'of', or give 'untuned'.",
                param="tuned.of",
            )
        if untuned is None:
            untuned = Ingredient(Source(of=spec.tuned.of), "loaded")
    return Recipe(spec, tuned, untuned)


def pinned(recipe: Recipe) -> ExpertSpec:
    """The spec with the revisions that the hub's ids stood for, so that it means the same later."""

    def pin(ingredient: Ingredient) -> Source:
        source, path = ingredient.source, ingredient.path
        if ingredient.parts:
            return replace(source, merge=tuple((weight, pin(part)) for weight, part in ingredient.parts))
        if not ingredient.from_hub or source.path is None or path is None:
            return source
        # A snapshot's folder is called after its commit; the revision may have been a branch.
        return replace(source, path=f"{source.path.partition('@')[0]}@{path.name}")

    spec = recipe.spec
    untuned = None if spec.untuned is None or recipe.untuned is None else pin(recipe.untuned)
    return replace(spec, tuned=pin(recipe.tuned), untuned=untuned)


def needs_hub(spec: ExpertSpec, roots: Roots) -> bool:
    """Whether `make_recipe` would have to ask the hub, which can take long."""
    sources = [spec.tuned, *(part for _, part in spec.tuned.merge)]
    sources += [] if spec.untuned is None else [spec.untuned]
    return any(source.path is not None and roots.is_hub_id(source.path) for source in sources)


def _ingredient(source: Source, where: str, roots: Roots, trusted: bool) -> Ingredient:
    if source.merge:
        parts = tuple(
            (weight, _ingredient(part, f"{where}.merge[{number}]", roots, trusted))
            for number, (weight, part) in enumerate(source.merge)
        )
        for number, (_, part) in enumerate(source.merge):
            if part.of is not None:
                raise InvalidRequest(
                    "All parts of a merge change one model: name it beside 'merge'.",
                    param=f"{where}.merge[{number}].of",
                )
        return Ingredient(source, "merge", parts=parts)
    if source.path is None:
        return Ingredient(source, "loaded")
    try:
        from_hub = not trusted and roots.is_hub_id(source.path)
        path = _trusted(source.path) if trusted else roots.find(source.path)
        if not trusted:
            roots.check(path, content_files(path))  # before a file is opened
        kind: Kind = source.format or detect(path)
    except Forbidden as error:
        raise Forbidden(error.message, param=f"{where}.{error.param}") from None
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=f"{where}.{error.param}") from None
    if kind == "folder" and source.of is not None:
        raise InvalidRequest(
            "A whole folder changes no other model; leave 'of' out. What it was tuned from is 'untuned'.",
            param=f"{where}.of",
        )
    if kind == "folder" and (source.scale != 1.0 or source.layers is not None):
        field = "scale" if source.scale != 1.0 else "layers"
        raise InvalidRequest("A whole folder has nothing to be scaled.", param=f"{where}.{field}")
    if kind == "lora" and source.layers is not None:
        raise InvalidRequest("'layers' is for diffs; adapters have none.", param=f"{where}.layers")
    return Ingredient(source, kind, path, from_hub=from_hub)


def _trusted(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.exists():
        raise LoadError(f"{text}: no such folder or file")
    return path
