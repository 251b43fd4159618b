"""`proxyserve compress` as a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from proxyserve.cli.compress import compress_command
from proxyserve.errors import LoadError, ProxyserveError
from proxyserve.models.formats.compressed import decompress
from proxyserve.models.formats.detect import detect
from tests.cli.output import said
from tests.tiny import TinyFamily

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def pair(tiny_family: TinyFamily) -> list[str]:
    return [str(tiny_family.experts["qa"]), str(tiny_family.untuned)]


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(compress_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@torch.inference_mode()
def divergence(tuned: Path, other: Path, text: str) -> float:
    """Mean KL(tuned || other) over the tokens of a text that fits into the context."""
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)
        for folder in (tuned, other)
    )
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_sizes_and_divergences(tiny_family: TinyFamily, pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:200])
    out = tmp_path / "out"
    result = run(*pair, out, "--density", "0.3", "--text", tmp_path / "text.txt", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert detect(out) == "compressed"
    assert found["bytes"] == (out / "compressed.safetensors").stat().st_size
    tuned, untuned = (load_file(Path(folder) / "model.safetensors") for folder in pair)
    total = sum(tensor.numel() for tensor in tuned.values())
    assert (found["total"], found["kept"]) == (total, round(0.3 * total))
    assert found["bf16_ratio"] == 2 * total / found["bytes"] == found["diff_ratio"] / 2
    decompress(out, tmp_path / "diff.safetensors")
    delta = load_file(tmp_path / "diff.safetensors")
    points = {point["scale"]: point["nats"] for point in found["probe"]["kl"]}
    for scale in (1.0, 1.5):
        full = tmp_path / f"full-{scale}"
        shutil.copytree(pair[0], full)
        state = {name: tensor + scale * delta.get(name, 0.0) for name, tensor in untuned.items()}
        save_file(state, full / "model.safetensors", {"format": "pt"})
        expected = divergence(tiny_family.experts["qa"], full, TEXT[:200])
        assert points[scale] == pytest.approx(expected, rel=1e-3)
    assert found["probe"]["kl_untuned"] == pytest.approx(
        divergence(tiny_family.experts["qa"], tiny_family.untuned, TEXT[:200]), rel=1e-3
    )
    assert points[found["probe"]["best_scale"]] == min(points.values())


def test_what_a_person_reads(pair: list[str], tmp_path: Path) -> None:
    result = run(*pair, tmp_path / "out")
    assert result.exit_code == 0, result.output
    output = said(result)
    assert "compressed.safetensors" in output and "in bfloat16" in output and "untuned" in output
    assert '{"path": "' in output


def test_a_plain_diff_loses_nothing(pair: list[str], tmp_path: Path) -> None:
    result = run(*pair, tmp_path / "expert.safetensors", "--diff", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert detect(tmp_path / "expert.safetensors") == "diff"
    (point,) = found["probe"]["kl"]
    assert point["scale"] == 1.0 and abs(point["nats"]) < 1e-9 < found["probe"]["kl_untuned"]


def test_a_text_longer_than_the_context_is_read_in_pieces(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 3)
    result = run(*pair, tmp_path / "out", "--diff", "--text", tmp_path / "text.txt", "--json")
    tokens = json.loads(result.stdout)["probe"]["tokens"]
    ids = AutoTokenizer.from_pretrained(pair[0]).encode(TEXT * 3)
    assert tokens == len(ids) + 1 > 256


def test_refusals(pair: list[str], tmp_path: Path, tiny_family: TinyFamily) -> None:
    for density in ("0", "1.5", "nan"):
        result = run(*pair, tmp_path / "out", "--density", density)
        assert result.exit_code == 2 and "--density" in said(result)
    result = run(*pair, tmp_path / "out", "--density", "0.5", "--diff")
    assert result.exit_code == 2 and "keeps everything" in said(result)
    result = run(*pair, tmp_path)
    assert result.exit_code == 2 and "is there already" in said(result)
    result = run(*pair, tmp_path / "none" / "out")
    assert result.exit_code == 2 and "there is no folder" in said(result)
    (tmp_path / "text.txt").write_text(" \n")
    result = run(*pair, tmp_path / "out", "--text", tmp_path / "text.txt")
    assert result.exit_code == 2 and "--text" in said(result)
    (tmp_path / "text.txt").write_bytes(b"caf\xe9")
    latin = run(*pair, tmp_path / "out", "--text", tmp_path / "text.txt")
    assert isinstance(latin.exception, ProxyserveError) and "not UTF-8" in str(latin.exception)
    other = run(tiny_family.base, tiny_family.untuned, tmp_path / "out")
    assert isinstance(other.exception, LoadError) and "config.json says" in str(other.exception)
    same = run(pair[0], pair[0], tmp_path / "out")
    assert isinstance(same.exception, LoadError) and "nothing to compress" in str(same.exception)
    lost = run(tmp_path / "no", pair[1], tmp_path / "out")
    assert isinstance(lost.exception, LoadError) and "no such folder" in str(lost.exception)
    assert not (tmp_path / "out").exists()
