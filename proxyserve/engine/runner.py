"""One model and its KV blocks: tokens of many lanes in, logits rows out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proxyserve.engine.adapters import AdapterBank, adapter_plan
from proxyserve.engine.arena import Layout
from proxyserve.engine.attention import IMPLEMENTATION, Features, Plan, ShapeProbe, attention_plan
from proxyserve.engine.cpu_linear import doubled_bytes, pack_linears
from proxyserve.engine.cuda.choose import choose_attention
from proxyserve.engine.cuda.singles import Reserved
from proxyserve.engine.heads import HeadRows, head_rows, logits_dtype, watch_head, widen_head
from proxyserve.engine.kv_storage import KVStorage, LayerShape
from proxyserve.engine.lean.model import can_be_lean, make_lean
from proxyserve.engine.packed_row import PackedRow
from proxyserve.engine.sharded.collectives import connect
from proxyserve.errors import LoadError
from proxyserve.models.formats.lora import LoraWeights
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey

if TYPE_CHECKING:
    from proxyserve.engine.cuda.step_graphs import StepGraphs
    from proxyserve.engine.grouped.group import Group

_PROBE_TOKENS = 9


@dataclass(slots=True)
class RunnerStats:
    """Since the model came: forwards, tokens run by each model (its own name, and those of models over it), rows of
    logits made, seconds spent (on a GPU those of the host, which does not wait for it). `ended` is when the last
    forward did, by `time.perf_counter`."""

    forwards: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    seconds: float = 0.0
    ended: float = 0.0

    def ran(self, rows: int, seconds: float) -> None:
        """A forward has ended just now, of which this model's share is `seconds`."""
        self.forwards += 1
        self.rows += rows
        self.ended = perf_counter()
        self.seconds += seconds


def probe_ids(model: LoadedModel) -> tuple[int, ...]:
    """Some tokens of the model's, for trying it out."""
    length = min(_PROBE_TOKENS, model.context_length - 1)
    return tuple(index * 7 % model.vocabulary.size for index in range(1, length + 1))


class Runner:
    """Runs one model in packed, paged mode. `attach` must have given it storage first."""

    def __init__(self, model: LoadedModel, *, lean: bool = True) -> None:
        """`lean`: a decoder that can be is made so, see `proxyserve.engine.lean`."""
        self.model = model
        self.stats = RunnerStats()
        self.storage: KVStorage | None = None
        #: The models that this one may run together with.
        self.group: Group | None = None
        #: Where this model's steps are recorded, if they are.
        self.graphs: StepGraphs | None = None
        if logits_dtype(model.dtype, model.device) != model.dtype:
            widen_head(model.module)
        if model.sharding is not None:
            pack_linears(model.module)
            connect(model.module, model.sharding)
        #: Logits [width] after `probe_ids`, as the authors of the model's class compute them.
        self.reference = self._as_written()
        model.module.set_attn_implementation(IMPLEMENTATION)
        self.shapes, features = self._probe_layers()
        if model.sharding is None:
            if lean and can_be_lean(model.module, features):
                make_lean(model.module, features)
            pack_linears(model.module)
        self._doubled_bytes = doubled_bytes(model.module)
        #: The adapters whose lanes run as rows of this model's forward.
        self.adapters = AdapterBank(model.module)
        watch_head(model.module.get_output_embeddings())
        self.attention = choose_attention(self.shapes, features, model.dtype, model.device)
        #: Whether the logits of a difference of hidden states are the difference of the logits.
        self.head_is_linear = self._probe_head()

    @torch.inference_mode()
    def _as_written(self) -> Tensor:
        device = self.model.device
        ids = torch.tensor([probe_ids(self.model)], device=device)
        places = torch.arange(ids.shape[1], device=device)[None]
        self.model.module.set_attn_implementation("eager")
        # The plan is for a decoder that an earlier runner of the model has made lean.
        with attention_plan(ShapeProbe()):
            output = self.model.module(input_ids=ids, position_ids=places, use_cache=False)
        logits: Tensor = output.logits[0, -1]
        return logits

    def _probe_layers(self) -> tuple[list[LayerShape], list[Features]]:
        """Run a few tokens to learn what each layer stores and what its attention is like. Raises LoadError if a layer
        bypasses the registry."""
        probe = ShapeProbe()
        with attention_plan(probe), torch.inference_mode():
            self._forward(list(range(4)), list(range(4)), [3], 1)
        layers = int(self.model.module.config.get_text_config().num_hidden_layers)
        if sorted(probe.shapes) != list(range(layers)):
            raise LoadError(
                f"{self.model.path}: {len(probe.shapes)} of {layers} layers use the attention registry; "
                "a model with other kinds of layers cannot be served"
            )
        return [probe.shapes[layer] for layer in range(layers)], [probe.features[n] for n in range(layers)]

    def _probe_head(self) -> bool:
        """What a configuration does not say, a difference of two rows shows. A divided model's rows stay whole: what
        goes through its head is what every rank is told."""
        if self.model.sharding is not None:
            return False
        config = self.model.module.config.get_text_config()
        if getattr(config, "final_logit_softcapping", None) is not None:
            return False
        if getattr(self.model.module.get_output_embeddings(), "bias", None) is not None:
            return False
        rows = HeadRows.of([0, 1], [(0, 1)], self.model.device)
        with attention_plan(ShapeProbe()), torch.inference_mode(), head_rows(rows):
            logits = self._forward(list(range(4)), list(range(4)), [2, 3], 3).float()
        size = logits[:2].abs().max()
        error = (logits[2] - (logits[0] - logits[1])).abs().max()
        return bool(error <= size * 4 * torch.finfo(self.model.dtype).eps)

    @property
    def layout(self) -> Layout:
        """Of its KV; models of one layout can share an arena."""
        return Layout(tuple(self.shapes), self.model.dtype, self.model.device)

    @property
    def bytes(self) -> int:
        """Of its weights and the adapters over them."""
        return self.model.bytes + self._doubled_bytes + self.adapters.bytes

    @torch.inference_mode()
    def probe(self, adapter: LoraWeights) -> Tensor:
        """Logits [1, width] after a few tokens with an adapter that need not be in `adapters`. Touches no KV blocks, so
        that any thread may call it while steps go on."""
        ids = probe_ids(self.model)
        bank = AdapterBank(self.model.module)
        key = ModelKey("probe")
        bank.add(key, adapter)
        try:
            with attention_plan(ShapeProbe()), adapter_plan(bank.plan([key], [len(ids)])):
                return self._forward(list(ids), list(range(len(ids))), [len(ids) - 1], 1)
        finally:
            bank.close()

    @torch.inference_mode()
    def rehearse(self, tokens: int) -> None:
        """Run so many tokens, and as many rows of logits, for the time that they take. Touches no KV blocks; the
        tokens attend to each other."""
        places = list(range(tokens))
        with attention_plan(ShapeProbe()):
            self._forward([0] * tokens, places, places, tokens)

    def clear(self, blocks: Sequence[int], start: int = 0) -> None:
        """Zero the KV in these blocks, as `KVStorage.clear` does."""
        if self.storage is not None:
            self.storage.clear(blocks, start)

    def attach(self, storage: KVStorage) -> None:
        self.storage = storage

    def detach(self) -> None:
        self.storage = None
        self.graphs = None

    def run(self, work: Sequence[LaneWork], differences: Sequence[tuple[Lane, Lane]] = ()) -> Tensor:
        """Compute the work's tokens. Returns logits [rows, width]: those of each work item's last
        `rows` tokens, in the order of `work`, without those whose lanes are in `differences`; then, for each of these,
        the first lane's minus the second's (for which the head must be linear). Must be called in inference mode."""
        if self.storage is None:
            raise RuntimeError("the runner has no KV storage yet")
        if self.graphs is not None:
            replayed = self.graphs.run({self.model.key: work}, {self.model.key: differences})
            if replayed:
                return replayed[self.model.key]
        started = perf_counter()
        row = self.pack(work, differences)
        logits = self.compute(row, self.attention.plan(row.spans, self.storage))
        self.stats.ran(row.rows, perf_counter() - started)
        return logits

    def run_reserved(self, plan: Reserved) -> Tensor:
        """Logits [tokens, width] of all tokens that are in place in `plan`. Looks at no tensor, so that it can be
        recorded. Must be called in inference mode."""
        with attention_plan(plan), adapter_plan(None), head_rows(None):
            output = self.model.module(
                input_ids=plan.inputs[0:1], position_ids=plan.inputs[1:2], use_cache=False
            )
        logits: Tensor = output.logits[0]
        return logits

    def pack(self, work: Sequence[LaneWork], differences: Sequence[tuple[Lane, Lane]]) -> PackedRow:
        """The work as one row, which will be run now."""
        for item in work:
            self.stats.tokens[item.lane.model.name] += item.count
        return PackedRow.of(work, differences, self.adapters, self.model.device)

    def compute(self, row: PackedRow, plan: Plan) -> Tensor:
        """The logits of a packed row; `plan` is that of its spans. Must be called in inference mode."""
        with attention_plan(plan), adapter_plan(row.adapters), head_rows(row.heads):
            return self._forward(row.ids, row.positions, row.wanted, row.rows)

    def _forward(self, ids: list[int], positions: list[int], wanted: list[int], rows: int) -> Tensor:
        """`rows` rows of logits, of the tokens at `wanted` in the packed row or of what `head_rows` makes of them."""
        device = self.model.device
        # An empty index would make some classes compute all rows; one row that nobody reads is cheaper.
        keep = torch.tensor(wanted or [len(ids) - 1], device=device)
        output = self.model.module(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[0]
        return logits[:rows]
