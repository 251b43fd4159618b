"""Prompts of an exact length in tokens, as ids or as texts, from the tokenizer of the model that is served.

Made-up text is enough for speed, and no two prompts share a beginning, which a prefix cache would skip.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from proxyserve.errors import ProxyserveError

#: How often a text is drawn anew before its length is given up.
_ATTEMPTS = 100


class Prompts:
    """Draws from the tokens of `folder`/tokenizer.json that are no special ones. With `as_text`, texts that the server
    encodes to exactly the length that is asked for, special tokens that the tokenizer adds by itself included."""

    def __init__(self, folder: Path, *, as_text: bool) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ProxyserveError(
                f"There is no tokenizer.json in {folder}; give --tokenizer the folder of the model served."
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        special = {
            index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._ids = sorted(set(self._tokenizer.get_vocab().values()) - special)
        self._as_text = as_text

    def draw(self, length: int, random: Random) -> list[int] | str:
        """`length` tokens. Raises ProxyserveError where no text of that length was found."""
        return self._text(length, random) if self._as_text else random.choices(self._ids, k=length)

    def count(self, text: str) -> int:
        """Tokens of `text` as the server counts them."""
        return len(self._tokenizer.encode(text).ids)

    def _text(self, length: int, random: Random) -> str:
        for _ in range(_ATTEMPTS):
            ids = random.choices(self._ids, k=length)
            # Encoding again what was decoded gives other tokens in most vocabularies: add and take until it fits.
            for _ in range(_ATTEMPTS):
                text: str = self._tokenizer.decode(ids)
                found = self.count(text)
                if found == length:
                    return text
                ids = ids[: length - found] if found > length else [*ids, *random.choices(self._ids, k=1)]
        raise ProxyserveError(
            f"The tokenizer has no text of exactly {length} tokens; try longer prompts, or ids instead of texts."
        )
