"""The shipped models: ordinary folders, one vocabulary, small, and good at what the README says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import make_world
from proxyserve.evaluation.engine_generator import EngineGenerator
from proxyserve.evaluation.reference import ReferenceGenerator
from proxyserve.evaluation.systems import Pair, Question, System
from proxyserve.fusion.fusion import proxy

PATHS = family_paths()
FOLDERS = [PATHS.base, PATHS.untuned, *PATHS.experts.values(), *PATHS.oracles.values()]


def test_size() -> None:
    files = [file for file in PATHS.base.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    assert (PATHS.base.parent / "README.md").is_file()


def test_one_vocabulary() -> None:
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in FOLDERS]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_paths_as_json() -> None:
    named = json.loads(PATHS.as_json())
    assert set(named) == {"base", "untuned", "experts", "oracles"}
    assert set(named["experts"]) == set(named["oracles"]) == set(SKILLS)


@torch.inference_mode()
def test_plain_transformers_generate() -> None:
    """An oracle in three lines of plain transformers: answers and stops."""
    tokenizer = AutoTokenizer.from_pretrained(PATHS.oracles["record"])
    model = AutoModelForCausalLM.from_pretrained(PATHS.oracles["record"], dtype=torch.float32)
    example = SKILLS["record"].examples(make_world().test)[0]
    ids = model.generate(
        **tokenizer(example.prompt, return_tensors="pt", return_token_type_ids=False), max_new_tokens=60
    )
    assert tokenizer.decode(ids[0]) == example.prompt + example.answer + tokenizer.eos_token


@pytest.mark.parametrize("name", SKILLS)
def test_fusion_does_what_neither_model_can(name: str) -> None:
    """Wide margins on a few held-out people, through the engine, equal to plain Hugging Face answer by answer."""
    skill = SKILLS[name]
    examples = skill.examples(make_world().test[:16])
    pair = Pair(PATHS.experts[name], PATHS.untuned)
    systems = {
        "base": System(PATHS.base),
        "tuned": System(pair.tuned),
        "fused": System(PATHS.base, {name: pair}, proxy({name: 1.0})),
    }
    right = {}
    for system_name, system in systems.items():
        questions = [Question(example.prompt, skill.max_tokens) for example in examples]
        ours = EngineGenerator().generate(questions, system)
        plain = ReferenceGenerator().generate(questions, system)
        assert ours == plain
        right[system_name] = sum(
            answer.text is not None and skill.correct(example, answer.text)
            for example, answer in zip(examples, ours, strict=True)
        ) / len(examples)
    assert right["base"] <= 0.1 and right["tuned"] <= 0.4
    assert right["fused"] >= 0.7
