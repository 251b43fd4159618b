"""One model's tokenizer and chat template, with the few operations that a server needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from proxyserve.errors import InvalidRequest, LoadError
from proxyserve.text.templates import ChatTemplate

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Wraps a fast Hugging Face tokenizer loaded from a local folder. Thread-safe for reading."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.token_to_id: dict[str, int] = tokenizer.get_vocab()
        self.vocabulary_size = max(self.token_to_id.values()) + 1
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._skipped_ids = frozenset(
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises LoadError if the folder has no fast tokenizer."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds; all mean the same to the caller
            raise LoadError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise LoadError(
                f"{folder}: no fast tokenizer; add a tokenizer.json (save_pretrained of a fast one)"
            )
        return cls(tokenizer)

    # Ids -----------------------------------------------------------------------------------------------------

    @property
    def bos_token(self) -> str | None:
        return self._tokenizer.bos_token

    @property
    def eos_token(self) -> str | None:
        return self._tokenizer.eos_token

    @property
    def pad_token(self) -> str | None:
        return self._tokenizer.pad_token

    @property
    def eos_ids(self) -> frozenset[int]:
        eos = self._tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset({int(eos)})

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out unless told otherwise."""
        return token_id in self._skipped_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token_text(self, token_id: int) -> str:
        """One token as text. Holds U+FFFD where the token is part of a character."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for: exact for byte-level and byte-fallback vocabularies, else the UTF-8
        form of its text."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._special_ids:
            return self.token_text(token_id).encode()
        if self._is_byte_level:
            table = _byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
        elif match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        elif "▁" in token:  # SentencePiece's mark for a space, which decoding one token alone would strip
            return token.replace("▁", " ").encode()
        return self.token_text(token_id).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        stages = decoder.get("decoders", [decoder])
        return any(stage.get("type") == "ByteLevel" for stage in stages)

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of all tokens that `decode` leaves out unless told otherwise, by their texts."""
        return {self.token_text(token): token for token in sorted(self._skipped_ids | self._special_ids)}

    # Chat ----------------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def chat_template(self, *, tools: bool = False) -> ChatTemplate | None:
        """The model's own template; of several, the one for conversations with tools or the one for others. Raises
        InvalidRequest if it has several and none of these."""
        if not self.has_chat_template:
            return None
        try:
            return ChatTemplate(self._tokenizer.get_chat_template(tools=[] if tools else None))
        except ValueError as error:
            raise InvalidRequest(
                f"The model's chat templates cannot be used: {error}", param="messages"
            ) from error

    @property
    def template_variables(self) -> dict[str, str]:
        """What a chat template learns from the tokenizer: its special tokens, `bos_token` and so on."""
        return dict(self._tokenizer.special_tokens_map)


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Inverse of the printable alphabet that byte-level BPE writes bytes in (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    spare = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + index): byte for index, byte in enumerate(spare)})
    return table
