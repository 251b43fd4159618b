"""The training command, on a toy recipe: complete folders, resumable, deterministic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from proxyserve.demo import training
from proxyserve.demo.family import FamilyPaths, family_paths
from proxyserve.demo.train import RECIPE, FamilyTrainer, Recipe
from proxyserve.demo.training import Shape

TINY = Shape(hidden=32, layers=1, heads=2, intermediate=32, initializer_range=0.1)
TOY = Recipe(
    base=replace(RECIPE.base, shape=TINY, steps=3, curriculum=(1, 2)),
    small=replace(RECIPE.small, shape=TINY, steps=2),
    expert=replace(RECIPE.expert, passes=0.1),
    oracle=replace(RECIPE.oracle, passes=0.1),
    tokenizer_documents=300,
)


def train(root: Path, seed: int = 0) -> FamilyPaths:
    root.mkdir(exist_ok=True)
    FamilyTrainer(root, seed, TOY, Progress(disable=True)).run()
    return family_paths(root)


def weights(folder: Path) -> list[torch.Tensor]:
    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


def same(first: Path, second: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of an expert and run again, the family is the same as in one go."""
    whole = train(tmp_path / "whole")
    folders = [whole.base, whole.untuned, *whole.experts.values(), *whole.oracles.values()]
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    original, calls = training.tune, []

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed")
    monkeypatch.undo()
    kept = (tmp_path / "resumed" / "atlas" / "model.safetensors").stat().st_mtime_ns
    resumed = train(tmp_path / "resumed")
    assert (tmp_path / "resumed" / "atlas" / "model.safetensors").stat().st_mtime_ns == kept
    assert same(whole.base, resumed.base) and same(whole.experts["guard"], resumed.experts["guard"])
    assert not list((tmp_path / "resumed").glob(".*")), "nothing temporary is left"
    train(tmp_path / "resumed")  # a finished family is left as it is
    assert (tmp_path / "resumed" / "atlas" / "model.safetensors").stat().st_mtime_ns == kept


def test_the_seed_counts(tmp_path: Path) -> None:
    assert not same(train(tmp_path / "a", 0).untuned, train(tmp_path / "b", 1).untuned)
