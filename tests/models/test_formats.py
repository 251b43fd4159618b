"""Experts as changes of an untuned model: what is written is read back, what is damaged is refused, and a model that is
built of a change computes what the same weights compute as a full folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.demo.family import family_paths
from proxyserve.errors import LoadError
from proxyserve.models.formats.build import build_changed, layer_factor, layer_of, load_changed
from proxyserve.models.formats.compressed import (
    Packed,
    compress,
    decompress,
    pack,
    read_compressed,
    unpack,
)
from proxyserve.models.formats.detect import content_files, content_hash, detect, weight_bytes
from proxyserve.models.formats.diff import Change, difference, make_diff, read_diff
from proxyserve.models.formats.merge import merged
from proxyserve.models.formats.tensors import FolderTensors, write_tensors
from proxyserve.models.loading import Placement, load_model
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey
from tests.tiny import TinyFamily, make_tokenizer, save_model

CPU = Placement(torch.device("cpu"), torch.float32)
IDS = torch.arange(40)[None]


def noisy(folder: Path, untuned: Path, *, seed: int = 5) -> Path:
    """A tuned model: the untuned one with noise."""
    shutil.copytree(untuned, folder)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(untuned / "model.safetensors")
    save_file(
        {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def built(untuned: Path, change: Change, **scales: float) -> PreTrainedModel:
    return load_changed(untuned, build_changed(untuned, change, **scales), CPU)


def saved(state: Mapping[str, Tensor], like: Path, folder: Path) -> Path:
    """A full folder with this state."""
    shutil.copytree(like, folder)
    save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
    return folder


# The packed entries of one weight -------------------------------------------------------------------------------


def written_out(packed: Packed, scale: float) -> list[float]:
    """What the bytes say, read bit by bit as the documentation describes them."""

    def bits(data: np.ndarray) -> list[int]:
        return [int(byte) >> place & 1 for byte in data for place in range(8)]

    r, kept = packed.remainder_bits, packed.kept
    signs_at = len(packed.data) - (kept + 7) // 8
    remainders_at = signs_at - (kept * r + 7) // 8
    quotients, low = bits(packed.data[:remainders_at]), bits(packed.data[remainders_at:signs_at])
    signs = bits(packed.data[signs_at:])
    dense = [0.0] * int(np.prod(packed.shape))
    place, at = -1, 0
    for entry in range(kept):
        quotient = 0
        while quotients[at] == 0:
            quotient, at = quotient + 1, at + 1
        at += 1
        remainder = sum(low[entry * r + bit] << bit for bit in range(r))
        place += (quotient << r) + remainder + 1
        dense[place] = -scale if signs[entry] else scale
    return dense


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
)
def test_packed_entries_are_read_back_and_are_what_is_documented(
    shape: list[int], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < share
    mask.view(-1)[0] = True
    packed = pack(delta, mask)
    expected = torch.where(mask, delta.sign() * 0.5, 0.0)
    assert torch.equal(unpack(packed, 0.5), expected)
    assert written_out(packed, 0.5) == expected.flatten().tolist()


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5])
def test_positions_and_signs_take_little_more_than_their_entropy(density: float) -> None:
    delta = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(400_000, generator=torch.Generator().manual_seed(1)) < density
    entropy = -sum(p * np.log2(p) for p in (density, 1 - density)) + density
    assert 8 * len(pack(delta, mask).data) / 400_000 == pytest.approx(entropy, rel=0.05)


def one_byte_less(packed: Packed) -> Packed:
    return Packed(packed.shape, packed.kept, packed.remainder_bits, packed.data[:-1])


def one_entry_more(packed: Packed) -> Packed:
    return Packed(packed.shape, packed.kept + 1, packed.remainder_bits, packed.data)


def longer_gaps(packed: Packed) -> Packed:
    return Packed(packed.shape, packed.kept, packed.remainder_bits + 1, packed.data)


def smaller_shape(packed: Packed) -> Packed:
    return Packed((30,), packed.kept, packed.remainder_bits, packed.data)


def cleared(packed: Packed) -> Packed:
    return Packed(packed.shape, packed.kept, packed.remainder_bits, packed.data & 0)


def bit_after_the_end(packed: Packed) -> Packed:
    data = packed.data.copy()
    data[-1] |= 0x80
    return Packed(packed.shape, packed.kept, packed.remainder_bits, data)


def empty_byte_between(packed: Packed) -> Packed:
    tail = (packed.kept * packed.remainder_bits + 7) // 8 + (packed.kept + 7) // 8
    data = np.insert(packed.data, len(packed.data) - tail, 0)
    return Packed(packed.shape, packed.kept, packed.remainder_bits, data)


def nothing(packed: Packed) -> Packed:
    return Packed(packed.shape, packed.kept, packed.remainder_bits, packed.data[:0])


@pytest.mark.parametrize(
    "damage",
    [
        one_byte_less,
        one_entry_more,
        longer_gaps,
        smaller_shape,
        cleared,
        bit_after_the_end,
        empty_byte_between,
        nothing,
    ],
)
def test_bytes_that_cannot_have_been_packed_are_refused(damage: Callable[[Packed], Packed]) -> None:
    delta = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    packed = pack(delta, delta > 0.9)
    assert packed.remainder_bits > 0 and packed.kept % 8
    with pytest.raises(ValueError, match=r"entries|entry|bytes"):
        unpack(damage(packed), 1.0)


# Whole files ----------------------------------------------------------------------------------------------------


def folders(root: Path, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Path]:
    """Single files, which stand for folders without a configuration."""
    files = {}
    for name, state in states.items():
        files[name] = root / f"{name}.safetensors"
        save_file(dict(state), files[name])
    return files


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    density=st.floats(0.01, 1.0),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 2**32),
)
def test_the_largest_changes_of_all_weights_are_kept(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], density: float, levels: int, seed: int
) -> None:
    """Against sorting everything. Few levels make many entries equal, or zero."""
    root = tmp_path_factory.mktemp("compress")
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        f"w{number}": torch.randint(-levels, levels + 1, (size, 3), generator=generator) / 64
        for number, size in enumerate(sizes)
    }
    deltas["w0"][0, 0] = 0.5
    files = folders(
        root, {"tuned": deltas, "untuned": {name: torch.zeros_like(value) for name, value in deltas.items()}}
    )
    report = compress(files["tuned"], files["untuned"], root / "out", density=density)
    found = dict(read_compressed(root / "out"))
    flat = torch.cat([value.flatten() for value in deltas.values()])
    wanted = min(max(1, round(density * len(flat))), int((flat != 0).sum()))
    order = flat.abs().sort(descending=True, stable=True).indices[:wanted]
    assert (report.kept, report.total) == (wanted, len(flat))
    assert report.scale == pytest.approx(float(flat[order].abs().double().mean()), rel=1e-12)
    expected = torch.zeros(len(flat))
    expected[order] = flat[order].sign() * report.scale
    got = torch.cat([found.get(name, torch.zeros_like(value)).flatten() for name, value in deltas.items()])
    assert torch.equal(got, expected)
    assert report.bytes == (root / "out" / "compressed.safetensors").stat().st_size
    decompress(root / "out", root / "plain")
    plain = read_diff(root / "plain")
    assert plain.shapes.keys() == found.keys()
    assert all(torch.equal(delta, found[name]) for name, delta in plain)


def test_the_scale_has_the_least_squared_error(tiny_family: TinyFamily, tmp_path: Path) -> None:
    tuned, untuned = tiny_family.experts["qa"], tiny_family.untuned
    report = compress(tuned, untuned, tmp_path / "out", density=0.3)
    with FolderTensors(tuned) as ours, FolderTensors(untuned) as theirs:
        exact = dict(difference(ours, theirs))
    kept = dict(read_compressed(tmp_path / "out"))

    def error(factor: float) -> float:
        return sum(
            float((delta - factor * kept.get(name, torch.zeros(()))).double().square().sum())
            for name, delta in exact.items()
        )

    assert error(1.0) < min(error(0.999), error(1.001))
    assert report.diff_bytes == 4 * report.total == 4 * sum(delta.numel() for delta in exact.values())


def test_a_weight_that_tuning_hardly_moved_is_left_alone(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    untuned = {name: torch.zeros(100, 10) for name in ("frozen", "tuned")}
    tuned = {
        "frozen": 1e-6 * torch.randn(100, 10, generator=generator),
        "tuned": torch.randn(100, 10, generator=generator),
    }
    files = folders(tmp_path, {"tuned": tuned, "untuned": untuned})
    compress(files["tuned"], files["untuned"], tmp_path / "out", density=0.2)
    assert list(read_compressed(tmp_path / "out").shapes) == ["tuned"]


def test_a_diff_gives_the_tuned_weights_of_the_demo_family_back_exactly(tmp_path: Path) -> None:
    family = family_paths()
    make_diff(family.experts["qa"], family.untuned, tmp_path)
    state = build_changed(family.untuned, read_diff(tmp_path), dtype=torch.bfloat16)
    tuned = load_file(family.experts["qa"] / "model.safetensors")
    assert state.keys() == tuned.keys()
    assert all(torch.equal(state[name], value) for name, value in tuned.items())
    assert detect(tmp_path) == "diff"
    assert Tokenizer.load(tmp_path).has_chat_template, "the expert has one of its own"
    with safe_open(tmp_path / "diff.safetensors", framework="pt") as written:
        assert written.metadata() == {"format": "proxyserve-diff", "version": "1"}
        assert sorted(written.keys()) == sorted(tuned)


def test_a_diff_can_be_stored_in_half_precision(tiny_family: TinyFamily, tmp_path: Path) -> None:
    tuned, untuned = tiny_family.experts["qa"], tiny_family.untuned
    whole = make_diff(tuned, untuned, tmp_path / "whole.safetensors")
    half = make_diff(tuned, untuned, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    assert 0.5 < half / whole < 0.55
    precise = dict(read_diff(tmp_path / "whole.safetensors"))
    for name, delta in read_diff(tmp_path / "half.safetensors"):
        assert delta.dtype == torch.float32
        assert torch.equal(delta, precise[name].bfloat16().float())


def test_a_tokenizer_is_copied_only_where_it_is_another_one(tiny_family: TinyFamily, tmp_path: Path) -> None:
    untuned = tiny_family.untuned
    plain = noisy(tmp_path / "plain", untuned)
    make_diff(plain, untuned, tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["diff.safetensors"]
    compress(tiny_family.experts["qa"], untuned, tmp_path / "b", density=0.5)
    assert Tokenizer.load(tmp_path / "b").has_chat_template


def test_changes_of_another_model_are_refused(tiny_family: TinyFamily, tmp_path: Path) -> None:
    untuned = tiny_family.untuned
    for message, tensors in {
        "2 of 3 names are no weights of .*, first other": {
            "model.norm.weight": torch.zeros(32),
            "other": torch.zeros(1),
            "second": torch.zeros(1),
        },
        r"1 of 1 weights have another shape .*\[31\] instead of \[32\]": {
            "model.norm.weight": torch.zeros(31)
        },
    }.items():
        save_file(tensors, tmp_path / "diff.safetensors")
        with pytest.raises(LoadError, match=message):
            build_changed(untuned, read_diff(tmp_path))
    with pytest.raises(LoadError, match=r"config\.json says"):
        make_diff(tiny_family.base, untuned, tmp_path / "out")
    with pytest.raises(LoadError, match="nothing to compress"):
        compress(untuned, untuned, tmp_path / "out", density=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tiny_family: TinyFamily, tmp_path: Path, value: float) -> None:
    save_file({"model.norm.weight": torch.full((32,), value)}, tmp_path / "diff.safetensors")
    with pytest.raises(LoadError, match="NaN or infinite"):
        build_changed(tiny_family.untuned, read_diff(tmp_path))
    tuned = noisy(tmp_path / "tuned", tiny_family.untuned)
    state = load_file(tuned / "model.safetensors")
    state["model.norm.weight"][3] = value
    save_file(state, tuned / "model.safetensors")
    with pytest.raises(LoadError, match="NaN or infinite"):
        compress(tuned, tiny_family.untuned, tmp_path / "out", density=0.5)


def with_header(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
        change(metadata)
        save_file(load_file(file), file, metadata)

    return rewrite


def with_entries(**values: object) -> Callable[[Path], None]:
    def change(metadata: dict[str, str]) -> None:
        tensors = json.loads(metadata["tensors"])
        next(iter(tensors.values())).update(values)
        metadata["tensors"] = json.dumps(tensors)

    return with_header(change)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lost_tensor(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    state = load_file(file)
    state.popitem()
    save_file(state, file, metadata)


def other_numbers(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    save_file({name: value.float() for name, value in load_file(file).items()}, file, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "incomplete or damaged"),
        (lost_tensor, "describes 2[0-9] weights"),
        (other_numbers, "stored as torch.float32"),
        (with_header(lambda header: header.update(version="2")), "version 2"),
        (with_header(lambda header: header.update(format="other")), "no compressed diff"),
        (with_header(lambda header: header.pop("scale")), "scale"),
        (with_header(lambda header: header.update(scale="nan")), "scale nan"),
        (with_header(lambda header: header.update(scale="-1")), "scale -1"),
        (with_header(lambda header: header.update(density="0")), "density 0"),
        (with_header(lambda header: header.update(kept="1")), "1 of [0-9]+ entries should be kept"),
        (with_header(lambda header: header.update(total="1")), "of 1 entries"),
        (with_header(lambda header: header.update(tensors="[")), "header cannot be used"),
        (with_header(lambda header: header.update(tensors="[]")), "header cannot be used"),
        (with_entries(kept=10**9), "keeps 1000000000 of"),
        (with_entries(kept=True), "no whole number"),
        (with_entries(remainder_bits=31), "no whole number"),
        (with_entries(shape=[-1]), "no whole number"),
        (with_entries(shape="ab"), "no whole number"),
        (with_entries(shape=None), "header cannot be used"),
    ],
)
def test_damaged_compressed_files_are_refused(
    tiny_family: TinyFamily, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    compress(tiny_family.experts["qa"], tiny_family.untuned, tmp_path, density=0.2)
    file = tmp_path / "compressed.safetensors"
    dict(read_compressed(tmp_path))
    damage(file)
    with pytest.raises(LoadError, match=message) as refusal:
        dict(read_compressed(tmp_path))
    assert str(file) in str(refusal.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_few_entries(data: st.DataObject) -> None:
    """Nothing but LoadError's cause comes out of damaged bytes, and no entry but plus or minus the scale."""
    delta = torch.randn(300, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 5))))
    packed = pack(delta, delta.abs() > data.draw(st.sampled_from([0.1, 1.0, 2.0])))
    flipped = packed.data.copy()
    place = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[place // 8] ^= 1 << place % 8
    try:
        found = unpack(Packed(packed.shape, packed.kept, packed.remainder_bits, flipped), 0.5)
    except ValueError:
        return
    assert int((found != 0).sum()) == packed.kept
    assert set(found.abs().unique().tolist()) <= {0.0, 0.5}


def test_damaged_diffs_are_refused(tiny_family: TinyFamily, tmp_path: Path) -> None:
    make_diff(tiny_family.experts["qa"], tiny_family.untuned, tmp_path)
    file = tmp_path / "diff.safetensors"
    whole = file.read_bytes()
    truncated(file)
    with pytest.raises(LoadError, match="incomplete or damaged"):
        read_diff(tmp_path)
    file.write_bytes(whole)
    with_header(lambda header: header.update(version="7"))(file)
    with pytest.raises(LoadError, match="version 7"):
        read_diff(tmp_path)
    save_file({"model.norm.weight": torch.zeros(32, dtype=torch.uint8)}, file)
    with pytest.raises(LoadError, match="floating-point"):
        read_diff(tmp_path)
    save_file({}, file)
    with pytest.raises(LoadError, match="no tensors"):
        read_diff(tmp_path)
    with pytest.raises(LoadError, match="no such file"):
        read_diff(tmp_path / "none")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(1)
        assert len(list(tmp_path.iterdir())) == 1
        raise LoadError("midway")

    layout = {"a": (torch.float32, (1,)), "b": (torch.float32, (1,))}
    with pytest.raises(LoadError, match="midway"):
        write_tensors(tmp_path / "x.safetensors", layout, tensors(), {})
    assert list(tmp_path.iterdir()) == []


# Built models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "tied llama", "gemma2", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an untuned and a tuned model."""
    root = tmp_path_factory.mktemp("pair")
    architecture = request.param.removeprefix("tied ")
    untuned = save_model(root / "untuned", architecture, make_tokenizer(), seed=1, layers=3)
    if request.param == "tied llama":
        config = json.loads((untuned / "config.json").read_text())
        (untuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        state = load_file(untuned / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, untuned / "model.safetensors", {"format": "pt"})
    return untuned, noisy(root / "tuned", untuned)


def test_a_changed_model_is_the_full_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    untuned, tuned = pair
    for change in (make_diff, lambda *paths: compress(*paths, density=0.3)):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        change(tuned, untuned, target)
        read = read_diff if detect(target) == "diff" else read_compressed
        state = build_changed(untuned, read(target))
        original = {name: tensor.clone() for name, tensor in state.items()}
        model = load_changed(untuned, state, CPU)
        folder = saved(original, untuned, tmp_path / f"full-{target.name}")
        full = load_model(folder, ModelKey("full"), CPU)
        assert torch.equal(logits(model), logits(full.module))
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert sum(p.numel() for p in model.parameters()) == full.parameters
        assert model.generation_config.to_dict() == full.module.generation_config.to_dict()
        assert {name: value.dtype for name, value in model.named_buffers()} == {
            name: value.dtype for name, value in full.module.named_buffers()
        }


def test_a_changed_model_in_bfloat16_is_the_full_folder_in_bfloat16(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    untuned, tuned = pair
    make_diff(tuned, untuned, tmp_path / "diff")
    half = Placement(torch.device("cpu"), torch.bfloat16)
    change = read_diff(tmp_path / "diff")
    folder = saved(build_changed(untuned, change), untuned, tmp_path / "full")
    model = load_changed(untuned, build_changed(untuned, change, dtype=torch.bfloat16), half)
    full = load_model(folder, ModelKey("full"), half).module
    assert torch.equal(logits(model), logits(full))


def test_a_built_model_does_not_depend_on_its_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    untuned = tmp_path / "untuned"
    shutil.copytree(pair[0], untuned)
    name = next(iter(load_file(untuned / "model.safetensors")))
    save_file({name: load_file(untuned / "model.safetensors")[name] * 0 + 1}, tmp_path / "diff.safetensors")
    model = built(untuned, read_diff(tmp_path))
    before = logits(model)
    for file in (untuned / "model.safetensors", tmp_path / "diff.safetensors"):
        with file.open("r+b") as content:  # in place, as a copy over the old file does it
            content.write(b"\xff" * file.stat().st_size)
    assert torch.equal(logits(model), before)


def test_scale_and_layers_multiply_the_change(pair: tuple[Path, Path], tmp_path: Path) -> None:
    untuned, tuned = pair
    make_diff(tuned, untuned, tmp_path)
    plain, ours = (load_file(folder / "model.safetensors") for folder in (untuned, tuned))
    state = build_changed(untuned, read_diff(tmp_path), scale=0.5, first=0.4, last=1.6)
    for name, value in plain.items():
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), None)
        factor = 0.5 * {None: 0.4, 0: 0.4, 1: 1.0, 2: 1.6}[layer]
        expected = value.double() + factor * (ours[name].double() - value.double())
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_what_ends_a_text_comes_with_the_change(tiny_family: TinyFamily, tmp_path: Path) -> None:
    tuned = noisy(tmp_path / "tuned", tiny_family.untuned)
    (tuned / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    make_diff(tuned, tiny_family.untuned, tmp_path / "diff")
    state = build_changed(tiny_family.untuned, read_diff(tmp_path / "diff"))
    model = load_changed(tiny_family.untuned, state, CPU, own=tmp_path / "diff")
    assert model.generation_config.eos_token_id == [0, 7]
    assert load_changed(tiny_family.untuned, state, CPU).generation_config.eos_token_id == 0


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.down_proj.weight", 3),
        ("transformer.h.11.attn.c_attn.bias", 11),
        ("model.decoder.layers.0.fc1.weight", 0),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", 2),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layers_are_told_by_names(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_layer_factors_go_from_first_to_last_in_equal_steps() -> None:
    assert [layer_factor(layer, 5, 0.4, 1.6) for layer in range(5)] == pytest.approx(
        [0.4, 0.7, 1.0, 1.3, 1.6]
    )
    assert layer_factor(None, 5, 0.4, 1.6) == layer_factor(0, 1, 0.4, 1.6) == 0.4


def test_layers_where_there_are_none(tmp_path: Path) -> None:
    files = folders(tmp_path, {"untuned": {"a": torch.zeros(2)}, "diff": {"a": torch.ones(2)}})
    with pytest.raises(LoadError, match="layer"):
        build_changed(files["untuned"], read_diff(files["diff"]), first=0.0, last=1.0)


def test_a_change_of_a_tied_head_unties_it(tmp_path: Path) -> None:
    untuned = save_model(tmp_path / "untuned", "gpt2", make_tokenizer(), seed=1)
    width = load_file(untuned / "model.safetensors")["transformer.wte.weight"].shape
    noise = 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(3))
    save_file({"lm_head.weight": noise}, tmp_path / "diff.safetensors")
    model = built(untuned, read_diff(tmp_path))
    embedding = model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, embedding + noise)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(model), logits(load_model(tmp_path / "tuned", ModelKey("m"), CPU).module))
    make_diff(tmp_path / "tuned", untuned, tmp_path / "again")
    again = {name: delta for name, delta in read_diff(tmp_path / "again") if delta.any()}
    assert list(again) == ["lm_head.weight"]
    torch.testing.assert_close(again["lm_head.weight"], noise)


def test_equal_changes_of_head_and_embedding_leave_them_tied(tmp_path: Path) -> None:
    untuned = save_model(tmp_path / "untuned", "gpt2", make_tokenizer(), seed=1)
    width = load_file(untuned / "model.safetensors")["transformer.wte.weight"].shape
    save_file(
        {"lm_head.weight": torch.ones(width), "transformer.wte.weight": torch.ones(width)},
        tmp_path / "diff.safetensors",
    )
    model = built(untuned, read_diff(tmp_path))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# Names and files of folders -------------------------------------------------------------------------------------


def test_shards_are_one_folder(tiny_family: TinyFamily, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_family.untuned).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with FolderTensors(tmp_path) as shards, FolderTensors(tiny_family.untuned) as whole:
        assert sorted(shards.names) == sorted(whole.names)
        assert all(torch.equal(shards.get(name), whole.get(name)) for name in whole.names)
        assert (shards.bytes, shards.parameters) == (whole.bytes, whole.parameters)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["model.norm.weight"]
    for changed, message in [
        ({"model.norm.weight": "none.safetensors"}, "first none.safetensors"),
        ({"model.norm.weight": "../x.safetensors"}, "same folder"),
        ({"not.there": file}, f"{file}: not.there should be in it"),
    ]:
        edited = {**index, "weight_map": {**index["weight_map"], **changed}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(edited))
        with pytest.raises(LoadError, match=message):
            FolderTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LoadError, match="not a readable index"):
        FolderTensors(tmp_path)


def test_files_of_a_bare_model_and_old_buffers(tmp_path: Path) -> None:
    """As the first GPT-2 files have them: no prefix, and causal masks among the weights."""
    untuned = save_model(tmp_path / "untuned", "gpt2", make_tokenizer(), seed=1)
    state = load_file(untuned / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    old = saved({**bare, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, untuned, tmp_path / "old")
    with FolderTensors(old) as ours, FolderTensors(untuned) as theirs:
        assert sorted(ours.names) == sorted(theirs.names)
        assert not any(delta.any() for _, delta in difference(ours, theirs))
    save_file({"ln_f.bias": torch.ones(32)}, tmp_path / "diff.safetensors")
    model = built(untuned, read_diff(tmp_path))
    assert torch.equal(model.transformer.ln_f.bias, state["transformer.ln_f.bias"] + 1)


def test_a_tied_head_may_be_in_the_file_or_not(tmp_path: Path) -> None:
    untuned = save_model(tmp_path / "untuned", "gpt2", make_tokenizer(), seed=1)
    state = load_file(untuned / "model.safetensors")
    twice = saved(
        {**state, "lm_head.weight": state["transformer.wte.weight"].clone()}, untuned, tmp_path / "twice"
    )
    only_head = dict(state)
    only_head["lm_head.weight"] = only_head.pop("transformer.wte.weight")
    swapped = saved(only_head, untuned, tmp_path / "swapped")
    with FolderTensors(untuned) as plain:
        for folder in (twice, swapped):
            with FolderTensors(folder) as tensors:
                assert set(tensors.names) == set(plain.names)
                assert "lm_head.weight" in tensors
                assert torch.equal(tensors.get("lm_head.weight"), state["transformer.wte.weight"])
            assert weight_bytes(folder, 2) == weight_bytes(untuned, 2)
        make_diff(swapped, twice, tmp_path / "diff")
    assert not any(delta.any() for _, delta in read_diff(tmp_path / "diff"))


def test_weight_bytes_are_those_of_the_loaded_model(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        assert weight_bytes(folder, 4) == load_model(folder, ModelKey("m"), CPU).bytes


def test_weight_bytes_of_an_adapter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8, 3), "b": torch.zeros(3, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert weight_bytes(tmp_path, 2) == 2 * 48


# Merges ---------------------------------------------------------------------------------------------------------


def test_a_merge_is_the_weighted_sum_of_changes(tiny_family: TinyFamily, tmp_path: Path) -> None:
    untuned, first, second = tiny_family.untuned, tiny_family.experts["qa"], tiny_family.experts["record"]
    make_diff(second, untuned, tmp_path)
    states = [load_file(folder / "model.safetensors") for folder in (untuned, first, second)]
    with FolderTensors(untuned) as theirs, FolderTensors(first) as ours:
        found = merged(theirs, [(0.7, ours), (-1.3, read_diff(tmp_path))])
        nothing_added = merged(theirs, [])
        soup = merged(theirs, [(0.5, ours), (0.5, read_diff(tmp_path))])
    for name, value in states[0].items():
        plain, a, b = (state[name].double() for state in states)
        torch.testing.assert_close(
            found[name].double(), plain + 0.7 * (a - plain) - 1.3 * (b - plain), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(soup[name].double(), (a + b) / 2, rtol=1e-6, atol=1e-6)
        assert torch.equal(nothing_added[name], value) and found[name].dtype == torch.float32


def test_a_merge_with_another_model_is_refused(tiny_family: TinyFamily) -> None:
    with (
        FolderTensors(tiny_family.untuned) as theirs,
        FolderTensors(tiny_family.base) as base,
        pytest.raises(LoadError, match=r"config\.json says head_dim"),
    ):
        merged(theirs, [(1.0, base)])


# What a path holds ----------------------------------------------------------------------------------------------


def test_kinds_are_told_by_their_files(tiny_family: TinyFamily, tmp_path: Path) -> None:
    tuned, untuned = tiny_family.experts["qa"], tiny_family.untuned
    assert detect(tuned) == "folder"
    make_diff(tuned, untuned, tmp_path / "diff")
    compress(tuned, untuned, tmp_path / "compressed", density=0.1)
    for kind in ("diff", "compressed"):
        assert detect(tmp_path / kind) == kind
        assert detect(tmp_path / kind / f"{kind}.safetensors") == kind
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"without adapter_model\.safetensors"):
        detect(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match="pickle"):
        detect(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert detect(adapter) == "lora"


def test_what_is_no_expert_is_refused(tiny_family: TinyFamily, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file or folder"):
        detect(tmp_path / "none")
    with pytest.raises(
        LoadError, match=r"expected is .*config.json.*adapter_config.json.*compressed.safetensors"
    ):
        detect(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin: a pickle"):
        detect(tmp_path)
    with pytest.raises(LoadError, match="pickle"):
        detect(tmp_path / "pytorch_model.bin")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match='give the format, "diff"'):
        detect(tmp_path / "x.safetensors")
    make_diff(tiny_family.experts["qa"], tiny_family.untuned, tmp_path / "diff")
    shutil.copy(tmp_path / "diff" / "diff.safetensors", tmp_path)
    with pytest.raises(LoadError, match="folder of its own"):
        detect(tmp_path)
    (tmp_path / "diff" / "diff.safetensors").rename(tmp_path / "diff" / "compressed.safetensors")
    with pytest.raises(LoadError, match="by its header a diff"):
        detect(tmp_path / "diff")


def test_the_hash_is_that_of_the_content(tiny_family: TinyFamily, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(tiny_family.experts["qa"], folder)
    first = content_hash(folder)
    plain = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        plain.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    assert first == plain.hexdigest(), "every file that save_pretrained writes counts"
    (folder / "README.md").write_text("no part of it")
    shutil.copytree(folder, tmp_path / "b")
    shares: list[float] = []
    assert content_hash(tmp_path / "b", shares.append) == first
    assert shares == sorted(shares) and shares[-1] == 1.0
    for file in content_files(folder):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert content_hash(folder) != first, file.name
        file.write_bytes(content)
    assert content_hash(folder) == first
    assert content_hash(folder / "model.safetensors") != first
    with pytest.raises(LoadError, match="no such file"):
        content_hash(tmp_path / "none")


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="regular file"):
        content_files(tmp_path)
