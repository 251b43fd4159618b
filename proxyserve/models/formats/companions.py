"""The files beside the weights that belong to a tuned model: its tokenizer, and what ends its texts."""

from __future__ import annotations

import shutil
from pathlib import Path

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_companions(tuned: Path, untuned: Path, target: Path) -> None:
    """Put into the folder `target` what the tuned model has otherwise than the untuned one: its tokenizer with its chat
    template (all of it, since half of one cannot be loaded), and its generation_config.json. Raises OSError."""
    if any(_content(tuned / name) != _content(untuned / name) for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            if (tuned / name).is_file():
                shutil.copyfile(tuned / name, target / name)
    if _content(tuned / GENERATION) not in (None, _content(untuned / GENERATION)):
        shutil.copyfile(tuned / GENERATION, target / GENERATION)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
