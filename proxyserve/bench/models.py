"""Random models big enough that weights, not Python, are what a step waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a random Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool


#: About 68M and 5M parameters with a vocabulary of 32,000.
BASE = ModelShape(hidden=512, layers=12, heads=8, kv_heads=4, intermediate=1408, tied=False)
EXPERT = ModelShape(hidden=128, layers=6, heads=4, kv_heads=2, intermediate=352, tied=True)
VOCABULARY = 32_000


@dataclass(frozen=True, slots=True)
class BenchFamily:
    """Folders of a base and of one expert pair."""

    base: Path
    tuned: Path
    untuned: Path

    @property
    def folders(self) -> Sequence[Path]:
        return (self.base, self.tuned, self.untuned)


def build_bench_family(root: Path, *, context: int = 1024) -> BenchFamily:
    """Write the three random models under `root`. The same every time."""
    tokenizer = _word_tokenizer()
    folders = []
    for seed, (name, shape) in enumerate((("base", BASE), ("tuned", EXPERT), ("untuned", EXPERT))):
        torch.manual_seed(seed)
        folder = root / name
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                tie_word_embeddings=shape.tied,
                max_position_embeddings=context,
                bos_token_id=None,
                eos_token_id=0,
            )
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return BenchFamily(*folders)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of 32,000 made-up words: nothing is encoded in a benchmark, but a server needs a tokenizer."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=RawTokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0", unk_token="w1"
    )
