"""Shared ids: by token, not by size; padding never counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.errors import LoadError
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.vocabulary import SharedVocabulary, require_compatible
from tests.engine.driver import run, submission
from tests.naive import NaiveFusion
from tests.tiny import EOS, build_family, make_tokenizer, save_model

BASE = {"a": 0, "b": 1, "c": 2, "d": 3}


def test_extra_tokens_on_either_side_are_left_out() -> None:
    longer = {**BASE, "e": 4, "f": 5}
    require_compatible(BASE, "base", longer, "expert")
    require_compatible(longer, "base", BASE, "expert")
    shared = SharedVocabulary.of(BASE, 8).intersect(SharedVocabulary.of(longer, 6))
    assert shared == SharedVocabulary(4)


def test_head_narrower_than_tokenizer() -> None:
    assert SharedVocabulary.of(BASE, 3) == SharedVocabulary(3)


def test_unused_slots_are_holes() -> None:
    shared = SharedVocabulary.of({"a": 0, "c": 2}, 4).intersect(SharedVocabulary.of(BASE, 4))
    assert shared == SharedVocabulary(3, frozenset({1}))
    assert 1 not in shared and 2 in shared and 3 not in shared and -1 not in shared


def test_the_first_tokens_that_differ_are_named() -> None:
    with pytest.raises(LoadError, match=r"token 'b' is 1 in atlas and 2 in qa\.tuned; token 'c' is 2"):
        require_compatible(BASE, "atlas", {"a": 0, "b": 2, "c": 1, "d": 3}, "qa.tuned")


def test_two_tokens_under_one_id() -> None:
    with pytest.raises(LoadError, match=r"id 3 is 'd' in atlas and 'x' in qa\.tuned"):
        require_compatible(BASE, "atlas", {"a": 0, "b": 1, "c": 2, "x": 3}, "qa.tuned")


@pytest.mark.parametrize(("base", "expert"), [(0, 40), (40, 0), (7, 7)])
def test_padded_heads_in_any_direction(tmp_path: Path, base: int, expert: int) -> None:
    family = build_family(tmp_path, "llama", base_padding=base, expert_padding=expert)
    models = load_family(
        family.base, [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    )
    engine = Engine(models, EngineConfig(kv_memory=2**20))
    naive = NaiveFusion(family.base, {"qa": (family.experts["qa"], family.untuned)})
    width = models.base.vocabulary.size
    expected = naive.greedy({"base": [9, 8, 7]}, {"qa": 1.5}, 12, width)
    assert run(engine, [submission("a", [9, 8, 7], {"qa": 1.5})])["a/0"].tokens == expected.tokens


def test_an_expert_that_knows_fewer_tokens_narrows_its_requests_only(tmp_path: Path) -> None:
    """The base has tokens that the expert lacks: plain requests may produce them, fused ones must not."""
    wide, narrow = make_tokenizer(extra=("<extra-1>", "<extra-2>")), make_tokenizer()
    base = save_model(tmp_path / "atlas", "llama", wide, seed=1)
    small = save_model(tmp_path / "small", "llama", narrow, seed=2)
    tuned = save_model(tmp_path / "tuned", "llama", narrow, seed=3)
    models = load_family(base, [ExpertSource("x", tuned, small)])
    engine = Engine(models, EngineConfig(kv_memory=2**20))
    extra = len(wide) - 1
    forced = {"logit_bias": {extra: 100.0}}
    plain = run(engine, [submission("a", [5, 6], **forced)])["a/0"]
    assert set(plain.tokens) == {extra}
    fused = run(engine, [submission("b", [5, 6], {"x": 1.0}, logprobs=20)])["b/0"]
    shown = {token for entry in fused.logprobs for token, _ in entry.top}
    assert max(shown | set(fused.tokens)) < len(narrow)


def test_another_tokenizer_is_refused_at_load(tmp_path: Path) -> None:
    base = save_model(tmp_path / "atlas", "llama", make_tokenizer(), seed=1)
    permuted = save_model(tmp_path / "permuted", "llama", permuted_tokenizer(), seed=3)
    with pytest.raises(LoadError, match="have different tokenizers"):
        load_family(base, [ExpertSource("x", permuted, permuted)])


def permuted_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens, as many of them, with two ids exchanged."""
    raw = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer = RawTokenizer.from_str(json.dumps(raw))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
