"""Random models big enough that weights, not Python, are what a step waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxyserve.bench.peaked import Peaks, make_peaked


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
#: About 300M and 15M.
LARGE = ModelShape(hidden=1024, layers=20, heads=16, kv_heads=8, intermediate=2816, tied=False)
LARGE_EXPERT = ModelShape(hidden=256, layers=9, heads=8, kv_heads=4, intermediate=704, tied=True)
VOCABULARY = 32_000


@dataclass(frozen=True, slots=True)
class BenchFamily:
    """Folders of a base, of an expert pair, and of a second tuned model over the same untuned one."""

    base: Path
    tuned: Path
    untuned: Path
    second: Path

    @property
    def folders(self) -> Sequence[Path]:
        """Of the models that fuse one expert."""
        return (self.base, self.tuned, self.untuned)


def build_bench_family(
    root: Path,
    *,
    base: ModelShape = BASE,
    expert: ModelShape = EXPERT,
    context: int = 1024,
    peaks: Peaks | None = None,
) -> BenchFamily:
    """Write the random models under `root`. The same every time. With `peaks` their laws are as peaked, and the pairs
    as alike, as it says; without, laws are nearly uniform, as those of random models are."""
    shapes = {"base": base, "tuned": expert, "untuned": expert, "second": expert}
    family = {name: random_llama(seed, shape, context) for seed, (name, shape) in enumerate(shapes.items())}
    if peaks is not None:
        make_peaked(family["base"], family["untuned"], [family["tuned"], family["second"]], peaks)
    tokenizer = word_tokenizer()
    for name, model in family.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return BenchFamily(**{name: root / name for name in family})


def random_llama(
    seed: int, shape: ModelShape, context: int, vocabulary: int = VOCABULARY
) -> LlamaForCausalLM:
    """In float32; the same for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
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
    ).eval()


def word_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A vocabulary of made-up words, "w7 w31": prompts are mostly ids, but a server needs a tokenizer."""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = RawTokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Special ones are looked for first, and would be found in "w15" as well.
    end, unknown = (AddedToken(word, single_word=True, normalized=False) for word in ("w0", "w1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token=unknown)
