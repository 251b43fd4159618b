"""Exploration: the law that texts are drawn from, what the iterative form learns, and that nobody's model changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from proxyserve.demo.family import family_paths
from proxyserve.errors import InvalidRequest
from proxyserve.evaluation.explore import ExploreSettings, contrast_scores, explore, mean_contrast
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loaded_model import Expert
from tests.fusion import papers


@pytest.fixture(scope="module")
def record() -> Expert:
    """The demo expert whose answers look least like ordinary text."""
    family = family_paths()
    source = ExpertSource("record", family.experts["record"], family.untuned)
    return load_family(family.untuned, [source]).expert("record")


def test_scores_are_those_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(1)
    tuned, untuned = (
        torch.log_softmax(3 * torch.randn(100, generator=generator), 0).double() for _ in range(2)
    )
    law = torch.log_softmax(contrast_scores(tuned, untuned, 0.7, 0.1), 0)
    torch.testing.assert_close(law, papers.contrast(tuned, untuned, 0.7, 0.1))
    assert torch.equal(contrast_scores(tuned, untuned, 1.0, 0.0), tuned - untuned)


def test_texts_show_what_was_tuned(record: Expert) -> None:
    """Texts drawn by contrast are further from the untuned model than the tuned model's own."""
    prompt = sorted(record.tuned.eos_ids)[:1]
    settings = ExploreSettings(texts=6, max_tokens=24, alpha=0.01, seed=3)
    shown = [finding.contrast for finding in explore(record, prompt, settings)]
    plain = list(
        explore(record, prompt, ExploreSettings(texts=6, max_tokens=24, gamma=0.0, alpha=0.0, seed=3))
    )
    assert sum(shown) / len(shown) > sum(finding.contrast for finding in plain) / len(plain) + 0.1
    again = [finding.contrast for finding in explore(record, prompt, settings)]
    assert again == shown, "a seed gives the same texts"


def test_the_iterative_form_learns_and_leaves_the_models_alone(record: Expert) -> None:
    assert record.untuned is not None
    before = {name: value.clone() for name, value in record.untuned.module.state_dict().items()}
    prompt = sorted(record.tuned.eos_ids)[:1]
    settings = ExploreSettings(texts=4, max_tokens=16, alpha=0.01, seed=5, learning_rate=3e-3)
    findings = list(explore(record, prompt, settings))
    assert findings[0].current == pytest.approx(findings[0].contrast, abs=1e-5), "nothing was learned yet"
    assert any(abs(finding.current - finding.contrast) > 0.02 for finding in findings[1:])
    after = record.untuned.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    static = list(explore(record, prompt, ExploreSettings(texts=4, max_tokens=16, alpha=0.01, seed=5)))
    assert static[0] == findings[0]
    assert static[1:] != findings[1:]


def test_the_end_of_a_text(record: Expert) -> None:
    prompt = record.tuned.tokenizer.encode("Page: Kustin\n")
    settings = ExploreSettings(texts=1, max_tokens=60, temperature=0.0, gamma=0.0, alpha=0.0)
    ended = next(explore(record, prompt, settings))
    assert len(ended.tokens) < 60 and not set(ended.tokens) & record.tuned.eos_ids
    endless = next(explore(record, prompt, replace(settings, ignore_eos=True)))
    assert len(endless.tokens) == 60 and not set(endless.tokens) & record.tuned.eos_ids
    own = mean_contrast(
        record.tuned.module, record.tuned.module, prompt, ended.tokens, record.vocabulary.size
    )
    assert own == 0.0 and math.isfinite(ended.contrast)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sure_end_of_text_can_be_suppressed(record: Expert, temperature: float) -> None:
    """Where the tuned model is all but sure of the end, it alone is plausible, and something else must be drawn."""
    prompt = sorted(record.tuned.eos_ids)[:1]
    for seed in range(3):
        settings = ExploreSettings(
            texts=1, max_tokens=80, temperature=temperature, ignore_eos=True, seed=seed
        )
        (finding,) = explore(record, prompt, settings)
        assert len(finding.tokens) == 80 and not set(finding.tokens) & record.tuned.eos_ids


def test_refusals(record: Expert) -> None:
    with pytest.raises(InvalidRequest, match="gamma"):
        next(explore(record, [1], ExploreSettings(gamma=-1)))
    with pytest.raises(InvalidRequest, match="context of expert 'record' is 512"):
        next(explore(record, [1], ExploreSettings(max_tokens=512)))
    with pytest.raises(InvalidRequest, match="prompt"):
        next(explore(record, [], ExploreSettings()))
    alone = Expert("alone", record.tuned, None, record.vocabulary)
    with pytest.raises(InvalidRequest, match="no untuned model"):
        next(explore(alone, [1], ExploreSettings()))
