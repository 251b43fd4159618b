"""Exact fused log-probs of given texts: every lane reads its prompt and the text, and every position is fused.

No engine and no paged cache: plain Hugging Face forwards with their own caches, chunk by chunk, and the kernels for the
fusing. The models must not be attached to an engine, which changes how they attend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from proxyserve.engine.submission import LanePrompts
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.binding import BoundProgram, bind
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.program import BASE_LANE
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.remote import require_local
from proxyserve.types import LaneView, TokenExplanation
from proxyserve_kernels import (
    Match,
    PickControls,
    Picks,
    Ref,
    Row,
    RowBatch,
    SolveControls,
    Support,
    Term,
    backend_for,
)

#: Positions fused at once; their logits in all lanes are in memory together.
CHUNK = 128


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions `start` to `start + len(tokens)` of a text. `logits` has per lane, in the order of the program's, the
    logits [positions, width] that predict `tokens`."""

    start: int
    tokens: tuple[int, ...]
    logits: tuple[Tensor, ...]


class Likelihood:
    """Scores texts under fusions of one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._backend = backend_for(catalog.models.base.device)

    def bind(self, fusion: Fusion, prompts: LanePrompts) -> BoundProgram:
        """The program whose lanes `chunks` runs, the base among them. Raises InvalidRequest or UnknownModel, also for a
        gate, which decides during generation, and for a target entropy, which is a temperature: log-probs are those
        before it, so it would change nothing."""
        if fusion.gate is not None:
            raise InvalidRequest(
                "A gate decides during generation; leave it out to score a text.", param="fusion.gate"
            )
        if fusion.target_entropy is not None:
            raise InvalidRequest(
                "Log-probs are those before any temperature; leave 'target_entropy' out to score a text.",
                param="fusion.target_entropy",
            )
        return bind(fusion.compile(self.catalog), self.catalog, prompts.of, watched=(BASE_LANE,))

    @torch.inference_mode()
    def chunks(self, program: BoundProgram, text: Sequence[int]) -> Iterator[Chunk]:
        """Run all lanes over the text, once. Raises InvalidRequest if a lane's context is too short."""
        readers = [_Reader(require_local(spec.model), spec.prompt, len(text)) for spec in program.lanes]
        for start in range(0, len(text), CHUNK):
            tokens = tuple(text[start : start + CHUNK])
            yield Chunk(start, tokens, tuple(reader.read(tokens) for reader in readers))

    def explain(
        self, fusion: Fusion, prompts: LanePrompts, text: Sequence[int], top: int = 1
    ) -> list[TokenExplanation]:
        """What the fused law and every lane thought of each token of the text, with the `top` likeliest ones."""
        program = self.bind(fusion, prompts)
        return [entry for chunk in self.chunks(program, text) for entry in self._explain(program, chunk, top)]

    def logprobs(self, program: BoundProgram, chunk: Chunk) -> Tensor:
        """Fused log-prob of each of the chunk's tokens, float32 [positions], in nats."""
        picks = self._pick(self._batch(program, chunk), chunk.tokens, 0)
        assert picks.raw is not None  # asked for
        return picks.raw.chosen

    def _batch(self, program: BoundProgram, chunk: Chunk) -> RowBatch:
        rows = [fused_row(program, place, chunk.start + place) for place in range(len(chunk.tokens))]
        batch = RowBatch.of(chunk.logits, rows)
        law = program.law
        if law is None:
            return batch
        n = len(rows)
        controls = SolveControls(
            torch.full((n,), int(Match[law.match.upper()])),
            torch.full((n,), law.max_weight),
            torch.full((n,), law.kl),
        )
        return batch.with_weights(self._backend.solve(batch, controls).weights)

    def _pick(self, batch: RowBatch, tokens: Sequence[int], top: int) -> Picks:
        controls = replace(
            PickControls.greedy(batch.size),
            raw=(top,) * batch.size,
            forced=torch.tensor(tokens, dtype=torch.int64),
        )
        return self._backend.pick(batch, controls)

    def _explain(self, program: BoundProgram, chunk: Chunk, top: int) -> list[TokenExplanation]:
        batch = self._batch(program, chunk)
        picks = self._pick(batch, chunk.tokens, top)
        fused = _views(picks)
        width = program.vocabulary.size
        lanes = []
        for number in range(len(program.lanes)):
            alone = RowBatch.of(
                chunk.logits, [Row(Ref(number, place), width) for place in range(len(chunk.tokens))]
            )
            lanes.append(_views(self._pick(alone, chunk.tokens, top)))
        weights = batch.weights.tolist()
        kl, flips = picks.kl.tolist(), picks.flips.tolist()
        found = []
        for place, token in enumerate(chunk.tokens):
            views = {name: lanes[number][place] for name, number in program.lane_of.items()}
            logprobs = {number: own[place].logprob for number, own in enumerate(lanes)}
            used, push = program.by_expert(
                weights[place][: len(program.terms)], logprobs
            )  # then come unused ones
            found.append(TokenExplanation(token, fused[place], views, used, push, kl[place], flips[place]))
        return found


class _Reader:
    """One lane reading: its prompt at once, then the text as it comes."""

    def __init__(self, model: LoadedModel, prompt: tuple[int, ...], text: int) -> None:
        if not prompt:
            raise InvalidRequest("The prompt must have at least one token.", param="prompt")
        if len(prompt) + text > model.context_length:
            raise InvalidRequest(
                f"Prompt and text are {len(prompt) + text} tokens; the context of '{model.name}' is "
                f"{model.context_length}.",
                param="prompt",
            )
        self._model = model
        self._cache = DynamicCache(config=model.module.config)
        self._next = prompt[-1]  # read, but not yet computed
        if len(prompt) > 1:
            self._run(prompt[:-1], keep=1)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Logits [len(tokens), width] of the positions where these tokens stand."""
        logits = self._run((self._next, *tokens[:-1]), keep=0)
        self._next = tokens[-1]
        return logits

    def _run(self, ids: Sequence[int], keep: int) -> Tensor:
        output = self._model.module(
            torch.tensor([list(ids)], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[0]
        return logits


def fused_row(program: BoundProgram, place: int, token: int) -> Row:
    """The row that fuses row `place` of each lane's logits, as generated token number `token`; source i is lane i."""

    def ref(lane: int) -> Ref:
        return Ref(lane, place)

    support = program.support
    laws: list[Ref | Literal[-2]] = (
        [-2 if lane is None else ref(lane) for lane in support.of] if support else []
    )
    rule = program.program
    return Row(
        base=ref(program.origin),
        width=program.vocabulary.size,
        terms=tuple(
            Term(ref(term.lane), None if term.minus is None else ref(term.minus), term.weight_at(token))
            for term in program.terms
        ),
        base_weight=rule.origin_weight,
        power=rule.power,
        one_sided=rule.one_sided,
        normalise=program.normalise,
        support=None
        if support is None
        else Support(
            tuple(laws),
            support.top_k,
            support.top_p,
            support.min_p,
            "mask" if support.removes else "base",
        ),
        reference=None if program.base is None else ref(program.base),
    )


def _views(picks: Picks) -> list[LaneView]:
    assert picks.raw is not None  # every row asked
    chosen, ids, values = picks.raw.chosen.tolist(), picks.raw.ids.tolist(), picks.raw.values.tolist()
    return [
        LaneView(value, tuple(pair for pair in zip(own_ids, own_values, strict=True) if pair[0] >= 0))
        for value, own_ids, own_values in zip(chosen, ids, values, strict=True)
    ]
