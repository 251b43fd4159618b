"""`python -m proxyserve.demo.train --seed 0 --out DIR` makes a demo family from nothing but this package.

Each model is a folder that appears when the model is finished; run the same command again and finished models are
kept, so an interrupted run goes on where it stopped."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from proxyserve.demo import training
from proxyserve.demo.family import FamilyPaths, family_paths
from proxyserve.demo.skills import SKILLS, Skill
from proxyserve.demo.tokenizer import train_tokenizer
from proxyserve.demo.training import Pretraining, Shape, Tuning
from proxyserve.demo.world import World, make_world


@dataclass(frozen=True, slots=True)
class Recipe:
    """How every model of a family is trained."""

    base: Pretraining
    small: Pretraining
    expert: Tuning
    oracle: Tuning
    tokenizer_documents: int = 30_000


#: The recipe of the shipped family.
RECIPE = Recipe(
    base=Pretraining(
        Shape(hidden=192, layers=3, heads=6, intermediate=768, initializer_range=0.05),
        steps=5000,
        learning_rate=2e-3,
        curriculum=(300, 1200),
    ),
    small=Pretraining(
        Shape(hidden=96, layers=3, heads=6, intermediate=256, initializer_range=0.08),
        steps=2000,
        learning_rate=3e-3,
    ),
    expert=Tuning(passes=16, learning_rate=2e-3, replay=0.5),
    oracle=Tuning(passes=16, learning_rate=7e-4, replay=0.3),
)


class FamilyTrainer:
    """Trains what is missing of one family. `seed` decides initialisation and data order, never the world or
    tokenizer."""

    def __init__(self, root: Path, seed: int, recipe: Recipe, progress: Progress) -> None:
        self.paths: FamilyPaths = family_paths(root)
        self.seed = seed
        self.recipe = recipe
        self.world: World = make_world()
        self._progress = progress
        self._tokenizer_folder = root / ".tokenizer"

    def run(self) -> None:
        tokenizer = self._tokenizer()
        base = self._model(
            self.paths.base, self._pretraining(self.recipe.base, tokenizer, 2 * self.seed), tokenizer
        )
        small = self._model(
            self.paths.untuned, self._pretraining(self.recipe.small, tokenizer, 2 * self.seed + 1), tokenizer
        )
        for name, skill in SKILLS.items():
            tuned = self._tuning(self.recipe.expert, small, skill, tokenizer)
            self._model(self.paths.experts[name], tuned, tokenizer, skill)
            oracle = self._tuning(self.recipe.oracle, base, skill, tokenizer)
            self._model(self.paths.oracles[name], oracle, tokenizer, skill)
        shutil.rmtree(self._tokenizer_folder, ignore_errors=True)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        for folder in (self._tokenizer_folder, self.paths.base):
            if folder.is_dir():
                return AutoTokenizer.from_pretrained(folder)
        tokenizer = train_tokenizer(self.world, documents=self.recipe.tokenizer_documents)
        tokenizer.save_pretrained(self._tokenizer_folder)
        return tokenizer

    def _pretraining(
        self, plan: Pretraining, tokenizer: PreTrainedTokenizerFast, seed: int
    ) -> tuple[int, Callable[[training.Progress], LlamaForCausalLM]]:
        return plan.steps, lambda progress: training.pretrain(
            plan, tokenizer, self.world, seed=seed, progress=progress
        )

    def _tuning(
        self, plan: Tuning, model: LlamaForCausalLM, skill: Skill, tokenizer: PreTrainedTokenizerFast
    ) -> tuple[int, Callable[[training.Progress], LlamaForCausalLM]]:
        steps = plan.steps(len(skill.examples(self.world.tuning)))
        return steps, lambda progress: training.tune(
            plan, model, skill, tokenizer, self.world, seed=self.seed, progress=progress
        )

    def _model(
        self,
        folder: Path,
        job: tuple[int, Callable[[training.Progress], LlamaForCausalLM]],
        tokenizer: PreTrainedTokenizerFast,
        skill: Skill | None = None,
    ) -> LlamaForCausalLM:
        """The model of `folder`, trained now unless it is there."""
        if folder.is_dir():
            model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return model.eval()
        steps, train = job
        name = f"{folder.parent.name}/{folder.name}"
        with self._bar(name, steps) as progress:
            model = train(progress)
        _save(folder, model, tokenizer, skill)
        # What is shipped is what was saved: go on from the rounded weights.
        reloaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return reloaded.eval()

    @contextmanager
    def _bar(self, name: str, steps: int) -> Iterator[training.Progress]:
        task = self._progress.add_task(name, total=steps, loss=float("nan"))
        yield lambda step, loss: self._progress.update(task, completed=step, loss=loss)
        if not self._progress.console.is_terminal:
            loss = self._progress.tasks[task].fields["loss"]
            self._progress.console.print(f"{name}: {steps} steps, last loss {loss:.3f}")


def _save(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: Skill | None
) -> None:
    """Write an ordinary Hugging Face folder with bfloat16 weights, complete or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16).save_pretrained(part)
    tokenizer.chat_template = None if skill is None else skill.chat_template
    tokenizer.save_pretrained(part)
    tokenizer.chat_template = None
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m proxyserve.demo.train", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=0, help="initialisation and order of the data (default 0)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the family")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        FamilyTrainer(arguments.out, arguments.seed, RECIPE, progress).run()
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    console.print(f"{arguments.out}: {size / 1e6:.1f} MB, {(perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
