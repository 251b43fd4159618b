"""Nothing outside of the roots can be read, and nothing is said about what is there."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxyserve.errors import Forbidden, InvalidRequest, ProxyserveError
from proxyserve.experts.library import Library
from proxyserve.experts.recipe import make_recipe
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.models.formats.detect import content_files
from tests.experts.shelf import make_library, save_tiny, write_lora


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root` has a base and a model, `outside` another one that has an own secret."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "root" / "atlas", "llama", seed=1)
    save_tiny(folder / "root" / "small", "llama", seed=2)
    write_lora(folder / "root" / "lora", folder / "root" / "small", seed=5)
    save_tiny(folder / "outside" / "secret", "llama", seed=3, chat=True)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "place")


@pytest.fixture
def roots(place: Path) -> Roots:
    return Roots([place / "root"])


def refusal(roots: Roots, text: str) -> tuple[type[InvalidRequest], str]:
    with pytest.raises(InvalidRequest) as caught:
        roots.find(text)
    assert caught.value.param == "path"
    return type(caught.value), caught.value.message


# Paths ----------------------------------------------------------------------------------------------------------


def test_paths_inside_are_found(place: Path, roots: Roots) -> None:
    model = place / "root" / "small"
    (place / "root" / "alias").symlink_to("small")
    (place / "way-in").symlink_to(place / "root")
    texts = (
        "small",
        "./small/",
        "small/../small",
        "lora/../small",
        "alias",
        str(model),
        f"{place}/way-in/small",
    )
    for text in texts:
        assert roots.find(text) == model
    assert roots.find("small/model.safetensors") == model / "model.safetensors"


OUTSIDE: dict[str, Callable[[Path, str], str]] = {
    "up": lambda place, name: f"../outside/{name}",
    "up from deep inside": lambda place, name: f"small/../../outside/{name}",
    "absolute": lambda place, name: str(place / "outside" / name),
    "absolute through the root": lambda place, name: str(place / "root" / ".." / "outside" / name),
    "link to a folder": lambda place, name: f"door/{name}",
    "link of a link": lambda place, name: f"second-door/{name}",
    "link and up": lambda place, name: f"door/../outside/{name}",
    "link behind a circle": lambda place, name: f"circle/../door/{name}",
}


@pytest.mark.parametrize("way", OUTSIDE)
@pytest.mark.parametrize("several", [False, True])
def test_what_lies_outside_is_refused_whether_it_exists_or_not(place: Path, way: str, several: bool) -> None:
    (place / "root" / "door").symlink_to(place / "outside")
    (place / "root" / "second-door").symlink_to("door")
    (place / "root" / "circle").symlink_to("circle")
    other = [place / "root" / "lora"] if several else []
    roots = Roots([place / "root", *other])
    there = refusal(roots, OUTSIDE[way](place, "secret"))
    absent = refusal(roots, OUTSIDE[way](place, "nothing"))
    assert there == absent
    assert several or there[0] is Forbidden  # in another root there is nothing of that name


def test_a_link_to_one_model_outside_is_refused_like_one_to_nothing(place: Path, roots: Roots) -> None:
    (place / "root" / "there").symlink_to(place / "outside" / "secret")
    (place / "root" / "absent").symlink_to(place / "outside" / "nothing")
    assert refusal(roots, "there") == refusal(roots, "absent")
    assert refusal(roots, "there")[0] is Forbidden


NOT_THERE = {
    "nothing": "nothing",
    "home": "~",
    "home of somebody": "~root/model",
    "variable": "$HOME/model",
    "very long": "x" * 300,
    "very deep": "x/" * 2500,
    "through a file": "small/config.json/model",
    "blank": " ",
    "loop of links": "loop",
    "behind a loop": "loop/model",
    "a URL": "https://host/org/name",
    "a hub id": "org/name",
    "another alphabet": "модель",
}


@pytest.mark.parametrize("text", NOT_THERE.values(), ids=NOT_THERE)
def test_what_is_no_path_to_anything_is_not_there(place: Path, roots: Roots, text: str) -> None:
    (place / "root" / "loop").symlink_to("loop")
    kind, message = refusal(roots, text)
    assert kind is InvalidRequest
    assert "under --expert-root" in message


@pytest.mark.parametrize("text", ["a\0b", "/etc/passwd\0", "\ud800", "small\udcff"], ids=ascii)
def test_what_no_file_can_be_called_is_refused(roots: Roots, text: str) -> None:
    assert refusal(roots, text)[0] is InvalidRequest


def test_several_roots_are_tried_in_turn(place: Path) -> None:
    roots = Roots([place / "root" / "lora", place / "root"])
    assert roots.find("small") == place / "root" / "small"
    assert roots.find("adapter_config.json") == place / "root" / "lora" / "adapter_config.json"
    assert roots.find(str(place / "root" / "lora")) == place / "root" / "lora"
    kind, message = refusal(roots, str(place / "root" / "nothing"))
    assert kind is InvalidRequest and "no such" in message


def test_a_root_may_be_a_link_itself(place: Path) -> None:
    (place / "linked").symlink_to("root")
    roots = Roots([place / "linked"])
    assert roots.find("small") == roots.find(f"{place}/linked/small") == place / "root" / "small"


def test_without_roots_nothing_is_found(place: Path) -> None:
    for text in ("small", str(place / "root" / "small"), "/", "org/name"):
        kind, message = refusal(Roots(), text)
        assert kind is Forbidden and "--expert-root" in message


@given(
    st.lists(
        st.sampled_from(
            ["..", ".", "", "small", "door", "loop", "inner", "outside", "secret", "root", "place", "x"]
        ),
        max_size=7,
    ),
    st.booleans(),
)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_way_of_names_leads_out(place: Path, parts: list[str], absolute: bool) -> None:
    root = place / "root"
    for name, target in (("door", place / "outside"), ("loop", root / "loop"), ("inner", root / "small")):
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
    text = "/".join([str(place), *parts] if absolute else parts)
    try:
        found = Roots([root]).find(text)
    except InvalidRequest:
        return
    assert found.resolve(strict=True) == found
    assert found == root or root in found.parents


# Files of a folder ----------------------------------------------------------------------------------------------


FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "adapter_config.json",
    "model.safetensors.index.json",
    "additional_chat_templates/x.jinja",
]


def tuned(text: str) -> ExpertSpec:
    return ExpertSpec(Source(text))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["there", "absent"])
def test_a_file_that_is_a_link_out_is_refused(place: Path, roots: Roots, name: str, target: str) -> None:
    file = place / "root" / "small" / name
    if target == "there":
        (place / "outside" / "there").write_text("{}")
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(place / "outside" / target)
    with pytest.raises(Forbidden, match=f"'{file.name}' is a link that leaves") as caught:
        make_recipe(tuned("small"), roots)
    assert caught.value.param == "tuned.path"
    assert "outside/" not in caught.value.message


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_an_adapter_that_is_a_link_out_is_refused(place: Path, roots: Roots, name: str) -> None:
    file = place / "root" / "lora" / name
    file.replace(place / "outside" / name)
    file.symlink_to(place / "outside" / name)
    with pytest.raises(Forbidden, match=name):
        make_recipe(ExpertSpec(Source("small"), Source("lora", of="small")), roots)
    with pytest.raises(Forbidden, match=name):
        make_recipe(tuned("lora"), roots)


def test_a_folder_of_templates_that_is_a_link_out_is_refused(place: Path, roots: Roots) -> None:
    (place / "outside" / "templates").mkdir()
    (place / "outside" / "templates" / "x.jinja").write_text("secret")
    (place / "root" / "small" / "additional_chat_templates").symlink_to(place / "outside" / "templates")
    with pytest.raises(Forbidden, match=r"x\.jinja"):
        make_recipe(tuned("small"), roots)


def test_links_that_stay_inside_are_followed(place: Path, roots: Roots) -> None:
    """As in the cache of `huggingface_hub`, where a snapshot is made of links to blobs."""
    blobs = place / "root" / "blobs"
    blobs.mkdir()
    for file in sorted((place / "root" / "small").iterdir()):
        file.replace(blobs / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    recipe = make_recipe(tuned("small"), roots)
    assert recipe.tuned.path == place / "root" / "small"
    library = make_library(place / "root" / "atlas")
    assert library.load(recipe, "a", 1).expert.tuned.parameters > 0


# What files say of other files ----------------------------------------------------------------------------------


def refused_by_library(library: Library, spec: ExpertSpec, roots: Roots) -> list[str]:
    """What each step says on its own, since no step may count on another one: a restart does not estimate."""
    steps: list[Callable[[Any], object]] = [
        library.expected_layouts,
        library.estimate,
        lambda recipe: library.load(recipe, "a", 1),
    ]
    messages = []
    for step in steps:
        with pytest.raises(ProxyserveError) as caught:
            step(make_recipe(spec, roots))
        messages.append(caught.value.message)
    return messages


@pytest.mark.parametrize(
    "target", ["../../outside/secret/model.safetensors", "../../outside/nothing.safetensors"]
)
def test_an_index_of_shards_does_not_lead_out(place: Path, roots: Roots, target: str) -> None:
    folder = place / "root" / "small"
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}})
    )
    messages = refused_by_library(make_library(place / "root" / "atlas"), tuned("small"), roots)
    assert all("must lie in the same folder" in message for message in messages)


def test_an_index_beside_whole_weights_does_not_lead_out(place: Path, roots: Roots) -> None:
    folder = place / "root" / "small"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../outside/secret/model.safetensors"}})
    )
    with pytest.raises(ProxyserveError, match="same folder"):
        make_library(place / "root" / "atlas").load(make_recipe(tuned("small"), roots), "a", 1)


def test_a_tokenizer_does_not_lead_out(place: Path, roots: Roots) -> None:
    """Nor do names of files in its configuration."""
    folder, secret = place / "root" / "small", place / "outside" / "secret"
    value = json.loads((folder / "tokenizer_config.json").read_text())
    value |= {"tokenizer_file": str(secret / "tokenizer.json"), "vocab_file": str(secret / "tokenizer.json")}
    value |= {"chat_template_file": str(secret / "chat_template.jinja"), "name_or_path": str(secret)}
    (folder / "tokenizer_config.json").write_text(json.dumps(value))
    loaded = make_library(place / "root" / "atlas").load(make_recipe(tuned("small"), roots), "a", 1)
    assert not loaded.expert.tuned.tokenizer.has_chat_template


def test_an_adapter_beside_a_model_names_no_other_model(place: Path, roots: Roots) -> None:
    """Where `peft` is installed, transformers would load what `base_model_name_or_path` says."""
    value = {"peft_type": "LORA", "base_model_name_or_path": str(place / "outside" / "secret")}
    (place / "root" / "small" / "adapter_config.json").write_text(json.dumps(value))
    spec = ExpertSpec(Source("small", format="folder"))
    with pytest.raises(ProxyserveError, match="adapter_config"):
        make_library(place / "root" / "atlas").load(make_recipe(spec, roots), "a", 1)


def test_code_in_a_folder_is_never_run(place: Path, roots: Roots, tmp_path: Path) -> None:
    folder = place / "root" / "small"
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    value = json.loads((folder / "config.json").read_text())
    value["auto_map"] = dict.fromkeys(
        ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "modeling_evil.Evil"
    )
    (folder / "config.json").write_text(json.dumps(value))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = make_library(place / "root" / "atlas").load(make_recipe(tuned("small"), roots), "a", 1)
    assert type(loaded.expert.tuned.module).__name__ == "LlamaForCausalLM"
    value["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(value))
    with pytest.raises(ProxyserveError, match=r"config\.json"):
        make_library(place / "root" / "atlas").load(make_recipe(tuned("small"), roots), "b", 1)
    assert not (tmp_path / "ran").exists()


def test_the_command_line_may_name_any_folder(place: Path) -> None:
    spec = ExpertSpec(Source(str(place / "outside" / "secret")), trusted=True)
    assert make_recipe(spec, Roots()).tuned.path == place / "outside" / "secret"


def test_every_file_that_is_read_is_checked_and_hashed(place: Path) -> None:
    """Files that loading opens, by what the system was asked for, are all among those that count."""
    folder = place / "root" / "small"
    opened: set[str] = set()
    watching = True  # a hook stays for ever

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.add(os.fspath(arguments[0]))

    library = make_library(place / "root" / "atlas")
    sys.addaudithook(watch)
    library.load(make_recipe(tuned("small"), Roots([place / "root"])), "a", 1)
    watching = False
    read = {path for path in opened if str(path).startswith(str(place))}
    assert str(folder / "config.json") in read
    assert read <= {str(file) for file in content_files(folder)}
