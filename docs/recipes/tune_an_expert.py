"""Tune a LoRA adapter of a small model on a task file, and measure a server's models on held-out questions.

    python tune_an_expert.py tune card/train.jsonl OUT --small FOLDER
    python tune_an_expert.py measure card/held_out.jsonl --model atlas --model atlas+card

A task file has one JSON object per line: {"prompt": ..., "answer": ...}. `tune` needs torch, transformers and peft;
`measure` needs the `openai` package and a running server.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path


def read_task(path: Path) -> list[tuple[str, str]]:
    """Prompts with their right answers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(each["prompt"], each["answer"]) for each in map(json.loads, lines)]


def tune(
    task: Path,
    out: Path,
    small: Path,
    *,
    passes: float = 8.0,
    rank: int = 16,
    learning_rate: float = 3e-3,
    rows: int = 16,
    seed: int = 0,
) -> None:
    """Write a PEFT adapter of the model in folder `small` to `out`, tuned on the answers of `task`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(small)
    end = tokenizer.eos_token_id
    examples = []
    for prompt, answer in read_task(task):
        ids = tokenizer(prompt).input_ids
        # The end of the text is part of the answer: an expert that is never shown it never stops.
        examples.append((ids, [*tokenizer(answer, add_special_tokens=False).input_ids, end]))

    # Only low-rank sums on linear layers: what a server adds as rows of its small model's forward.
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), adapter)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    steps = math.ceil(passes * len(examples) / rows)
    batches = _batches(examples, rows, random.Random(seed))
    for step in range(steps):
        batch = next(batches)
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.full((len(batch), longest), end)
        wanted = torch.full((len(batch), longest), -100)  # the loss counts on answers only
        for row, (before, after) in enumerate(batch):
            length = len(before) + len(after)
            ids[row, :length] = torch.tensor([*before, *after])
            wanted[row, len(before) : length] = torch.tensor(after)
        logits = model(ids).logits[:, :-1]
        # Smoothing bounds how sure the expert can be of what does not come. Fusion multiplies by its law over the
        # untuned one's, so that a token that it has ruled out without need is lost to the large model as well.
        loss = cross_entropy(
            logits.flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - (step + 1) / steps)
    model.save_pretrained(str(out))
    print(f"{steps} steps on {len(examples)} examples, last loss {loss.item():.2f}; adapter in {out}")


def _batches(
    examples: list[tuple[list[int], list[int]]], rows: int, order: random.Random
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """`rows` examples at a time, all of them in a new order before any comes again."""
    waiting: list[tuple[list[int], list[int]]] = []
    while True:
        while len(waiting) < rows:
            waiting += order.sample(examples, len(examples))
        yield [waiting.pop(0) for _ in range(rows)]


def measure(task: Path, models: list[str], url: str, key: str) -> dict[str, float]:
    """Print, and return by model, how many answers are right as a whole, their end included; greedy."""
    from openai import OpenAI

    questions = read_task(task)
    shares = {}
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        for model in models:
            reply = client.completions.create(
                model=model, prompt=[prompt for prompt, _ in questions], temperature=0, max_tokens=40
            )
            right = sum(
                choice.text == answer and choice.finish_reason == "stop"
                for choice, (_, answer) in zip(reply.choices, questions, strict=True)
            )
            shares[model] = right / len(questions)
            print(f"{model}: {right} of {len(questions)} right")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tuning = commands.add_parser("tune")
    tuning.add_argument("task", type=Path)
    tuning.add_argument("out", type=Path)
    tuning.add_argument("--small", type=Path, required=True, help="folder of the untuned model")
    tuning.add_argument("--passes", type=float, default=8.0, help="how often each example is seen")
    tuning.add_argument("--rank", type=int, default=16)
    tuning.add_argument("--learning-rate", type=float, default=3e-3)
    tuning.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure")
    measuring.add_argument("task", type=Path)
    measuring.add_argument("--model", action="append", required=True)
    measuring.add_argument("--url", default=os.environ.get("PROXYSERVE_URL", "http://127.0.0.1:8000"))
    measuring.add_argument("--key", default="none")
    given = parser.parse_args()
    if given.command == "tune":
        tune(
            given.task,
            given.out,
            given.small,
            passes=given.passes,
            rank=given.rank,
            learning_rate=given.learning_rate,
            seed=given.seed,
        )
    else:
        measure(given.task, given.model, given.url, given.key)


if __name__ == "__main__":
    main()
