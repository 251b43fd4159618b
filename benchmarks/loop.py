"""The plain Hugging Face loop as a contestant: in this process, as many requests as there are clients as one batch."""

from __future__ import annotations

from time import perf_counter, process_time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.contestants import LOOP, Models
from proxyserve.bench.load.answer import Answer
from proxyserve.bench.load.drive import Load, Round
from proxyserve.bench.load.workload import Workload
from proxyserve.evaluation.hf_loop import generate_fused


class Loop:
    """Base, tuned and untuned model, fused with weight 1, greedy. It has no text before a batch is done."""

    def __init__(self, models: Models) -> None:
        torch.set_num_threads(1)
        self._models = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, models.dtype)).eval()
            for folder in (models.base, models.tuned, models.untuned)
        ]

    def measure(self, workload: Workload, load: Load, first: int) -> Round:
        """The same requests as a server gets. They must be of one length."""
        assert load.clients is not None
        asks = [workload.ask(first + number) for number in range(load.requests)]
        answers: list[Answer] = []
        started, used = perf_counter(), process_time()
        for at in range(0, len(asks), load.clients):
            batch = asks[at : at + load.clients]
            began = perf_counter()
            tokens = self.answer([ask.prompt for ask in batch], batch[0].max_tokens)
            ended = perf_counter()
            answers += [Answer(LOOP.name, began, ended, (ended,), None, len(row), None) for row in tokens]
        seconds, cpu = perf_counter() - started, process_time() - used
        return Round(seconds, tuple(answers), (), (), (), cpu)

    def answer(self, prompts: list[list[int] | str], new: int) -> list[list[int]]:
        """Token ids after each prompt, which is one of ids."""
        found: list[list[int]] = generate_fused(
            self._models, (1.0, 1.0, -1.0), torch.tensor(prompts), new
        ).tolist()
        return found
