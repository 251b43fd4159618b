"""Write a Llama folder of Hugging Face's as a GGUF file, which llama.cpp reads.

A script of its own, with numpy, safetensors and gguf alone: it runs in llama.cpp's environment. The vocabulary goes in
as plain words, enough for models whose tokenizer is a list of words and whose prompts come as ids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

#: How weights are stored, by the name of the dtype that other servers are given.
TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """`folder` has float32 weights in one model.safetensors, rotary embeddings without scaling and a tokenizer of
    words. Norms stay float32, as llama.cpp wants them."""
    config = json.loads((folder / "config.json").read_text())
    stored, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(file, "llama")
    heads = config["num_attention_heads"]
    writer.add_name(folder.name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    _add_vocabulary(writer, folder)
    for name, weight in _tensors(folder, config):
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_theta(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    words: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ordered = sorted(words, key=words.__getitem__)
    # Llama's own kind, in which a word that begins with this character is written after a space.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"\u2581{word}".encode() for word in ordered])
    writer.add_token_scores([0.0] * len(ordered))
    kinds = [gguf.TokenType.NORMAL] * len(ordered)
    kinds[0], kinds[1] = gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN
    writer.add_token_types(kinds)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_add_bos_token(False)


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """What is tied is left out: llama.cpp takes the embedding where there is no head."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(folder / "model.safetensors").items():
        weight = weight.astype(np.float32)
        if name in _NAMES:
            yield _NAMES[name], weight
            continue
        _, _, layer, part = name.split(".", 3)
        for projection, count in heads.items():
            if projection in part:
                weight = _pairs(weight, count)
        yield f"blk.{layer}.{_LAYER_NAMES[part]}", weight


def _pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp turns neighbours, transformers the two halves of a head: bring those together. [rows, columns]."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    arguments = parser.parse_args()
    write_gguf(arguments.folder, arguments.file, arguments.dtype)
