"""Models of the benchmark whose drafts stand as often as they are told to, and what is measured with them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.bench import speculation
from proxyserve.bench.agreeing import AgreeingFamily, build_agreeing_family
from proxyserve.bench.models import ModelShape
from proxyserve.bench.speculation import measure_speculation
from proxyserve.cli.bench import speculation_table
from proxyserve.evaluation.hf_loop import generate_fused
from proxyserve.models.loading import Placement

VOCABULARY = 400
SHARES = (0.0, 0.5, 0.8, 1.0)
BASE = ModelShape(hidden=192, layers=3, heads=4, kv_heads=2, intermediate=128, tied=False)
EXPERT = ModelShape(hidden=128, layers=2, heads=2, kv_heads=1, intermediate=96, tied=True)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AgreeingFamily:
    folder = tmp_path_factory.mktemp("agreeing")
    return build_agreeing_family(folder, SHARES, base=BASE, expert=EXPERT, vocabulary=VOCABULARY)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def test_drafts_stand_at_the_share_of_tokens(family: AgreeingFamily) -> None:
    base = load(family.base)
    text = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1)).view(10, 40)
    for share, (tuned, untuned) in family.experts.items():
        drafts = load(tuned)(text).logits
        fused = base(text).logits + drafts - load(untuned)(text).logits
        assert torch.equal(fused.argmax(-1), family.follows[text])
        assert (drafts.argmax(-1) == fused.argmax(-1)).float().mean().item() == pytest.approx(share)


def test_texts_do_not_repeat(family: AgreeingFamily) -> None:
    models = [load(family.base), *map(load, family.experts[0.5])]
    prompt = torch.tensor([[5, 6, 7]])
    produced = generate_fused(models, (1.0, 1.0, -1.0), prompt, 60)[0].tolist()
    expected, token = [], 7
    for _ in range(60):
        token = int(family.follows[token])
        expected.append(token)
    assert produced == expected
    assert len(set(produced)) == 60


def test_shapes_are_those_of_random_models(family: AgreeingFamily) -> None:
    config = load(family.experts[1.0][0]).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 2, 96)
    assert not config.tie_word_embeddings


def test_speculation_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody has a turn, acceptance is what it was made to be, and the table shows all of it."""
    monkeypatch.setattr(speculation, "SIZES", {"tiny": (BASE, EXPERT)})
    rows = measure_speculation(
        Placement(torch.device("cpu"), torch.float32),
        sizes=("tiny",),
        shares=(0.0, 1.0),
        batches=(2,),
        prompt=4,
        new=9,
        rounds=2,
    )
    assert [(row.batch, row.share, row.acceptance) for row in rows] == [(2, 0.0, 0.0), (2, 1.0, 1.0)]
    for row in rows:
        assert set(row.contestants) == {"plain", "auto", "1 draft", "4 drafts", "base", "loop"}
        assert all(len(measured.seconds) == 2 for measured in row.contestants.values())
        assert set(row.ratios) == {"auto / plain", "auto / base", "auto / loop"}
    # A token from the prompt, then all drafts stand: at most 5 at once, and the last one is drawn by itself.
    assert rows[1].contestants["4 drafts"].tokens_per_step == pytest.approx(9 / 3)
    assert rows[0].contestants["4 drafts"].tokens_per_step == 1.0
    assert json.loads(json.dumps([row.as_dict() for row in rows]))[1]["acceptance"] == 1.0
    shown = Console(file=io.StringIO(), width=250)
    shown.print(speculation_table(rows))
    assert "auto / plain" in shown.file.getvalue()  # type: ignore[attr-defined]
