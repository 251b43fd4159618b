"""A base on another server as a runner: tokens of many lanes in, rows out that are known in a few places.

Nothing is computed here and no KV is kept. A lane's prompt is sent along whenever its next token is wanted (the other
server's prefix cache makes that cheap), so chunks of a prompt that sample nothing cost no call at all.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import RunnerStats
from proxyserve.errors import UpstreamFailed
from proxyserve.models.remote import RemoteModel
from proxyserve.models.upstream import CONCURRENCY, TopLogprobs
from proxyserve.scheduler.scheduler import LaneWork

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteRows:
    """Rows [n, V] float32, one per work item with a row. `known`: the returned log-probs, -inf elsewhere.
    `highest`: the returned log-probs, elsewhere the largest that the token can have. `unseen` is the probability that
    was not returned, per row. `failures` says per request id why there is no answer; rows of those are -inf."""

    known: Tensor
    highest: Tensor
    unseen: Sequence[float]
    failures: Mapping[str, str] = field(default_factory=dict)


class RemoteRunner:
    """`Runner` for a `RemoteModel`. Calls of one step run at the same time, at most `CONCURRENCY` of them, and all have
    their answer or their failure after the model's timeout, however many retries that took."""

    def __init__(self, model: RemoteModel) -> None:
        self.model = model
        self.stats = RunnerStats()
        self.storage: KVStorage | None = None
        self._threads = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="proxyserve-upstream")

    def begin(self, work: Sequence[LaneWork]) -> RemoteCalls:
        """Send what the work's last tokens need; the answers are fetched later, while other models run. Equal texts
        (the choices of one prompt, at first) share a call."""
        client = self.model.client
        begun, deadline = time.perf_counter(), client.deadline()
        asked: dict[tuple[int, ...], Future[TopLogprobs]] = {}
        calls = []
        for item in work:
            if item.rows:
                text = tuple(item.lane.tokens(0, item.start + item.count))
                if text not in asked:
                    asked[text] = self._threads.submit(client.top_logprobs, text, deadline)
                calls.append((item.request.request_id, asked[text]))
        for item in work:
            self.stats.tokens[item.lane.model.name] += item.count
        return RemoteCalls(self, calls, begun)

    def clear(self, blocks: Sequence[int], start: int = 0) -> None:
        """There is nothing in the blocks."""

    def run(self, work: Sequence[LaneWork]) -> Tensor:
        """`begin` and wait: the rows as a local runner gives them, unknown places -inf."""
        return self.begin(work).rows().known


@dataclass(frozen=True, slots=True)
class RemoteCalls:
    """Calls that are under way for one step, each with the id of its request. `begun` is by `time.perf_counter`."""

    runner: RemoteRunner
    calls: Sequence[tuple[str, Future[TopLogprobs]]]
    begun: float

    def rows(self) -> RemoteRows:
        """Wait for all answers."""
        model, stats = self.runner.model, self.runner.stats
        shape = (len(self.calls), model.vocabulary.size)
        known, highest = torch.full(shape, -math.inf), torch.full(shape, -math.inf)
        unseen = [1.0] * len(self.calls)
        failures: dict[str, str] = {}
        for row, (request_id, call) in enumerate(self.calls):
            try:
                answer = call.result()
                unseen[row] = answer.unseen
            except UpstreamFailed as error:
                logger.warning("request %s ends: %s", request_id, error.message)
                failures[request_id] = error.message
                continue
            except Exception as error:  # an answer that nobody thought of is no reason to end other requests
                logger.exception("request %s ends: the other server's answer cannot be used", request_id)
                failures[request_id] = f"The base's server gave an unusable answer ({type(error).__name__})."
                continue
            # Ids beyond the tokenizer are padding of the other server's head: nobody could read them.
            pairs = [(token, value) for token, value in answer.logprobs.items() if token in model.vocabulary]
            highest[row] = answer.bound
            if pairs:
                ids, values = zip(*pairs, strict=True)
                known[row, list(ids)] = highest[row, list(ids)] = torch.tensor(values)
        if self.calls:
            stats.ran(len(self.calls), time.perf_counter() - self.begun)
        return RemoteRows(known.to(model.device), highest.to(model.device), unseen, failures)
