"""Which model classes can be served, and why the others are refused at load rather than answered wrongly.

The engine computes attention itself, through the attention registry of transformers. A class whose layers do not go
through the registry would silently attend to nothing but the current step, so the class must declare that they do;
`engine.verify` then proves it by comparing logits.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from proxyserve.errors import LoadError

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
#: These rescale positions by the length of the sequence; a packed batch has no single length.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def refuse_unsupported_config(config: PreTrainedConfig, where: str) -> None:
    """Raise LoadError for configurations that cannot be served, before their weights are read."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise LoadError(f"{where}: '{kind}' is an encoder-decoder; only decoder-only models can be served")
    if getattr(config, "auto_map", None) and not type(config).__module__.startswith("transformers."):
        raise LoadError(f"{where}: '{kind}' needs code from its folder, which is never run")
    other_layers = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        raise LoadError(
            f"{where}: '{kind}' has layers of type {', '.join(sorted(other_layers))}; "
            "only full and sliding-window attention can be served"
        )
    for rope in _rope_types(config):
        if rope in _LENGTH_DEPENDENT_ROPE:
            raise LoadError(
                f"{where}: rope type '{rope}' depends on the length of the sequence and cannot be batched; "
                "use a checkpoint with default, linear, yarn or llama3 scaling"
            )


def refuse_unsupported_module(module: PreTrainedModel, where: str) -> None:
    """Raise LoadError if the class's attention cannot be replaced."""
    if not getattr(module, "_supports_attention_backend", False):
        raise LoadError(
            f"{where}: {type(module).__name__} does not use the attention registry of transformers "
            "(its attention cannot be paged); families that do: Llama, Qwen2, Qwen3, Mistral, Mixtral, Gemma, "
            "Phi, OLMo, Granite, GPT-2, GPT-NeoX, OPT and most newer ones"
        )


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Rope types named anywhere in the configuration: one for the model, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    entries = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry.get("rope_type", entry.get("type", "default"))) for entry in entries}
