"""Models of the benchmark whose drafts stand as often as they are told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.bench.agreeing import AgreeingFamily, build_agreeing_family
from proxyserve.bench.models import ModelShape
from proxyserve.evaluation.hf_loop import generate_fused

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
