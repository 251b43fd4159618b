"""A lane: one model's copy of one request.

prompt (own ids) ........ | output (shared suffix of the request) | drafts (shared, during a step)
◀──────────── wanted ────────────────────────────────────────────▶
◀── computed ──▶                          KV of these tokens is in the lane's blocks
◀ cached ▶                                of them, found in the prefix cache instead of being run
◀──── reached ────▶                       the most that were ever computed, before blocks were taken back

Drafts are tokens that may become output when the step ends. Lanes run them like others; of their KV, what belongs to
drafts that did not become output is written over by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proxyserve.kv.block_pool import BlockKey, BlockPool
from proxyserve.kv.prefix import next_key, root_key
from proxyserve.types import ModelKey


@dataclass(slots=True, eq=False)
class Lane:
    """One model's KV state for one request.

    Set by the owner of the request: `model`, `prompt`, `output` (the request's one list, appended to elsewhere), `salt`
    (keeps prefix-cache entries of different tenants apart) and `over`, the model whose weights run the lane
    where that is not `model` itself (which is an adapter over it, or has the same weights), and `cost`, what a token of
    the lane costs beside one of the base. Set by the request: `drafts`, its one list of them. Set by the scheduler:
    everything else.
    """

    model: ModelKey
    prompt: tuple[int, ...]
    output: list[int]
    salt: str = ""
    over: ModelKey | None = None
    cost: float = 1.0

    drafts: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    reached: int = 0
    cached: int = 0
    tokens_run: int = 0
    _keys: list[BlockKey] = field(default_factory=list)
    _published: int = 0

    @property
    def trunk(self) -> ModelKey:
        """The model whose weights and KV blocks the lane uses."""
        return self.over or self.model

    @property
    def wanted(self) -> int:
        """Tokens whose KV must be there before the next token can be sampled."""
        return len(self.prompt) + len(self.output)

    @property
    def missing(self) -> int:
        return self.wanted - self.computed

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Ids at positions `start` to `stop` (exclusive)."""
        split, end = len(self.prompt), self.wanted
        if split <= start and stop <= end:
            return self.output[start - split : stop - split]
        if stop <= split:
            return self.prompt[start:stop]
        output = self.output[max(0, start - split) : stop - split]
        return [*self.prompt[start:], *output, *self.drafts[max(0, start - end) : max(0, stop - end)]]

    def blocks_needed(self, tokens: int, block_size: int) -> int:
        """Blocks beyond those held that are needed to hold `tokens` tokens."""
        return max(0, -(-tokens // block_size) - len(self.blocks))

    def match_prefix(self, pool: BlockPool, block_size: int, rows: int) -> list[int]:
        """Published blocks that this lane could start from. Always leaves the last `rows` tokens to compute, since
        their logits are wanted."""
        usable = (self.wanted - rows) // block_size
        return pool.match(self._keys_until(usable, block_size))

    def start_from(self, blocks: Sequence[int], block_size: int) -> None:
        """Begin with these matched blocks (their references are already taken)."""
        self.blocks = list(blocks)
        self._published = len(blocks)
        self.computed = len(blocks) * block_size
        self.reached = max(self.reached, self.computed)
        if self.tokens_run == 0:  # not when it starts again after preemption: those tokens were its own work
            self.cached = self.computed

    def advance(self, count: int, ran: int, pool: BlockPool, block_size: int) -> None:
        """`count` more tokens have been computed, and `ran` were run for that; publish the blocks that became full.
        Drafts may be among the `count` only if they will be output."""
        self.computed += count
        self.reached = max(self.reached, self.computed)
        self.tokens_run += ran
        full = self.computed // block_size
        if full > self._published:
            keys = self._keys_until(full, block_size)
            for index in range(self._published, full):
                pool.publish(self.blocks[index], keys[index], self.model)
            self._published = full

    def release(self, pool: BlockPool) -> None:
        """Give every block back. The lane can start again from nothing (or from the prefix cache)."""
        pool.release(self.blocks)
        self.blocks = []
        self.computed = 0
        self._published = 0

    def check(self, block_size: int) -> None:
        """Raise AssertionError if blocks do not hold the text. For tests, between steps."""
        assert self.computed <= len(self.blocks) * block_size, "more tokens than blocks"
        assert self.computed <= self.wanted, "computed ran past wanted"
        assert self._published * block_size <= self.computed, "a block was published before it was full"
        assert len(set(self.blocks)) == len(self.blocks), "a lane holds a block twice"
        keys, self._keys = self._keys, []
        assert keys == self._keys_until(len(keys), block_size), "a key is of tokens that are not the text's"

    def _keys_until(self, count: int, block_size: int) -> list[BlockKey]:
        keys = self._keys
        while len(keys) < count:
            previous = keys[-1] if keys else root_key(self.model, self.salt)
            start = len(keys) * block_size
            keys.append(next_key(previous, self.tokens(start, start + block_size)))
        return keys[:count]
