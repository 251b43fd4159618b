"""Random models of the sizes that people serve, made on the device: nothing is read or written but a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from proxyserve.bench.models import ModelShape, word_tokenizer
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement, make_loaded
from proxyserve.models.model_set import ModelSet, make_expert
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

EXPERT = "expert"
#: The base's logits and the untuned model's are this much smaller than the tuned model's, so that the fused law is the
#: drafter's own: nearly all drafts stand. What a step costs does not depend on it.
_QUIET = 1e-4


@dataclass(frozen=True, slots=True)
class Pair:
    """A base and the size of an expert's two models."""

    base: ModelShape
    expert: ModelShape
    vocabulary: int

    def bytes(self, itemsize: int) -> int:
        """Of all weights."""
        return itemsize * sum(
            count * parameters(shape, self.vocabulary) for shape, count in ((self.base, 1), (self.expert, 2))
        )


def parameters(shape: ModelShape, vocabulary: int) -> int:
    """Of a Llama of this shape, but for its norms."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * shape.hidden * (shape.hidden + kv) + 3 * shape.hidden * shape.intermediate
    return shape.layers * layer + vocabulary * shape.hidden * (1 if shape.tied else 2)


#: After Qwen 2.5 of these sizes.
_32B = ModelShape(hidden=5120, layers=64, heads=40, kv_heads=8, intermediate=27_648, tied=False)
_7B = ModelShape(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18_944, tied=False)
_1_5B = ModelShape(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, tied=True)
_0_5B = ModelShape(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, tied=True)
_TINY = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, tied=False)
_TINIER = ModelShape(hidden=32, layers=1, heads=2, kv_heads=2, intermediate=48, tied=True)

PAIRS: Mapping[str, Pair] = {
    "7B + 2 x 0.5B": Pair(_7B, _0_5B, 152_064),
    "32B + 2 x 1.5B": Pair(_32B, _1_5B, 152_064),
}
#: To see that everything runs.
TINY: Mapping[str, Pair] = {"tiny": Pair(_TINY, _TINIER, 320)}


def make_models(pair: Pair, placement: Placement, context: int) -> ModelSet:
    """A base and one expert."""
    with TemporaryDirectory() as folder:
        word_tokenizer(pair.vocabulary).save_pretrained(folder)
        tokenizer = Tokenizer.load(Path(folder))
    made = {
        name: _make(name, shape, pair.vocabulary, placement, context, tokenizer, quiet)
        for name, shape, quiet in (
            ("base", pair.base, True),
            ("tuned", pair.expert, False),
            ("untuned", pair.expert, True),
        )
    }
    return ModelSet(made["base"], [make_expert(EXPERT, made["base"], made["tuned"], made["untuned"])])


def _make(
    name: str,
    shape: ModelShape,
    vocabulary: int,
    placement: Placement,
    context: int,
    tokenizer: Tokenizer,
    quiet: bool,
) -> LoadedModel:
    config = LlamaConfig(
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
    with torch.device(placement.device):
        module = AutoModelForCausalLM.from_config(config, dtype=placement.dtype)
    if quiet:
        with torch.no_grad():
            module.get_output_embeddings().weight.mul_(_QUIET)
    return make_loaded(Path(name), ModelKey(name), module, tokenizer, placement)
