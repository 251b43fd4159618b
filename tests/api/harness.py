"""Runs lm-evaluation-harness, as it comes, on three local tasks; a process of its own, because it imports half of the
world. `python harness.py JOB.json` writes what it found to the job's `output`.

The job: `url` of /v1/completions, `data` (a JSON-lines file: `question`, `choices`, `gold`, `text`), `tokenizer` (a
folder), and `runs`: `model` of the server, `backend` of the tokenizer, `batch` and `concurrent`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager


def tasks(data: Path) -> list[ConfigurableTask]:
    def dataset(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list([json.loads(line) for line in data.read_text().splitlines()])}

    common = {
        "custom_dataset": dataset,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    generation = {
        "task": "local_generation",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "task": "local_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    return [ConfigurableTask(config={**common, **each}) for each in (choice, generation, rolling)]


def run(job: dict[str, Any], each: dict[str, Any]) -> dict[str, Any]:
    arguments = {
        "model": each["model"],
        "base_url": job["url"],
        "tokenizer_backend": each["backend"],
        "num_concurrent": each["concurrent"],
        "max_retries": 1,
        "max_length": 256,
    }
    if each["backend"] == "huggingface":
        arguments["tokenizer"] = job["tokenizer"]
    found = simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=tasks(Path(job["data"])),
        batch_size=each["batch"],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading thousands of task files takes seconds
    )
    return {
        "scores": dict(found["results"]),
        "samples": {
            name: {sample["doc_id"]: sample["resps"] for sample in samples}
            for name, samples in found["samples"].items()
        },
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["output"]).write_text(json.dumps([run(job, each) for each in job["runs"]], default=str))
