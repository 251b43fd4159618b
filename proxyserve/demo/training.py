"""Training loops for models of a few million parameters on one CPU core.

Two things differ from a textbook loop, and both are there for fusion. Label smoothing bounds how sure a model can
be of what does *not* come next: without it the large base puts a token it has never seen after a fact at -14 nats,
the small one at -8, and the difference swamps what the expert says. And half of an expert's tuning rows are
pretraining text (replay), so that tuned and untuned differ in the skill and in nothing else."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxyserve.demo.corpus import document
from proxyserve.demo.skills import Skill
from proxyserve.demo.world import Person, World

#: Called after every step with the number of steps done and the loss (nats).
Progress = Callable[[int, float], None]

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama with tied embeddings. Head size is hidden / heads. The library's default initialisation
    (0.02) is too small at these widths: facts stay at chance level for hundreds of steps."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    initializer_range: float


@dataclass(frozen=True, slots=True)
class Pretraining:
    """`rows` documents per step. The base first meets few people and then more (`curriculum` = steps at which the
    growth begins and ends), which makes it find out early that names have facts."""

    shape: Shape
    steps: int
    learning_rate: float
    rows: int = 16
    curriculum: tuple[int, int] | None = None
    label_smoothing: float = 0.1
    weight_decay: float = 0.05


@dataclass(frozen=True, slots=True)
class Tuning:
    """How often the skill's examples are gone through (`passes`), in steps of `rows` rows of which a share `replay` is
    pretraining text instead. More passes would teach a small model the tuning people by heart, and it would then insist
    on their facts for everybody."""

    passes: float
    learning_rate: float
    replay: float
    rows: int = 32
    label_smoothing: float = 0.1

    def steps(self, examples: int) -> int:
        return math.ceil(self.passes * examples / (self.rows * (1.0 - self.replay)))


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids and from which of them on the loss counts."""

    ids: list[int]
    start: int


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.intermediate,
            initializer_range=shape.initializer_range,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def pretrain(
    plan: Pretraining, tokenizer: PreTrainedTokenizerFast, world: World, *, seed: int, progress: Progress
) -> LlamaForCausalLM:
    """A model that knows the pretraining text. The seed decides initialisation and order of the data."""
    model = new_model(plan.shape, tokenizer, seed)
    rows = _document_batches(plan, tokenizer, world, random.Random(seed))
    _train(model, rows, plan.steps, plan.learning_rate, plan.weight_decay, plan.label_smoothing, progress)
    return model


def tune(
    plan: Tuning,
    model: LlamaForCausalLM,
    skill: Skill,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    seed: int,
    progress: Progress,
) -> LlamaForCausalLM:
    """A copy of `model` tuned on the skill's examples about the tuning people; the loss counts on answers only."""
    tuned = copy.deepcopy(model)
    rng = random.Random(f"{seed} {skill.name}")
    end = int(tokenizer.eos_token_id)
    examples = []
    for example in skill.examples(world.tuning):
        prompt = tokenizer.encode(example.prompt)
        examples.append(Row([*prompt, *tokenizer.encode(example.answer), end], len(prompt)))

    def batches() -> Iterator[list[Row]]:
        while True:
            yield [
                _document_row(tokenizer, rng, world.people)
                if rng.random() < plan.replay
                else rng.choice(examples)
                for _ in range(plan.rows)
            ]

    _train(
        tuned, batches(), plan.steps(len(examples)), plan.learning_rate, 0.0, plan.label_smoothing, progress
    )
    return tuned


def _document_row(tokenizer: PreTrainedTokenizerFast, rng: random.Random, people: Sequence[Person]) -> Row:
    return Row([*tokenizer.encode(document(rng, people)), int(tokenizer.eos_token_id)], 1)


def _document_batches(
    plan: Pretraining, tokenizer: PreTrainedTokenizerFast, world: World, rng: random.Random
) -> Iterator[list[Row]]:
    """Batches of documents of similar length (less padding), in random order."""
    people = list(world.people)
    rng.shuffle(people)
    step, group = 0, 32
    while True:
        known = len(people)
        if plan.curriculum is not None:
            begin, finish = plan.curriculum
            share = min(1.0, max(0.0, (step - begin) / (finish - begin)))
            known = int(16 + share * (len(people) - 16))
        rows = [_document_row(tokenizer, rng, people[:known]) for _ in range(plan.rows * group)]
        rows.sort(key=lambda row: len(row.ids))
        batches = [rows[start : start + plan.rows] for start in range(0, len(rows), plan.rows)]
        rng.shuffle(batches)
        yield from batches
        step += group


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[list[Row]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    label_smoothing: float,
    progress: Progress,
) -> None:
    """AdamW with 30 warm-up steps and linear decay to 0, float32 weights, bfloat16 arithmetic."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 30) * (1.0 - step / steps)
        ids, targets = _pad(next(batches))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            targets[:, 1:].flatten(),
            ignore_index=_IGNORED,
            label_smoothing=label_smoothing,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, loss.item())
    model.eval()


def _pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Ids and targets, both int64 [rows, longest]; targets are `_IGNORED` where the loss does not count. Padding
    comes after the text, where causal attention never looks back at it."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), _IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        targets[index, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
    return ids, targets
