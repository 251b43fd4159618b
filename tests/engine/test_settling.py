"""What a CPU server settles when it starts: dtype and threads, with measurements that say what the test wants."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxyserve.engine import settling
from proxyserve.engine.runner import Runner
from proxyserve.engine.settling import settle_dtype, settle_threads, time_dtypes, time_threads
from proxyserve.errors import LoadError
from proxyserve.models.loading import load_model
from proxyserve.models.stored import half_dtype
from proxyserve.types import ModelKey
from tests.tiny import TinyFamily

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def stored_as(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target


def saying(
    seconds: Mapping[torch.dtype, float], asked: list[tuple[torch.dtype, ...]]
) -> Callable[..., Mapping[torch.dtype, float]]:
    def measure(_: settling.Sizes, dtypes: Sequence[torch.dtype]) -> Mapping[torch.dtype, float]:
        asked.append(tuple(dtypes))
        return {dtype: seconds[dtype] for dtype in dtypes}

    return measure


def never(*_: object) -> Mapping[torch.dtype, float]:
    raise AssertionError("nothing is to be measured")


def test_what_is_stored_in_float32_stays(tiny_family: TinyFamily, tmp_path: Path) -> None:
    bfloat = stored_as(tiny_family.base, tmp_path / "base", BFLOAT)
    assert half_dtype(tiny_family.base) is None and half_dtype(bfloat) is BFLOAT
    for base, experts in ((tiny_family.base, []), (tiny_family.base, [bfloat]), (bfloat, [tiny_family.base])):
        settled = settle_dtype("cpu", "auto", base, experts, measure=never)
        assert settled.value.dtype is FLOAT and settled.reason == "as stored"


@pytest.mark.parametrize("stored", [BFLOAT, HALF])
@pytest.mark.parametrize("faster", [True, False])
def test_half_precision_runs_in_what_is_faster(
    tiny_family: TinyFamily, tmp_path: Path, stored: torch.dtype, faster: bool
) -> None:
    base = stored_as(tiny_family.base, tmp_path / "base", stored)
    asked: list[tuple[torch.dtype, ...]] = []
    measure = saying({FLOAT: 2.0, stored: 1.0 if faster else 3.0}, asked)
    settled = settle_dtype("cpu", "auto", base, [tmp_path / "adapter"], measure=measure)
    assert asked == [(FLOAT, stored)]
    assert settled.value.dtype is (stored if faster else FLOAT)
    assert ("2 times" if faster else "0.67 times") in settled.reason


@pytest.mark.parametrize(("seconds", "chosen"), [(1.05, BFLOAT), (1.15, FLOAT)])
def test_where_neither_is_clearly_faster_it_stays_as_stored(
    tiny_family: TinyFamily, tmp_path: Path, seconds: float, chosen: torch.dtype
) -> None:
    base = stored_as(tiny_family.base, tmp_path / "base", BFLOAT)
    measure = saying({FLOAT: 1.0, BFLOAT: seconds}, [])
    assert settle_dtype("cpu", "auto", base, measure=measure).value.dtype is chosen
    assert settle_dtype("cpu", "fastest", base, measure=measure).value.dtype is FLOAT


def test_fastest_measures_whatever_is_stored(tiny_family: TinyFamily) -> None:
    asked: list[tuple[torch.dtype, ...]] = []
    measure = saying({FLOAT: 2.0, BFLOAT: 1.0}, asked)
    assert settle_dtype("cpu", "fastest", tiny_family.base, measure=measure).value.dtype is BFLOAT
    assert asked == [(FLOAT, BFLOAT)]


def test_a_dtype_that_is_named_is_taken(tiny_family: TinyFamily) -> None:
    assert settle_dtype("cpu", "bfloat16", tiny_family.base, measure=never).value.dtype is BFLOAT
    assert settle_dtype("cpu", "auto", None, measure=never).value.dtype is FLOAT
    with pytest.raises(LoadError, match="int3"):
        settle_dtype("cpu", "int3", tiny_family.base)


def test_matrices_are_really_timed() -> None:
    seconds = time_dtypes(([(64, 32), (32, 64)], 2), (FLOAT, BFLOAT))
    assert set(seconds) == {FLOAT, BFLOAT} and all(0 < value < 60 for value in seconds.values())


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.3, 6: 0.2}, 6),
        ({1: 1.0, 2: 0.5, 4: 0.22, 6: 0.2}, 4),
        ({1: 1.0, 2: 0.5, 4: 0.6, 6: 3.0}, 2),
        ({1: 1.0, 2: 0.95, 4: 0.9, 6: 0.85}, 1),
        ({1: 1.0, 2: 0.7}, 2),
    ],
)
def test_as_few_threads_as_are_about_the_best(
    tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], threads: int
) -> None:
    monkeypatch.setattr(settling, "_SMALLEST_SHARED", 0)
    runner = Runner(
        load_model(tiny_family.base, ModelKey("base"), settle_dtype("cpu", "float32", None).value)
    )

    def measure(numbers: Sequence[int], _: Runner) -> Mapping[int, float]:
        assert list(numbers) == list(seconds)
        return seconds

    assert settle_threads("auto", runner, cores=max(seconds), measure=measure).value == threads


def test_threads_that_need_no_measurement(tiny_family: TinyFamily) -> None:
    runner = Runner(
        load_model(tiny_family.base, ModelKey("base"), settle_dtype("cpu", "float32", None).value)
    )
    assert settle_threads(3, runner).value == 3
    assert settle_threads(None, runner).value is None
    assert settle_threads("auto", runner, cores=1).value == 1
    assert settle_threads("auto", runner, cores=4).value == 1  # a small model
    assert settle_threads("auto", None, cores=4).value == 1  # a base on another server
    before = torch.get_num_threads()
    assert set(time_threads((1,), runner)) == {1}
    assert torch.get_num_threads() == before
