"""Tiny random models: real Hugging Face folders, made in a second, with nothing trained but the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

EOS = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTEXT = 256
_TEXT = [
    "The quick brown fox jumps over the lazy dog, twice, and says: Zwölf Boxkämpfer jagen Viktor!",
    "name: Ada Lovelace\ncity: London\njob: mathematician\n",
    "Question: who was born where? Answer: nobody knows; 日本語 and emoji 🙂 are bytes as well.",
]

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2")


@dataclass(frozen=True)
class TinyFamily:
    """Folders of a base, a shared untuned model and tuned experts."""

    base: Path
    untuned: Path
    experts: Mapping[str, Path]


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """In the manner of Llama 2's: a text begins with a space that decoding strips, and bytes stand for characters that
    the vocabulary lacks. A token is a letter, a space, a space with a letter, or a byte."""
    letters = [chr(letter) for letter in range(ord("!"), ord("~") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = [("▁", letter) for letter in letters]
    vocabulary = {token: number for number, token in enumerate([*tokens, *map("".join, merges)])}
    raw = RawTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_tokenizer(vocabulary: int = 384, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens; `extra` tokens are added after it."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        _TEXT * 4,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=EOS)
    if extra:
        tokenizer.add_tokens(list(extra))
    return tokenizer


def config_of(architecture: str, width: int, *, hidden: int, layers: int) -> PreTrainedConfig:
    """A small config of the architecture; `width` is the head's number of columns. Shapes are chosen to be awkward:
    grouped heads, windows shorter than the texts, soft caps that bite."""
    common = {
        "vocab_size": width,
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.3,
    }
    match architecture:
        case "llama":
            return LlamaConfig(**common)
        case "qwen3":
            return Qwen3Config(**common, head_dim=16)
        case "mistral":
            return MistralConfig(**common, sliding_window=7)
        case "gemma":
            return GemmaConfig(**common, head_dim=16)
        case "gemma2":
            return Gemma2Config(
                **common,
                head_dim=16,
                sliding_window=7,
                attn_logit_softcapping=1.5,
                final_logit_softcapping=8.0,
                query_pre_attn_scalar=16,
            )
        case "gemma3":
            return Gemma3TextConfig(**common, head_dim=16, sliding_window=7, query_pre_attn_scalar=16)
        case "gpt2":
            return GPT2Config(
                vocab_size=width,
                n_embd=hidden,
                n_layer=layers,
                n_head=4,
                n_positions=CONTEXT,
                bos_token_id=0,
                eos_token_id=0,
                initializer_range=0.3,
            )
    raise ValueError(architecture)


def save_model(
    folder: Path,
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    hidden: int = 32,
    layers: int = 2,
    padding: int = 0,
) -> Path:
    """Write a random model whose head has `padding` more columns than the tokenizer has tokens."""
    torch.manual_seed(seed)
    config = config_of(architecture, len(tokenizer) + padding, hidden=hidden, layers=layers)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_family(
    root: Path, architecture: str, *, base_padding: int = 24, expert_padding: int = 8
) -> TinyFamily:
    """A base and two experts of one architecture, heads padded to different widths. The tuned models are the
    untuned one with noise, so that deltas are neither nothing nor everything."""
    plain = make_tokenizer()
    chat = make_tokenizer()
    chat.chat_template = CHAT_TEMPLATE
    base = save_model(root / "atlas", architecture, plain, seed=1, hidden=64, layers=3, padding=base_padding)
    untuned = save_model(root / "small", architecture, plain, seed=2, padding=expert_padding)
    experts = {}
    for seed, name in enumerate(("qa", "record"), start=3):
        model = AutoModelForCausalLM.from_pretrained(untuned, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        folder = root / name
        model.save_pretrained(folder)
        chat.save_pretrained(folder)
        experts[name] = folder
    return TinyFamily(base, untuned, experts)
