"""`proxyserve calibrate`: which weight an expert should have."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from proxyserve.cli import options
from proxyserve.cli.files import check_writable, read_text
from proxyserve.cli.printing import AsJson, print_json
from proxyserve.demo.corpus import document
from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import make_world
from proxyserve.errors import ProxyserveError
from proxyserve.fusion.calibration import Calibration, write_calibrations

if TYPE_CHECKING:
    from proxyserve.evaluation.calibrate import Scored
    from proxyserve.models.model_set import ModelSet
    from proxyserve.text.tokenizer import Tokenizer

#: Documents of general text for the demo family, drawn afresh. They are made like the training text, of the same facts,
#: so that a few of one sentence (4 of these 60 at the recipe's seed 0) were in it word for word.
_DEMO_DOCUMENTS, _DEMO_SEED = 60, 71
_DEMO_PEOPLE = 10

#: Longest piece of general text, in tokens.
_WINDOW = 512

Task = list[tuple[str, str]]


def calibrate_command(
    base: Annotated[
        Path | None, typer.Argument(metavar="[BASE]", help="Folder of the base; default: the demo family.")
    ] = None,
    expert: options.ExpertOption = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="[NAME=]FILE",
            help='Lines {"prompt": ..., "answer": ...}; the stop token is scored too. One per expert.',
        ),
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option("--general", exists=True, dir_okay=False, help="Text that should not get worse."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", min=0.0, help="Rise of the loss on general text that is allowed: 0.01 is 1 %."
        ),
    ] = 0.01,
    max_weight: Annotated[float, typer.Option("--max-weight", min=0.0, help="Largest weight to try.")] = 2.0,
    step: Annotated[float, typer.Option("--step", min=0.0, help="Distance of the weights.")] = 0.1,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the curves for `proxyserve serve --calibration`.")
    ] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write the curves as PNG.")] = None,
    as_json: AsJson = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 1,
) -> None:
    """Losses of rule `proxy` by weight, on each expert's task and on general text, and the weight to use: the one that
    gains most on the task while general text gets worse by no more than the budget."""
    import torch

    from proxyserve.evaluation.calibrate import calibrate, weight_steps
    from proxyserve.evaluation.likelihood import Likelihood
    from proxyserve.fusion.catalog import Catalog

    if threads is not None:
        torch.set_num_threads(threads)
    weights = weight_steps(max_weight, step)
    check_writable(save, "--save")
    check_writable(chart, "--chart")
    calibrations: dict[str, Calibration] = {}
    with Console(stderr=True).status("loading") as status:
        models = _load(base, expert, dtype, device)
        likelihood = Likelihood(Catalog(models))
        tasks = _tasks(models, task, _demo_tasks(expert) if base is None else {})
        texts = (
            _general(models, general) if base is not None or general is not None else _demo_general(models)
        )
        for name, examples in tasks.items():
            scored = [_scored(models.base.tokenizer, *example) for example in examples]
            calibrations[name] = calibrate(likelihood, name, scored, texts, weights, status.update)
    if as_json:
        print_json(_as_json(calibrations, budget))
    else:
        for calibration in calibrations.values():
            _show(calibration, budget)
    if save is not None:
        write_calibrations(save, calibrations)
    if chart is not None:
        from proxyserve.evaluation.calibration_chart import save_calibration_chart

        save_calibration_chart(list(calibrations.values()), budget, chart)


def _load(base: Path | None, experts: list[str] | None, dtype: str, device: str) -> ModelSet:
    from proxyserve.models.family import ExpertSource, load_family
    from proxyserve.models.loading import choose_placement

    placement = choose_placement(device, dtype)
    if base is None:
        family = family_paths()
        sources = [ExpertSource(name, family.experts[name], family.untuned) for name in _demo_names(experts)]
        return load_family(family.base, sources, placement=placement)
    if not experts:
        raise typer.BadParameter("name the experts to calibrate", param_hint="--expert")
    return load_family(base, [options.parse_expert(text) for text in experts], placement=placement)


def _demo_names(experts: list[str] | None) -> list[str]:
    """The experts of the demo family that are asked for, by name alone; all of them by default."""
    for name in experts or ():
        if name not in SKILLS:
            raise typer.BadParameter(
                f"the demo family has no expert '{name}', but {', '.join(SKILLS)}; for models of your own name BASE",
                param_hint="--expert",
            )
    return experts or list(SKILLS)


def _tasks(models: ModelSet, given: Sequence[str] | None, default: Mapping[str, Task]) -> dict[str, Task]:
    """Examples by expert, those of `default` where none are given. A file without a name is for the only expert."""
    tasks = dict(default)
    named: set[str] = set()
    for entry in given or ():
        name, equals, file = entry.partition("=")
        if not equals:
            if len(models.experts) != 1:
                raise typer.BadParameter(f"'{entry}': say whose task it is, EXPERT=FILE", param_hint="--task")
            name, file = next(iter(models.experts)), entry
        if name not in models.experts:
            raise typer.BadParameter(f"there is no expert '{name}'", param_hint="--task")
        if name in named:
            raise typer.BadParameter(f"expert '{name}' has two tasks; join the files", param_hint="--task")
        named.add(name)
        tasks[name] = _read_task(Path(file))
    for name in models.experts:
        if name not in tasks:
            raise typer.BadParameter(f"expert '{name}' has no task: --task {name}=FILE", param_hint="--task")
    return tasks


def _read_task(file: Path) -> Task:
    examples: Task = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], entry["answer"]
        except (ValueError, TypeError, KeyError):
            prompt = answer = None
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt):
            raise ProxyserveError(f'{file}:{number} must be {{"prompt": text, "answer": text}}')
        examples.append((prompt, answer))
    return examples


def _demo_tasks(experts: list[str] | None) -> dict[str, Task]:
    """Questions about people that the test does not ask about."""
    people = make_world().validation[:_DEMO_PEOPLE]
    names = _demo_names(experts)
    return {
        name: [(example.prompt, example.answer) for example in SKILLS[name].examples(people)]
        for name in names
    }


def _scored(tokenizer: Tokenizer, prompt: str, answer: str) -> Scored:
    from proxyserve.evaluation.calibrate import Scored

    stop = sorted(tokenizer.eos_ids)[:1]
    text = (*tokenizer.encode(answer, add_special_tokens=False), *stop)
    return Scored(tuple(tokenizer.encode(prompt)), text)


def _general(models: ModelSet, file: Path | None) -> list[Scored]:
    if file is None:
        raise typer.BadParameter("give a text that should not get worse", param_hint="--general")
    return _windows(models, [read_text(file)])


def _demo_general(models: ModelSet) -> list[Scored]:
    world, rng = make_world(), random.Random(_DEMO_SEED)
    return _windows(models, [document(rng, world.people) for _ in range(_DEMO_DOCUMENTS)])


def _windows(models: ModelSet, texts: Sequence[str]) -> list[Scored]:
    from proxyserve.evaluation.beginning import beginning
    from proxyserve.evaluation.calibrate import windows

    tokenizer = models.base.tokenizer
    first = beginning(tokenizer)[-1]
    length = min(_WINDOW, min(model.context_length for model in models.models.values()) - 1)
    pieces = (windows(tokenizer.encode(text, add_special_tokens=False), first, length) for text in texts)
    return [piece for own in pieces for piece in own]


def _show(calibration: Calibration, budget: float) -> None:
    base = calibration.points[0]
    best, largest = calibration.best_within(budget), calibration.largest_within(budget)
    table = Table(title=f"{calibration.expert}: loss in nats per token", title_justify="left")
    for column in ("weight", "task", "general", "general, relative"):
        table.add_column(column, justify="right")
    table.add_column("task loss")
    most = max(point.task_loss for point in calibration.points)
    for point in calibration.points:
        relative = point.general_loss / base.general_loss - 1.0
        table.add_row(
            f"{point.weight:g}",
            f"{point.task_loss:.4f}",
            f"{point.general_loss:.4f}",
            f"{relative:+.2%}",
            "█" * round(24 * point.task_loss / most) if most > 0 else "",
            style="bold" if point.weight == best else "dim" if relative > budget else "",
        )
    console = Console()
    console.print(table)
    console.print(
        f"gains most within {budget:.2%}: {best:g}; largest within it (rule edit): {largest:g}",
        highlight=False,
    )
    fusion = json.dumps({"rule": "proxy", "experts": {calibration.expert: best}})
    console.print(f"--preset '{calibration.expert}-calibrated={fusion}'", highlight=False, soft_wrap=True)


def _as_json(calibrations: Mapping[str, Calibration], budget: float) -> dict[str, Any]:
    return {
        "budget": budget,
        "experts": {
            name: {
                "best": found.best_within(budget),
                "largest": found.largest_within(budget),
                "preset": {"rule": "proxy", "experts": {name: found.best_within(budget)}},
                "points": [
                    {"weight": p.weight, "task_loss": p.task_loss, "general_loss": p.general_loss}
                    for p in found.points
                ],
            }
            for name, found in calibrations.items()
        },
    }
