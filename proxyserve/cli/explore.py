"""`proxyserve explore`: texts that show what the tuning of an expert added."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from proxyserve.cli import options
from proxyserve.cli.files import check_writable
from proxyserve.cli.printing import AsJson, print_json
from proxyserve.demo.family import family_paths

if TYPE_CHECKING:
    from proxyserve.models.family import ExpertSource

_LEARNING_RATE = 1e-4


def explore_command(
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="Name of the expert to look into.")],
    tuned: Annotated[
        Path | None, typer.Option("--tuned", help="Folder of its tuned model; default: the demo family's.")
    ] = None,
    untuned: Annotated[Path | None, typer.Option("--untuned", help="Folder of its untuned model.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help="Beginning of every text; default: the beginning- or end-of-text token."
        ),
    ] = None,
    texts: Annotated[int, typer.Option("--texts", min=1, help="How many texts.")] = 10,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest text, in tokens.")] = 48,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the best token.")
    ] = 1.0,
    gamma: Annotated[float, typer.Option("--gamma", help="Weight of the untuned model.")] = 1.0,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Share of the tuned model's best probability that a token needs.")
    ] = 0.1,
    iterative: Annotated[
        bool, typer.Option("--iterative", help="The untuned model learns from each text before the next.")
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Of --iterative, one step per text; default: 0.0001."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Suppress the end of the text, as the paper does.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write texts and numbers as JSON lines, as they come.")
    ] = None,
    as_json: AsJson = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 1,
) -> None:
    """Contrastive generative exploration: draw texts where the tuned model is likelier than its untuned twin.

    Each text comes with its mean contrast, log p_tuned - log p_untuned in nats per token. With --iterative the untuned
    model (a copy in memory) takes one gradient step on each text, so that the next shows something else.
    """
    import torch

    from proxyserve.evaluation.beginning import beginning
    from proxyserve.evaluation.explore import ExploreSettings, explore
    from proxyserve.models.family import load_family
    from proxyserve.models.loading import choose_placement

    if threads is not None:
        torch.set_num_threads(threads)
    if learning_rate is not None and not iterative:
        raise typer.BadParameter("only --iterative learns; give it too", param_hint="--learning-rate")
    if learning_rate is not None and not 0.0 < learning_rate < math.inf:
        raise typer.BadParameter("must be above 0", param_hint="--learning-rate")
    check_writable(save, "--save")
    console = Console(stderr=True)
    base, source = _source(expert, tuned, untuned)
    with console.status("loading") as status:
        placement = choose_placement(device, dtype)
        models = load_family(base, [source], placement=placement, progress=status.update)
    found = models.expert(expert)
    tokenizer = found.tuned.tokenizer
    start = tokenizer.encode(prompt) if prompt is not None else beginning(tokenizer)
    settings = ExploreSettings(
        texts=texts,
        max_tokens=max_tokens,
        temperature=temperature,
        gamma=gamma,
        alpha=alpha,
        seed=seed,
        learning_rate=(learning_rate or _LEARNING_RATE) if iterative else None,
        ignore_eos=ignore_eos,
    )
    if save is not None:
        save.write_text("", encoding="utf-8")
    findings = []
    for number, finding in enumerate(explore(found, start, settings), 1):
        current = f", {finding.current:+.2f} after learning" if iterative else ""
        head = f"{number:3} {finding.contrast:+.2f} nats per token{current}"
        findings.append(asdict(finding))
        if not as_json:
            Console().print(Text.assemble((head, "bold"), "  ", repr(finding.text)), soft_wrap=True)
        if save is not None:  # as they come: an exploration that is interrupted keeps what it found
            with save.open("a", encoding="utf-8") as file:
                file.write(json.dumps(findings[-1]) + "\n")
    if as_json:
        print_json({"expert": expert, "texts": findings})


def _source(expert: str, tuned: Path | None, untuned: Path | None) -> tuple[Path, ExpertSource]:
    """Where the models are. The base takes no part; the untuned model stands in for it."""
    from proxyserve.models.family import ExpertSource

    if (tuned is None) != (untuned is None):
        raise typer.BadParameter("give both --tuned and --untuned, or neither for the demo family")
    if tuned is not None and untuned is not None:
        return untuned, ExpertSource(expert, tuned, untuned)
    family = family_paths()
    if expert not in family.experts:
        known = ", ".join(family.experts)
        raise typer.BadParameter(
            f"the demo family has no expert '{expert}', but {known}; or give --tuned and --untuned"
        )
    return family.untuned, ExpertSource(expert, family.experts[expert], family.untuned)
