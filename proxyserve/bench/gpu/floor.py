"""What a step must cost: every weight and every key and value is read once per forward, and arithmetic takes its time.

kernels.md, section 6: per model the longer of bytes / bandwidth and operations / speed; models one after the other, as
they share the bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxyserve.models.loaded_model import LoadedModel

#: Dense bfloat16 operations per second of an H200, as measured on one.
OPERATIONS = 790e12


@dataclass(frozen=True, slots=True)
class Reads:
    """Of one model: bytes of weights that a forward reads, bytes of KV per token of context, and its parameters in
    products (all but an embedding that is only looked up)."""

    weights: int
    kv: int
    parameters: int

    @classmethod
    def of(cls, model: LoadedModel) -> Reads:
        config = model.module.config
        looked_up = 0
        if not config.tie_word_embeddings:
            looked_up = model.module.get_input_embeddings().weight.numel()
        itemsize = model.dtype.itemsize
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            model.bytes - looked_up * itemsize,
            2 * config.num_hidden_layers * config.num_key_value_heads * size * itemsize,
            model.parameters - looked_up,
        )

    def seconds(self, batch: int, tokens: int, context: int, rate: float) -> float:
        """Of one forward: `batch` lanes of `context` tokens each, `tokens` new ones of each, at `rate` bytes per
        second."""
        moved = self.weights + batch * context * self.kv
        return max(moved / rate, 2 * self.parameters * batch * tokens / OPERATIONS)


@dataclass(frozen=True, slots=True)
class Floor:
    """Of a base with one expert."""

    base: Reads
    tuned: Reads
    untuned: Reads

    def alone(self, batch: int, context: int, rate: float) -> float:
        """Seconds of a step of the base alone."""
        return self.base.seconds(batch, 1, context, rate)

    def fused(self, batch: int, context: int, rate: float) -> float:
        """Seconds of a step of all three."""
        return sum(model.seconds(batch, 1, context, rate) for model in (self.base, self.tuned, self.untuned))

    def drafted(self, batch: int, context: int, rate: float, drafts: int) -> float:
        """Seconds of a step in which the tuned model drafts so many tokens, and the others verify them."""
        verified = sum(m.seconds(batch, drafts + 1, context, rate) for m in (self.base, self.untuned))
        return verified + (drafts + 1) * self.tuned.seconds(batch, 1, context, rate)


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Of a step whose drafts stand with this probability each."""
    if acceptance == 1.0:
        return drafts + 1.0
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
