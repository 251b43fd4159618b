"""A base that another OpenAI-style server runs. Here it has a tokenizer, and log-probs of the likeliest tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

import httpx
import torch

from proxyserve.errors import LoadError, UpstreamFailed
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.upstream import RemoteSource, TopLogprobs, UpstreamClient
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.token_names import id_of_name, text_name, unique_names
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

DEFAULT_CONTEXT = 4096
_PROBE = "The capital of France is"
#: Sum of probabilities above which numbers are no log-probs, rounding allowed for.
_MOST_MASS = 1.01


@dataclass(frozen=True, eq=False)
class RemoteModel:
    """The attributes of a `LoadedModel` that do not need its weights, and the client that asks for log-probs. `device`
    is where the rows are put that are made of answers; their dtype is float32."""

    key: ModelKey
    client: UpstreamClient
    tokenizer: Tokenizer
    context_length: int
    eos_ids: frozenset[int]
    vocabulary: SharedVocabulary
    device: torch.device
    parameters: int = 0
    bytes: int = 0
    created: int = field(default_factory=lambda: int(time()))

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def trunk(self) -> RemoteModel:
        """Itself: nothing runs over a remote model."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


#: Either kind, for whoever needs tokenizers, contexts and vocabularies only.
AnyModel = LoadedModel | RemoteModel


def require_local(model: AnyModel) -> LoadedModel:
    """Raises LoadError for a model on another server, whose whole law cannot be had."""
    if isinstance(model, RemoteModel):
        raise LoadError(f"'{model.name}' is on another server; this needs its weights here")
    return model


def remote_name(source: RemoteSource, model: str) -> str:
    """What the base is called here: the last part of its name there, in letters that names may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", model.rpartition("/")[2]).strip("-_")[:64] or "remote"


def load_remote(source: RemoteSource, *, name: str | None, device: torch.device) -> RemoteModel:
    """Ask the server for its name, its context and one position. Raises LoadError, saying what to change, if it does
    not answer, does not give log-probs, or evidently has another tokenizer."""
    _check_url(source.url)
    if not source.tokenizer.expanduser().is_dir():
        raise LoadError(f"{source.tokenizer}: no such folder; --base-tokenizer names the base's tokenizer")
    tokenizer = Tokenizer.load(source.tokenizer.expanduser())
    vocabulary = SharedVocabulary.of(tokenizer.token_to_id, tokenizer.vocabulary_size)
    names = unique_names(tokenizer, sorted(vocabulary.ids()))
    entry = _listed_model(UpstreamClient(source, names), source)
    prompt = tokenizer.encode(_PROBE) or [min(vocabulary.ids())]
    client = _probed(source, names, str(entry["id"]), prompt, tokenizer)
    said = entry.get("max_model_len")
    context = source.context or (said if isinstance(said, int) and said > 1 else DEFAULT_CONTEXT)
    return RemoteModel(
        key=ModelKey(name or remote_name(source, client.model)),
        client=client,
        tokenizer=tokenizer,
        context_length=context,
        eos_ids=tokenizer.eos_ids | _configured_eos(source.tokenizer.expanduser()),
        vocabulary=vocabulary,
        device=device,
    )


def _check_url(text: str) -> None:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise LoadError(f"'{text}' is no URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise LoadError(f"'{text}' is no URL of a server; write http://host:port/v1")
    if url.userinfo or url.query or url.fragment:
        raise LoadError("The base's URL must be bare; put a key into a file and give --base-api-key-file")


def _listed_model(client: UpstreamClient, source: RemoteSource) -> Mapping[str, Any]:
    """The server's entry for the wanted model. A server without a list is fine where the name is given."""
    try:
        entries = client.models()
    except UpstreamFailed as error:
        if source.model is not None and error.status not in (None, 401, 403):
            return {"id": source.model}
        raise LoadError(f"{source.url}/models: {error.message} {_advice(error.status)}") from error
    for entry in entries:
        if entry.get("id") == source.model or (source.model is None and "id" in entry):
            return entry
    if source.model is None:
        raise LoadError(f"{source.url}/models lists no model; name one with --base-model")
    return {"id": source.model}  # not every name that a server takes is on its list


def _probed(
    source: RemoteSource, names: Mapping[str, int], model: str, prompt: list[int], tokenizer: Tokenizer
) -> UpstreamClient:
    """A client that has had a proper answer: tokens named by id where the server can do that, else by text."""
    by_text = UpstreamClient(source, names, model=model, by_id=False)
    by_id = UpstreamClient(source, names, model=model)
    try:
        answer = by_id.top_logprobs(prompt, by_id.deadline())
    except UpstreamFailed as error:
        if error.status not in (400, 422):
            raise LoadError(f"{source.url}: {error.message} {_advice(error.status)}") from error
        answer = None
    if answer is not None and all(id_of_name(text) is not None for text in answer.names):
        _check_law(source, answer)
        _check_tokenizer(source, answer, by_text, prompt, tokenizer)
        return by_id
    try:
        answer = by_text.top_logprobs(prompt, by_text.deadline())
    except UpstreamFailed as error:
        raise LoadError(f"{source.url}: {error.message} {_advice(error.status)}") from error
    _check_law(source, answer)
    if 2 * len(answer.logprobs) < len(answer.names):
        raise LoadError(_other_tokenizer(source))
    return by_text


def _check_law(source: RemoteSource, answer: TopLogprobs) -> None:
    mass = math.fsum(math.exp(min(value, 1.0)) for value in answer.logprobs.values())
    if mass > _MOST_MASS or not all(math.isfinite(value) for value in answer.logprobs.values()):
        raise LoadError(
            f"{source.url}: the numbers given are no log-probs, their probabilities sum to {mass:.3g}"
        )
    if source.top_k > 1 and len(answer.names) < 2:
        raise LoadError(
            f"{source.url}: only one token has a log-prob; the server must give --base-top-k of them, of the law "
            "before temperature"
        )


def _check_tokenizer(
    source: RemoteSource,
    answer: TopLogprobs,
    by_text: UpstreamClient,
    prompt: list[int],
    tokenizer: Tokenizer,
) -> None:
    """The server names the same tokens by text as well; most texts must be those that the ids have here."""
    try:
        texts = {text.strip() for text in by_text.top_logprobs(prompt, by_text.deadline()).names}
    except UpstreamFailed as error:
        raise LoadError(f"{source.url}: {error.message} {_advice(error.status)}") from error
    width = tokenizer.vocabulary_size
    known = [text_name(tokenizer, token).strip() for token in answer.logprobs if token < width]
    if 2 * sum(text in texts for text in known) < len(answer.logprobs):
        raise LoadError(_other_tokenizer(source))


def _other_tokenizer(source: RemoteSource) -> str:
    return (
        f"{source.url}: most tokens that the server names are not those of {source.tokenizer}; give the folder of the "
        "base's own tokenizer as --base-tokenizer"
    )


def _advice(status: int | None) -> str:
    match status:
        case 401 | 403:
            return "Give a key with --base-api-key-file."
        case 404:
            return "Check that the URL ends as the server's does (mostly /v1), and --base-model."
        case 400 | 422:
            return (
                "It must take a prompt of token ids, max_tokens 1 and logprobs --base-top-k (many servers give at "
                "most 20, some 5): try a smaller one."
            )
        case None:
            return "Is it running, and does it give log-probs on /completions?"
        case _:
            return "Its own log says why."


def _configured_eos(folder: Path) -> frozenset[int]:
    """Ids that end a text by the configuration beside the tokenizer, if there is one."""
    found: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        try:
            eos = json.loads((folder / file).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found.update(token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int))
    return frozenset(found)
