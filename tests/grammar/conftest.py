"""One compiler for the tests of this folder: a byte-level vocabulary with tokens of several bytes, special tokens and
holes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxyserve.config import GrammarLimits
from proxyserve.grammar.compiler import GrammarCompiler
from proxyserve.text.tokenizer import Tokenizer
from tests.tiny import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    raw = make_tokenizer()
    raw.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|end|>"]})
    raw.add_tokens(["<tool_call>"])
    return Tokenizer(raw)


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids, GrammarLimits(compile_seconds=20.0))
    yield compiler
    compiler.close()
