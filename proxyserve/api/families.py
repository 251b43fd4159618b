"""Every metric that a server has: what it is called, what it means, which labels it has. `docs/metrics.md` is made of
this (`python -m proxyserve.api.families`), and so may boards be.

Where vLLM measures the same, the name after the prefix is vLLM's. Labels come from the operator (models, experts, keys)
or from fixed lists, never from clients.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from proxyserve.engine.histogram import HistogramStats


class Kind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """`name` is that of its samples; those of a histogram add `_bucket`, `_sum` and `_count`."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()

    def one(self, value: float) -> Metric:
        """Of a counter or gauge without labels."""
        return self.samples([((), value)])

    def samples(self, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
        """Of a counter or gauge: values of labels, and the value."""
        kind = CounterMetricFamily if self.kind is Kind.COUNTER else GaugeMetricFamily
        metric = kind(self.name, self.text, labels=self.labels)
        for labels, value in samples:
            metric.add_metric(labels, value)
        return metric

    def by(self, values: Mapping[str, float]) -> Metric:
        """Of a counter or gauge with one label."""
        return self.samples([((label,), value) for label, value in values.items()])

    def histogram(self, stats: HistogramStats) -> Metric:
        bounds = [*map(str, stats.bounds), "+Inf"]
        metric = HistogramMetricFamily(self.name, self.text)
        metric.add_metric((), list(zip(bounds, accumulate(stats.counts), strict=True)), stats.total)
        return metric


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(f"proxyserve_{name}_total", Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(f"proxyserve_{name}", Kind.GAUGE, text, labels)


def _histogram(name: str, text: str) -> Family:
    return Family(f"proxyserve_{name}", Kind.HISTOGRAM, text)


# Requests ---------------------------------------------------------------------------------------------------------

READY = _gauge(
    "ready", "1 while the server takes requests; 0 while it starts or drains, and when its engine has died."
)
RUNNING = _gauge("num_requests_running", "Choices that hold KV blocks.")
WAITING = _gauge("num_requests_waiting", "Choices that wait to be admitted.")
WAITING_TOKENS = _gauge("waiting_tokens", "Prompt tokens of choices that have not begun to answer.")
SUCCESS = _counter("request_success", "Choices finished, by reason.", "finished_reason")
FAILURE = _counter("request_failure", "Choices ended early, by reason.", "finished_reason")
REJECTED = _counter("requests_rejected", "Requests that were refused, by reason.", "reason")
PREEMPTIONS = _counter("num_preemptions", "Choices whose KV blocks were taken back for a while.")
KEY_REQUESTS = _counter(
    "key_requests", "Choices that ended, by the name of the key that asked for them.", "key"
)
KEY_TOKENS = _counter(
    "key_tokens",
    "Tokens of those choices; kind is prompt or generation. "
    "A prompt counts once however many choices (`n`) continue it.",
    "key",
    "kind",
)

# Tokens -----------------------------------------------------------------------------------------------------------

PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of choices that ended.")
PROMPT_TOKENS_CACHED = _counter("prompt_tokens_cached", "Those of them that came from the prefix cache.")
GENERATION_TOKENS = _counter("generation_tokens", "Tokens generated.")
LANE_TOKENS = _counter("lane_tokens", "Tokens that ran through a model.", "model")
REQUEST_PROMPT_TOKENS = _histogram("request_prompt_tokens", "Prompt tokens of each finished choice.")
REQUEST_GENERATION_TOKENS = _histogram(
    "request_generation_tokens", "Tokens generated for each finished choice."
)

# Time -------------------------------------------------------------------------------------------------------------

FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "From a request's arrival to the first token of each choice, as the HTTP layer saw it.",
)
INTER_TOKEN = _histogram(
    "inter_token_latency_seconds",
    "Between successive tokens of a choice; several tokens of one step share the time since the one before them.",
)
END_TO_END = _histogram(
    "e2e_request_latency_seconds",
    "From a request's arrival to the end of each finished choice, as the HTTP layer saw it.",
)
QUEUE_TIME = _histogram(
    "request_queue_time_seconds", "Until each choice was admitted for the first time; counted then."
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", "From the admission of each finished choice to its first token."
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", "From the first to the last token of each finished choice."
)
TIME_PER_TOKEN = _histogram(
    "request_time_per_output_token_seconds", "Mean time between the tokens of each finished choice."
)
REQUEST_BARRIER = _histogram(
    "request_barrier_wait_seconds",
    "For each finished choice of several lanes: the steps, added up, in which one of its lanes had caught up and could "
    "not be sampled because another lane still had more than its last token to compute.",
)
STEP_SECONDS = _histogram("engine_step_seconds", "Each step of the engine, from scheduling to its events.")
STEP_TOKENS = _histogram("iteration_tokens_total", "Tokens that all models together ran in each step.")
STEP_BARRIER = _histogram(
    "step_barrier_wait_seconds",
    "In each step of several models: from when the first of them had its logits to when the last one had.",
)
STEPS = _counter("engine_steps", "Steps of the engine that were begun.")
STEP_FAILURES = _counter(
    "engine_step_failures", "Steps that failed; the choices in them ended with an error, all others went on."
)
LANE_SECONDS = _counter(
    "lane_seconds",
    "Time spent running a model and the adapters over it; of a remote base, waiting for its answers.",
    "model",
)
SAMPLING_SECONDS = _counter(
    "sampling_seconds", "Time spent on the logits: fusing, solving weights, sampling, explaining."
)
KERNEL_COMPILATIONS = _counter("kernel_compilations", "Kernels compiled after the warm-up; should stay 0.")

# Fusion -----------------------------------------------------------------------------------------------------------

FUSED_TOKENS = _counter("fused_tokens", "Tokens of requests that ask for more than the plain base.")
GATED_TOKENS = _counter("gated_tokens", "Those of them that a gate left to the base alone.")
FLIPS = _counter("flips", "Those of them where the fused argmax is not the base's.")
KL = _histogram("kl_nats", "KL(fused || base) of each fused token, in nats, where the base takes part.")
NONFINITE = _counter(
    "nonfinite_choices", "Choices that ended because no next token had a finite score (NaN, infinity)."
)
SOLVED_WEIGHT = _histogram("solved_weight", "Weights that were solved for a token, each expert's on its own.")
REMOVED_MASS = _histogram(
    "constraint_removed_mass",
    "For each choice under a grammar or another constraint: the probability that it took from the fused law, mean over "
    "its tokens.",
)
GRAMMAR_COMPILATIONS = _counter("grammar_compilations", "Grammars asked for, by what came of it.", "outcome")
GRAMMAR_SECONDS = _histogram("grammar_compile_seconds", "Time to compile each grammar that was not cached.")

# Speculation ------------------------------------------------------------------------------------------------------

DRAFTS = _counter(
    "spec_decode_num_drafts",
    "How often a choice went ahead of its text, by the model that drafted; lookup: found in the choice's own text.",
    "drafter",
)
DRAFT_TOKENS = _counter("spec_decode_num_draft_tokens", "Tokens that were drafted.", "drafter")
ACCEPTED_TOKENS = _counter(
    "spec_decode_num_accepted_tokens", "Those of them that are what was drawn without them.", "drafter"
)

# Memory -----------------------------------------------------------------------------------------------------------

KV_USAGE = _gauge("kv_cache_usage_perc", "Share of a pool's KV blocks that lanes hold, 0 to 1.", "pool")
KV_BLOCKS = _gauge("kv_blocks", "KV blocks of a pool.", "pool")
KV_BLOCKS_IN_USE = _gauge("kv_blocks_in_use", "KV blocks that lanes hold.", "pool")
KV_BLOCKS_CACHED = _gauge("kv_blocks_cached", "KV blocks that no lane holds but a prompt may find.", "pool")
PREFIX_QUERIES = _counter(
    "prefix_cache_queries", "Prompt tokens looked for in the prefix cache, in all lanes.", "model"
)
PREFIX_HITS = _counter("prefix_cache_hits", "Those of them that were found.", "model")
MEMORY = _gauge("memory_bytes", "Weights and KV of all models, in this process.")
BASE_PARTS = _gauge("base_parts", "Processes that the base is divided over, 1 for one that is not.")

# Experts ----------------------------------------------------------------------------------------------------------

EXPERT_REQUESTS = _counter(
    "expert_requests",
    "Choices that ended, by the generation of each expert that they had. The four generations used last have series of "
    "their own; what was counted for those before them is added to generation older.",
    "expert",
    "generation",
)
EXPERT_INFO = _gauge(
    "expert_generation_info",
    "1 for each generation that is not over, with its phase.",
    "expert",
    "generation",
    "phase",
)
EXPERT_RUNNING = _gauge(
    "expert_requests_running", "Choices in flight on a generation.", "expert", "generation"
)
EXPERT_BYTES = _gauge("expert_bytes", "Weights that were loaded for a generation.", "expert", "generation")
EXPERT_PROGRESS = _gauge(
    "expert_load_progress", "How much of a load is done, from 0 to 1.", "expert", "generation"
)
EXPERT_PHASES = _counter("expert_phases", "Generations that have gone through a phase.", "phase")
EXPERT_PHASE_SECONDS = _counter("expert_phase_seconds", "Time that generations spent in a phase.", "phase")
EXPERT_FAILURES = _counter("expert_failures", "Loads that failed, by the phase that they failed in.", "phase")
EXPERT_ROLLBACKS = _counter("expert_rollbacks", "Rollbacks.")
EXPERT_EVICTIONS = _counter("expert_evictions", "Generations taken out of memory to make room.")
EXPERT_WAKES = _counter("expert_wakes", "Parked experts that a request had loaded.")

# Process ----------------------------------------------------------------------------------------------------------

BUILD_INFO = _gauge("build_info", "1, with the versions of what runs.", "version", "torch", "transformers")

# What prometheus_client says of a process on Linux.
PROCESS_CPU = Family(
    "process_cpu_seconds_total", Kind.COUNTER, "Total user and system CPU time spent in seconds."
)
PROCESS_MEMORY = Family("process_resident_memory_bytes", Kind.GAUGE, "Resident memory size in bytes.")
PROCESS_VIRTUAL_MEMORY = Family("process_virtual_memory_bytes", Kind.GAUGE, "Virtual memory size in bytes.")
PROCESS_START = Family(
    "process_start_time_seconds", Kind.GAUGE, "Start time of the process since unix epoch in seconds."
)
PROCESS_FILES = Family("process_open_fds", Kind.GAUGE, "Number of open file descriptors.")
PROCESS_MOST_FILES = Family("process_max_fds", Kind.GAUGE, "Maximum number of open file descriptors.")

SECTIONS: Mapping[str, tuple[Family, ...]] = {
    "Requests": (
        READY,
        RUNNING,
        WAITING,
        WAITING_TOKENS,
        SUCCESS,
        FAILURE,
        REJECTED,
        PREEMPTIONS,
        KEY_REQUESTS,
        KEY_TOKENS,
    ),
    "Tokens": (
        PROMPT_TOKENS,
        PROMPT_TOKENS_CACHED,
        GENERATION_TOKENS,
        LANE_TOKENS,
        REQUEST_PROMPT_TOKENS,
        REQUEST_GENERATION_TOKENS,
    ),
    "Time": (
        FIRST_TOKEN,
        INTER_TOKEN,
        END_TO_END,
        QUEUE_TIME,
        PREFILL_TIME,
        DECODE_TIME,
        TIME_PER_TOKEN,
        REQUEST_BARRIER,
        STEP_SECONDS,
        STEP_TOKENS,
        STEP_BARRIER,
        STEPS,
        STEP_FAILURES,
        LANE_SECONDS,
        SAMPLING_SECONDS,
        KERNEL_COMPILATIONS,
    ),
    "Fusion": (
        FUSED_TOKENS,
        GATED_TOKENS,
        FLIPS,
        KL,
        NONFINITE,
        SOLVED_WEIGHT,
        REMOVED_MASS,
        GRAMMAR_COMPILATIONS,
        GRAMMAR_SECONDS,
    ),
    "Speculation": (DRAFTS, DRAFT_TOKENS, ACCEPTED_TOKENS),
    "Memory": (
        KV_USAGE,
        KV_BLOCKS,
        KV_BLOCKS_IN_USE,
        KV_BLOCKS_CACHED,
        PREFIX_QUERIES,
        PREFIX_HITS,
        MEMORY,
        BASE_PARTS,
    ),
    "Experts": (
        EXPERT_REQUESTS,
        EXPERT_INFO,
        EXPERT_RUNNING,
        EXPERT_BYTES,
        EXPERT_PROGRESS,
        EXPERT_PHASES,
        EXPERT_PHASE_SECONDS,
        EXPERT_FAILURES,
        EXPERT_ROLLBACKS,
        EXPERT_EVICTIONS,
        EXPERT_WAKES,
    ),
    "Process": (
        BUILD_INFO,
        PROCESS_CPU,
        PROCESS_MEMORY,
        PROCESS_VIRTUAL_MEMORY,
        PROCESS_START,
        PROCESS_FILES,
        PROCESS_MOST_FILES,
    ),
}


def all_families() -> tuple[Family, ...]:
    """In the order of the documentation. Experts' are there only with a control plane, a process's only on Linux."""
    return tuple(family for families in SECTIONS.values() for family in families)


def tables() -> str:
    """The part of `docs/metrics.md` that lists them."""
    lines = []
    for title, families in SECTIONS.items():
        lines += [f"## {title}", "", "| metric | type | labels | what it is |", "| --- | --- | --- | --- |"]
        for family in families:
            labels = ", ".join(f"`{label}`" for label in family.labels)
            text = family.text.replace("|", "\\|")
            lines.append(f"| `{family.name}` | {family.kind} | {labels} | {text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(), end="")
