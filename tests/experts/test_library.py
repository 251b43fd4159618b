"""The small models in memory: each set of weights once, as long as somebody needs it, and what was asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxyserve.engine.arena import expected_layout
from proxyserve.engine.runner import Runner
from proxyserve.errors import LoadError
from proxyserve.experts.library import Library, LoadedExpert
from proxyserve.experts.recipe import make_recipe
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, LayerScale, Source
from proxyserve.models.loading import choose_placement, load_config, load_model
from proxyserve.types import ModelKey
from tests.experts.shelf import FAMILIES, Shelf, load_expert, make_library, make_shelf, save_tiny, save_twin
from tests.tiny import ARCHITECTURES


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"), "llama")


@pytest.fixture
def root(shelf: Shelf, tmp_path: Path) -> Path:
    """A copy of the shelf's folders that a test may change."""
    return shutil.copytree(shelf.root, tmp_path / "root")


@pytest.fixture
def library(root: Path) -> Library:
    return make_library(root / "atlas")


def expert(tuned: str | Source, untuned: str | Source | None = None) -> ExpertSpec:
    def source(value: str | Source) -> Source:
        return Source(value) if isinstance(value, str) else value

    return ExpertSpec(source(tuned), None if untuned is None else source(untuned))


def here(library: Library) -> list[str]:
    """The small models in memory."""
    return [str(runner.model.key) for runner in library.runners()[1:]]


def names(loaded: LoadedExpert) -> tuple[str, str | None]:
    """The trunks of the tuned and the untuned model."""
    untuned = loaded.expert.untuned
    return str(loaded.expert.tuned.trunk.key), None if untuned is None else str(untuned.trunk.key)


# Sharing --------------------------------------------------------------------------------------------------------


def test_weights_of_one_content_are_in_memory_once(root: Path, library: Library) -> None:
    shutil.copytree(root / "qa", root / "again")
    shutil.copytree(root / "small", root / "elsewhere")
    first = load_expert(library, "a", expert("qa", "small"), root)
    same = load_expert(library, "b", expert("qa", "small"), root)
    copied = load_expert(library, "c", expert("again", "elsewhere"), root)
    assert names(first) == names(same) == names(copied) == ("a.tuned@1", "small@1")
    assert here(library) == ["small@1", "a.tuned@1"]
    assert [str(loaded.expert.tuned.key) for loaded in (first, same, copied)] == [
        "a.tuned@1",
        "b.tuned@1",
        "c.tuned@1",
    ]
    assert first.expert.tuned.module is copied.expert.tuned.module
    assert first.bytes > 0 and same.bytes == copied.bytes == 0
    assert first.digest == same.digest == copied.digest
    assert len(first.fresh) == 2 and not same.fresh and not copied.fresh


def test_weights_may_be_tuned_for_one_and_untuned_for_another(root: Path, library: Library) -> None:
    one = load_expert(library, "one", expert("qa", "small"), root)
    two = load_expert(library, "two", expert("record", "qa"), root)
    three = load_expert(library, "three", expert("small", "record"), root)
    assert names(two) == ("two.tuned@1", "one.tuned@1")
    assert names(three) == ("small@1", "two.tuned@1")
    # Under names of their own: who uses one expert does not keep the other one.
    for loaded, name in ((two, "two"), (three, "three")):
        assert loaded.expert.untuned is not None
        assert (loaded.expert.tuned.name, loaded.expert.untuned.name) == (f"{name}.tuned", f"{name}.untuned")
    assert str(three.expert.tuned.key) == "three.tuned@1"
    assert library.release(one) == ()  # both of its models are needed still
    assert library.release(three) == (ModelKey("small"),)
    assert set(library.release(two)) == {ModelKey("one.tuned"), ModelKey("two.tuned")}
    assert here(library) == []


def test_the_base_is_never_loaded_twice(root: Path, library: Library) -> None:
    loaded = load_expert(library, "a", expert("lora-base", "atlas"), root)
    by_name = load_expert(library, "b", expert(Source("lora-base", of="base")), root)
    by_own_name = load_expert(library, "c", expert(Source("lora-base", of="atlas")), root)
    itself = load_expert(library, "d", expert("qa", Source(of="base")), root)
    as_tuned = load_expert(library, "e", expert("atlas", "qa"), root)
    assert here(library) == ["d.tuned@1"]
    for each in (loaded, by_name, by_own_name, itself):
        assert each.expert.untuned is library.base
    assert as_tuned.expert.tuned.trunk is library.base
    assert library.estimate(make_recipe(expert("atlas", "qa"), Roots([root]))) == 0
    assert loaded.expert.tuned.adapter is by_name.expert.tuned.adapter


def test_equal_tokenizers_are_one_object(root: Path, library: Library) -> None:
    save_twin(root / "fourth", root / "small", lambda _, weight: 0.1 * weight)
    first = load_expert(library, "a", expert("qa", "small"), root).expert
    second = load_expert(library, "b", expert("record", "fourth"), root).expert
    assert first.untuned is not None and second.untuned is not None
    assert first.tuned.tokenizer is second.tuned.tokenizer
    assert first.untuned.tokenizer is second.untuned.tokenizer
    assert first.tuned.tokenizer is not first.untuned.tokenizer
    assert first.tuned.tokenizer.has_chat_template and not first.untuned.tokenizer.has_chat_template


def test_a_further_chat_template_makes_another_tokenizer(root: Path, library: Library) -> None:
    load_expert(library, "a", expert("small"), root)
    shutil.copytree(root / "small", root / "talking")
    (root / "talking" / "additional_chat_templates").mkdir()
    (root / "talking" / "additional_chat_templates" / "default.jinja").write_text("hello")
    talking = load_expert(library, "b", expert("talking"), root).expert.tuned
    template = talking.tokenizer.chat_template()
    assert template is not None
    assert template.source == "hello"


# Coming and going -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_trunk_stays_until_its_last_user_has_gone(shelf: Shelf, seed: int) -> None:
    """Experts come and go in random order; what is in memory is what the ones that are there need."""
    random, library = Random(seed), make_library(shelf.base)
    loaded: dict[str, LoadedExpert] = {}
    generation = 0
    for _ in range(25):
        name = random.choice([*shelf.specs])
        before = set(here(library))
        if name in loaded:
            gone = library.release(loaded.pop(name))
            assert before - set(here(library)) == {str(key) for key in gone}
        else:
            spec = shelf.specs[name]
            named = any(source is not None and source.of == "small" for source in (spec.tuned, spec.untuned))
            if named and not any(model.startswith("small@") for model in before):
                with pytest.raises(LoadError, match="There is no loaded model 'small'"):
                    load_expert(library, name, spec, shelf.root)
                assert set(here(library)) == before
                continue
            generation += 1
            loaded[name] = load_expert(library, name, spec, shelf.root, generation=generation)
            assert set(here(library)) - before == {str(runner.model.key) for runner in loaded[name].fresh}
        needed = {
            str(model.trunk.key)
            for entry in loaded.values()
            for model in (entry.expert.tuned, entry.expert.untuned)
            if model is not None and model.trunk is not library.base
        }
        # A change that became a whole model needs the one it was made of while it lives.
        extra = {str(key) for entry in loaded.values() for key in entry.trunks}
        assert needed <= set(here(library)) == extra


def test_a_load_that_fails_keeps_nothing(root: Path, library: Library) -> None:
    broken = load_file(root / "qa" / "model.safetensors")
    broken["model.norm.weight"][:] = torch.nan
    save_file(broken, root / "qa" / "model.safetensors", {"format": "pt"})
    (root / "record" / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match="tokenizer"):
        load_expert(library, "a", expert("record", "small"), root)
    with pytest.raises(LoadError, match="for another model"):
        load_expert(library, "a", expert("lora-base", "small"), root)
    with pytest.raises(LoadError, match="another model"):
        load_expert(library, "a", expert("diff-qa", "atlas"), root)
    assert here(library) == []
    spoiled = library.load(make_recipe(expert("qa", "small"), Roots([root])), "a", 1)
    with pytest.raises(LoadError, match="NaN"):
        library.verify(spoiled)
    assert {key.name for key in library.release(spoiled)} == {"small", "a.tuned"}
    assert here(library) == []


def test_another_vocabulary_is_refused(root: Path, library: Library) -> None:
    tokenizer = json.loads((root / "qa" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = (token for token, number in vocabulary.items() if number in (300, 301))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (root / "qa" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(LoadError, match="different tokenizers"):
        load_expert(library, "a", expert("qa", "small"), root)
    assert here(library) == []


# Names ----------------------------------------------------------------------------------------------------------


def test_untuned_models_are_called_after_their_folders(root: Path, library: Library) -> None:
    """With a number where a name is taken; a key is never used twice."""
    for place, seed in (("x", 21), ("y", 22)):
        save_tiny(root / place / "small", "llama", seed=seed)
    save_tiny(root / "x" / "atlas", "llama", seed=23)
    save_tiny(root / "x" / "base", "llama", seed=24)
    loaded = {
        folder: load_expert(library, f"e{number}", expert("qa", folder), root)
        for number, folder in enumerate(("small", "x/small", "y/small", "x/atlas", "x/base"))
    }
    untuned = {folder: names(entry)[1] for folder, entry in loaded.items()}
    assert untuned == {
        "small": "small@1",
        "x/small": "small-2@1",
        "y/small": "small-3@1",
        "x/atlas": "atlas-2@1",
        "x/base": "base-2@1",
    }
    over = load_expert(library, "over", expert(Source("lora", of="small-3")), root)
    assert names(over) == ("small-3@1", "small-3@1")
    library.release(loaded["small"])
    again = load_expert(library, "again", expert("qa", "small"), root, generation=2)
    assert names(again)[1] == "small@2"


def test_what_is_not_there_is_told_with_what_is(root: Path, library: Library) -> None:
    load_expert(library, "a", expert("qa", "small"), root)
    with pytest.raises(LoadError, match=r"no loaded model 'tiny' .*there are: atlas, small\."):
        load_expert(library, "b", expert(Source("lora", of="tiny")), root)


def test_a_model_that_has_gone_is_read_again_from_where_it_came(root: Path, library: Library) -> None:
    """By `origins`: an expert that names a model with `of` does not depend on who brought that."""
    first = load_expert(library, "first", expert("qa", "small"), root)
    spec = expert(Source("lora", of="small"))
    loaded = load_expert(library, "second", spec, root)
    assert loaded.origins == {"small": str(root / "small")}
    library.release(loaded)
    library.release(first)
    assert here(library) == []
    stored = replace(spec, origins=loaded.origins)
    recipe = make_recipe(stored, Roots([root]))
    estimate, layouts = library.estimate(recipe), library.expected_layouts(recipe)
    again = load_expert(library, "second", stored, root, expected=loaded.digest)
    assert names(again) == ("small@2", "small@2")
    assert estimate == again.bytes
    assert [layout for layout, _ in layouts] == [runner.layout for runner in again.fresh]
    assert library.estimate(recipe) < estimate and library.expected_layouts(recipe) == []


def test_origins_count_more_than_names(root: Path, library: Library) -> None:
    """After a restart models may have come in another order, and have each other's names."""
    save_tiny(root / "x" / "small", "llama", seed=21)
    before = make_library(root / "atlas")
    load_expert(before, "first", expert("qa", "small"), root)
    load_expert(before, "second", expert("record", "x/small"), root)
    spec = expert(Source("lora", of="small-2"))
    published = load_expert(before, "third", spec, root)
    other = load_expert(before, "fourth", expert(Source("lora", of="small")), root)
    load_expert(library, "second", expert("record", "x/small"), root)
    for name, of, entry in (("fourth", "small", other), ("third", "small-2", published)):
        stored = replace(expert(Source("lora", of=of)), origins=entry.origins)
        again = load_expert(library, name, stored, root, expected=entry.digest)
        assert again.expert.tuned.trunk.path == entry.expert.tuned.trunk.path


# Contents -------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_everything_that_the_expert_is_made_of(root: Path, library: Library) -> None:
    specs = [
        expert("qa", "small"),
        expert("qa"),
        expert("small", "qa"),
        expert("qa", "other"),
        expert("lora", "small"),
        expert(Source("lora", scale=0.5), "small"),
        expert("lora", "other"),
        expert(Source("lora", of="small"), "other"),
        expert("diff-qa", "small"),
        expert(Source("diff-qa", scale=0.5), "small"),
        expert(Source("diff-qa", layers=LayerScale(1.0, 0.5)), "small"),
        expert("packed", "small"),
        expert(Source(merge=((0.5, Source("qa")), (0.5, Source("record")))), "small"),
        expert(Source(merge=((0.5, Source("record")), (0.5, Source("qa")))), "small"),
        expert(Source(merge=((0.5, Source("qa")), (0.4, Source("record")))), "small"),
    ]
    load_expert(library, "holder", expert("qa", "small"), root)
    digests = [load_expert(library, f"e{number}", spec, root).digest for number, spec in enumerate(specs)]
    assert len(set(digests)) == len(specs)
    assert all(len(digest) == 64 for digest in digests)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda root: save_twin(root / "qa", root / "qa", lambda _, weight: 1e-3 * weight),
    "chat template": lambda root: (root / "qa" / "chat_template.jinja").write_text("other"),
    "untuned weights": lambda root: save_twin(
        root / "small", root / "small", lambda _, weight: 1e-3 * weight
    ),
    "configuration": lambda root: (root / "qa" / "generation_config.json").write_text(
        '{"eos_token_id": [0, 1]}'
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_have_changed_are_not_what_was_published(
    root: Path, library: Library, change: str
) -> None:
    spec = expert("qa", "small")
    published = load_expert(library, "a", spec, root)
    library.release(published)
    library.release(load_expert(library, "a", spec, root, expected=published.digest))
    CHANGES[change](root)
    with pytest.raises(LoadError, match="have changed since it was published"):
        load_expert(library, "a", spec, root, expected=published.digest)
    assert here(library) == []


def test_a_model_that_changed_on_disk_is_not_changed_by_a_diff(root: Path, library: Library) -> None:
    """A diff of a model in memory is added to the file of the model, which must be the one that was loaded."""
    load_expert(library, "a", expert("qa", "small"), root)
    CHANGES["untuned weights"](root)
    with pytest.raises(LoadError, match="changed since 'small' was loaded"):
        load_expert(library, "b", expert(Source("diff-qa", of="small")), root)
    assert (
        load_expert(library, "c", expert(Source("lora", of="small")), root).expert.tuned.adapter is not None
    )


def _rewrite(root: Path) -> None:
    file = root / "qa" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(4))
    os.utime(file, ns=(1, 1))


WHILE_LOADING: dict[str, Callable[[Path], object]] = {
    "rewritten": _rewrite,
    "another file": lambda root: (root / "qa" / "extra.safetensors").write_bytes(
        (root / "qa" / "model.safetensors").read_bytes()
    ),
    "a file gone": lambda root: (root / "qa" / "chat_template.jinja").unlink(),
    "the untuned one": lambda root: os.utime(root / "small" / "config.json", ns=(1, 1)),
    "renamed away": lambda root: (root / "qa").rename(root / "away"),
}


@pytest.mark.parametrize("change", WHILE_LOADING)
def test_files_that_change_while_they_are_read_are_refused(root: Path, library: Library, change: str) -> None:
    told: list[float] = []

    def progress(share: float) -> None:
        told.append(share)
        if share == 0.6:  # hashed, and the untuned one is loaded
            WHILE_LOADING[change](root)

    recipe = make_recipe(expert("qa", "small"), Roots([root]))
    with pytest.raises(LoadError):
        library.load(recipe, "a", 1, progress=progress)
    assert here(library) == []
    assert told == sorted(told)


@pytest.mark.parametrize("name", ["folder", "lora", "diff", "packed", "soup"])
def test_progress_goes_from_nothing_to_everything(shelf: Shelf, name: str) -> None:
    library = make_library(shelf.base)
    load_expert(library, "holder", shelf.specs["folder"], shelf.root)
    told: list[float] = []
    library.load(make_recipe(shelf.specs[name], Roots([shelf.root])), name, 1, progress=told.append)
    assert told == sorted(told)
    assert 0.0 <= told[0] < 0.6 and told[-1] == 1.0


# Estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("llama-tied", "bfloat16")]
)
def test_estimates_are_what_it_takes(family: str, dtype: str, tmp_path: Path) -> None:
    """Of weights, for each format, alone and with its untuned model in memory; and of the KV's layout."""
    shelf = make_shelf(tmp_path, family)
    for name, spec in shelf.specs.items():
        for held in (False, True):
            library = make_library(shelf.base, dtype=dtype)
            sources = [source for source in (spec.tuned, spec.untuned) if source is not None]
            if held or any(source.of == "small" for source in sources):
                load_expert(library, "holder", expert("third", "small"), shelf.root)
            recipe = make_recipe(spec, Roots([shelf.root]))
            estimate, layouts = library.estimate(recipe), library.expected_layouts(recipe)
            loaded = load_expert(library, name, spec, shelf.root)
            adapter = loaded.expert.tuned.adapter
            real = sum(runner.bytes for runner in loaded.fresh) + (0 if adapter is None else adapter.bytes)
            assert estimate == real == loaded.bytes, (name, held)
            for runner in loaded.fresh:
                context = runner.model.context_length
                held_layouts = {other.layout for other in library.runners() if other not in loaded.fresh}
                assert runner.layout in held_layouts or (runner.layout, context) in layouts, name


def test_a_diff_that_parts_head_and_embeddings_takes_more(tmp_path: Path) -> None:
    """The tuned model's head is no longer tied; what is estimated must hold it."""
    shelf = make_shelf(tmp_path, "llama-tied")
    untied = load_file(tmp_path / "diff-qa" / "diff.safetensors")
    embeddings = untied["model.embed_tokens.weight"]
    untied["lm_head.weight"] = embeddings + 0.01
    save_file(
        untied, tmp_path / "diff-qa" / "diff.safetensors", {"format": "proxyserve-diff", "version": "1"}
    )
    library = make_library(shelf.base)
    load_expert(library, "holder", expert("qa", "small"), tmp_path)
    spec = expert(Source("diff-qa", of="small"))
    estimate = library.estimate(make_recipe(spec, Roots([tmp_path])))
    assert estimate >= load_expert(library, "a", spec, tmp_path).bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layout_is_known_before_loading(architecture: str, tmp_path: Path) -> None:
    folder, placement = (
        save_tiny(tmp_path / "model", architecture, seed=1),
        choose_placement("cpu", "bfloat16"),
    )
    runner = Runner(load_model(folder, ModelKey("model"), placement))
    assert expected_layout(load_config(folder), placement.dtype, placement.device) == runner.layout


def test_sequences_of_releases_return_every_trunk_once(shelf: Shelf) -> None:
    library = make_library(shelf.base)
    order: Sequence[str] = ("folder", "lora", "rslora", "diff", "scaled", "overbase", "cross")
    loaded = [load_expert(library, name, shelf.specs[name], shelf.root) for name in order]
    gone = [key for entry in reversed(loaded) for key in library.release(entry)]
    assert sorted(map(str, gone)) == sorted(set(map(str, gone)))
    assert here(library) == []
