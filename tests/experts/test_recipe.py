"""From a spec to files of known formats; what cannot be meant is refused, and the field is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from proxyserve.errors import Forbidden, InvalidRequest, LoadError, ProxyserveError
from proxyserve.experts.recipe import make_recipe, needs_hub
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, LayerScale, Source
from tests.experts.shelf import Shelf, make_shelf


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"), "llama")


@pytest.fixture
def roots(shelf: Shelf) -> Roots:
    return Roots([shelf.root])


def test_formats_are_seen_from_the_files(shelf: Shelf, roots: Roots) -> None:
    formats = {name: make_recipe(spec, roots).formats for name, spec in shelf.specs.items()}
    assert formats == {
        "folder": {"tuned": "folder", "untuned": "folder"},
        "lora": {"tuned": "lora", "untuned": "folder"},
        "rslora": {"tuned": "lora", "untuned": "loaded"},
        "third": {"tuned": "lora", "untuned": "loaded"},
        "diff": {"tuned": "diff", "untuned": "loaded"},
        "scaled": {"tuned": "diff", "untuned": "loaded"},
        "packed": {"tuned": "compressed", "untuned": "folder"},
        "soup": {"tuned": "merge", "untuned": "loaded"},
        "blend": {"tuned": "merge", "untuned": "loaded"},
        "overbase": {"tuned": "lora", "untuned": "loaded"},
        "cross": {"tuned": "lora", "untuned": "folder"},
        "plain": {"tuned": "loaded", "untuned": "folder"},
        "lone": {"tuned": "folder"},
    }


def test_files_are_as_good_as_their_folders(shelf: Shelf, roots: Roots) -> None:
    for text, kind in (
        ("diff-qa/diff.safetensors", "diff"),
        ("diff-record.safetensors", "diff"),
        ("packed/compressed.safetensors", "compressed"),
    ):
        ingredient = make_recipe(ExpertSpec(Source(text, of="small")), roots).tuned
        assert (ingredient.kind, ingredient.path) == (kind, shelf.root / text)


def test_everything_that_will_be_read_is_named(shelf: Shelf, roots: Roots) -> None:
    merge = Source(merge=((0.5, Source("qa")), (0.5, Source("diff-qa"))))
    recipe = make_recipe(ExpertSpec(merge, Source("small")), roots)
    assert set(recipe.paths()) == {shelf.root / name for name in ("qa", "diff-qa", "small")}
    assert list(make_recipe(ExpertSpec(Source(of="a"), Source(of="b")), roots).paths()) == []


def merge(*parts: Source) -> Source:
    return Source(of="small", merge=tuple((1.0, part) for part in parts))


#: Specs, the error and its field.
REFUSED: dict[str, tuple[ExpertSpec, type[InvalidRequest], str]] = {
    "nothing to change": (ExpertSpec(Source("lora")), InvalidRequest, "tuned.of"),
    "a merge of nothing": (
        ExpertSpec(Source(merge=((1.0, Source("qa")), (0.5, Source("record"))))),
        InvalidRequest,
        "tuned.of",
    ),
    "an untuned adapter": (
        ExpertSpec(Source("qa"), Source("lora", of="small")),
        InvalidRequest,
        "untuned.format",
    ),
    "an untuned merge": (ExpertSpec(Source("qa"), merge(Source("qa"))), InvalidRequest, "untuned.format"),
    "tuned is not there": (ExpertSpec(Source("nothing")), InvalidRequest, "tuned.path"),
    "untuned is not there": (ExpertSpec(Source("qa"), Source("nothing")), InvalidRequest, "untuned.path"),
    "a part is not there": (
        ExpertSpec(merge(Source("qa"), Source("nothing"))),
        InvalidRequest,
        "tuned.merge[1].path",
    ),
    "tuned is outside": (ExpertSpec(Source("/etc")), Forbidden, "tuned.path"),
    "untuned is outside": (ExpertSpec(Source("qa"), Source("..")), Forbidden, "untuned.path"),
    "a part is outside": (ExpertSpec(merge(Source("../x"), Source("qa"))), Forbidden, "tuned.merge[0].path"),
    "a scaled folder": (ExpertSpec(Source("qa", scale=0.5)), InvalidRequest, "tuned.scale"),
    "a folder in layers": (
        ExpertSpec(Source("qa", layers=LayerScale(1.0, 2.0))),
        InvalidRequest,
        "tuned.layers",
    ),
    "a scaled untuned folder": (
        ExpertSpec(Source("qa"), Source("small", scale=2.0)),
        InvalidRequest,
        "untuned.scale",
    ),
    "an adapter in layers": (
        ExpertSpec(Source("lora", layers=LayerScale(1.0, 2.0)), Source("small")),
        InvalidRequest,
        "tuned.layers",
    ),
    "a scaled part": (ExpertSpec(merge(Source("qa", scale=2.0))), InvalidRequest, "tuned.merge[0].scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_their_field(roots: Roots, case: str) -> None:
    spec, kind, param = REFUSED[case]
    with pytest.raises(kind) as caught:
        make_recipe(spec, roots)
    assert type(caught.value) is kind
    assert caught.value.param == param
    assert caught.value.message.endswith(".")


def _only(folder: Path, *names: str) -> None:
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def _pickle(folder: Path, name: str, *others: str) -> None:
    _only(folder, *others)
    torch.save({}, folder / name)


def _unnamed_diff(folder: Path) -> None:
    _only(folder)
    save_file({"x": torch.zeros(1)}, folder / "diff.safetensors")


#: What is done to a copy of `qa` (or of another folder, after the colon), and what is said of it.
UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickled model": (lambda folder: _pickle(folder, "pytorch_model.bin", "config.json"), "a pickle"),
    "a pickle alone": (lambda folder: _pickle(folder, "model.pt"), "a pickle"),
    "a pickled adapter": (
        lambda folder: _pickle(folder, "adapter_model.bin", "adapter_config.json"),
        "a pickle",
    ),
    "an adapter without weights": (
        lambda folder: (_only(folder), (folder / "adapter_config.json").write_text("{}")),
        "without adapter_model",
    ),
    "weights alone": (lambda folder: _only(folder, "model.safetensors"), "nothing that can be an expert"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "nothing that can be an expert"),
    "an empty folder": (_only, "nothing that can be an expert"),
    "a diff beside a model": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "diff.safetensors"),
        "beside other weights",
    ),
    "a diff of another name": (
        lambda folder: (
            _only(folder, "model.safetensors"),
            (folder / "model.safetensors").rename(folder / "diff.safetensors"),
        ),
        "does not say what it is",
    ),
    "a diff without a header": (_unnamed_diff, "does not say what it is"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_no_expert_is_refused_with_the_file(shelf: Shelf, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(shelf.root / "qa", tmp_path / "root" / "thing")
    change, expected = UNKNOWN[case]
    change(folder)
    with pytest.raises(LoadError, match=expected) as caught:
        make_recipe(ExpertSpec(Source("thing", of="small")), Roots([tmp_path / "root"]))
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.gguf", "notes.txt"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(LoadError, match=name):
        make_recipe(ExpertSpec(Source(name, of="small")), Roots([tmp_path]))


def test_a_format_that_is_given_is_not_looked_for(shelf: Shelf, tmp_path: Path) -> None:
    """Such as a diff of somebody else's, whose header says nothing."""
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "change.safetensors")
    recipe = make_recipe(
        ExpertSpec(Source("change.safetensors", format="diff", of="small")), Roots([tmp_path])
    )
    assert recipe.tuned.kind == "diff"


# The hub --------------------------------------------------------------------------------------------------------


def test_hub_ids_are_fetched_where_they_are_allowed(shelf: Shelf) -> None:
    asked: list[str] = []

    def fetch(text: str) -> Path:
        asked.append(text)
        return shelf.root / "qa"

    roots = Roots([shelf.root / "small"], fetch)
    spec = ExpertSpec(Source("org/name"), Source("org/other.model_2@v1.0/rc"))
    assert needs_hub(spec, roots)
    assert not asked  # whether it must be asked is known without asking
    assert make_recipe(spec, roots).tuned.path == shelf.root / "qa"
    assert asked == ["org/name", "org/other.model_2@v1.0/rc"]
    parts = ExpertSpec(Source(of="small", merge=((1.0, Source("org/name")),)))
    assert needs_hub(parts, roots)


def test_what_lies_in_a_root_is_not_looked_for_on_the_hub(shelf: Shelf) -> None:
    shutil.copytree(shelf.root / "qa", shelf.root / "org" / "name", dirs_exist_ok=True)

    def fetch(text: str) -> Path:
        raise AssertionError(text)

    roots = Roots([shelf.root], fetch)
    spec = ExpertSpec(Source("org/name"))
    assert not needs_hub(spec, roots)
    assert make_recipe(spec, roots).tuned.path == shelf.root / "org" / "name"


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "org/name/more",
        "../name",
        "org/..",
        "/org/name",
        "-x/name",
        "org/-x",
        "org/name@",
        "org/name@..",
        "org/name@../../etc",
        "org/na me",
        "org/name\n",
        "https://host/name",
        "org/name\0",
        "",
    ],
)
def test_what_is_no_hub_id_is_not_sent_there(tmp_path: Path, text: str) -> None:
    def fetch(text: str) -> Path:
        raise AssertionError(text)

    roots = Roots([tmp_path], fetch)
    assert not roots.is_hub_id(text)
    if text:
        with pytest.raises(ProxyserveError):
            make_recipe(ExpertSpec(Source(text)), roots)


def test_the_hub_is_not_asked_where_it_is_not_allowed(shelf: Shelf) -> None:
    roots = Roots([shelf.root / "small"])
    spec = ExpertSpec(Source("org/nobody"))
    assert not needs_hub(spec, roots)
    with pytest.raises(InvalidRequest, match="under --expert-root") as caught:
        make_recipe(spec, roots)
    assert caught.value.param == "tuned.path"


def test_files_of_a_download_may_be_links(shelf: Shelf, tmp_path: Path) -> None:
    """To blobs in the cache, which lies outside of the roots."""
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    for file in (shelf.root / "qa").iterdir():
        (snapshot / file.name).symlink_to(file)
    roots = Roots([shelf.root / "small"], lambda _: snapshot)
    assert make_recipe(ExpertSpec(Source("org/name")), roots).tuned.path == snapshot
