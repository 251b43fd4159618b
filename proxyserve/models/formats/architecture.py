"""What a model's class says of the names in its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from proxyserve.errors import LoadError

#: A buffer that old files have once per layer.
_OLD_BUFFER = r"rotary_emb\.inv_freq$"


@dataclass(frozen=True, slots=True)
class Architecture:
    """`prefix` begins the names of all weights but the head's (`model`, `transformer`); `parameters` are all names.
    `ties` maps each one that is another's by the configuration to that (`lm_head.weight` to
    `model.embed_tokens.weight`). `ignored` fit what is in some files and is no weight."""

    config: PreTrainedConfig
    model_class: Any
    prefix: str
    parameters: frozenset[str]
    ties: Mapping[str, str]
    ignored: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, folder: Path) -> Architecture:
        """Raises LoadError if config.json cannot be used."""
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise LoadError(
                    f"{folder}: '{config.model_type}' is no causal language model; use another model"
                )
            found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model_class = found[0] if isinstance(found, tuple) else found
            # The constructor alone: `from_config` would set torch's default dtype, for all threads.
            with torch.device("meta"):
                skeleton = model_class(config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise LoadError(f"{folder}: config.json cannot be used: {error}") from error
        ignored = (_OLD_BUFFER, *(model_class._keys_to_ignore_on_load_unexpected or ()))
        return cls(
            config=config,
            model_class=model_class,
            prefix=model_class.base_model_prefix,
            parameters=frozenset(name for name, _ in skeleton.named_parameters(remove_duplicate=False)),
            ties=dict(skeleton.all_tied_weights_keys),
            ignored=tuple(re.compile(pattern) for pattern in ignored),
        )

    def is_ignored(self, name: str) -> bool:
        return name not in self.parameters and any(pattern.search(name) for pattern in self.ignored)

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Maps the names in a file to those that `save_pretrained` writes. Files of a model that was saved without its
        head have names without the prefix."""
        names = list(names)
        if any(name.startswith(f"{self.prefix}.") for name in names):
            return {name: name for name in names}
        return {name: name if name in self.parameters else f"{self.prefix}.{name}" for name in names}
