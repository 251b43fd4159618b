"""Kinds of requests, and what each comes to by plain Hugging Face forwards of whole folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.api.presets import parse_fusion
from proxyserve.engine.choice import choice_seed
from proxyserve.engine.submission import Submission
from proxyserve.models.loading import whole_model
from proxyserve_kernels.reference import draw_one
from tests.engine.driver import submission
from tests.experts.contents import World
from tests.fusion import papers
from tests.fusion.papers import Laws


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of request: a fusion object, sampling, and the law that the rule means (over `base`, `small` and
    `EXPERT.tuned`)."""

    fusion: Mapping[str, Any]
    law: Callable[[Laws], Tensor]
    prompt: tuple[int, ...]
    n: int = 1
    seed: int | None = None
    max_tokens: int = 8

    @property
    def experts(self) -> tuple[str, ...]:
        """Those that take part: weight 0 runs nothing and is reported by nobody."""
        return tuple(name for name, weight in self.fusion.get("experts", {}).items() if weight)

    def submission(self, request_id: str, **changed: Any) -> Submission:
        seeded = {"temperature": 0.0} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        return submission(
            request_id,
            self.prompt,
            fusion=parse_fusion(dict(self.fusion)),
            n=self.n,
            **{"max_tokens": self.max_tokens, **seeded, **changed},
        )


def base_kind(prompt: Sequence[int], **fields: Any) -> Kind:
    return Kind({}, lambda laws: laws["base"], tuple(prompt), **fields)


def proxy_kind(weights: Mapping[str, float], prompt: Sequence[int], **fields: Any) -> Kind:
    return Kind(
        {"experts": dict(weights)},
        lambda laws: papers.proxy(
            laws["base"],
            *((weight, laws[f"{name}.tuned"], laws["small"]) for name, weight in weights.items() if weight),
        ),
        tuple(prompt),
        **fields,
    )


def arm_kind(weights: Mapping[str, float], prompt: Sequence[int], **fields: Any) -> Kind:
    return Kind(
        {"rule": "arm", "experts": dict(weights)},
        lambda laws: papers.normalised(
            laws["base"] + sum(weight * laws[f"{name}.tuned"] for name, weight in weights.items())
        ),
        tuple(prompt),
        **fields,
    )


def dynamic_kind(expert: str, prompt: Sequence[int], **fields: Any) -> Kind:
    return Kind(
        {"rule": "dynamic", "experts": {expert: 1}},
        lambda laws: papers.dynamic(
            laws["base"], [(laws[f"{expert}.tuned"], laws["small"])], (1.0,), "both", 2.0
        )[0],
        tuple(prompt),
        **fields,
    )


class References:
    """Tokens by plain forwards of whole folders: one forward per model and token, no cache, nothing of the engine but
    the noise of seeded draws."""

    def __init__(self, world: World, width: int) -> None:
        self._world = world
        self._width = width
        self._models: dict[Path, PreTrainedModel] = {}
        self._laws: dict[tuple[Path, tuple[int, ...]], Tensor] = {}
        self._answers: dict[tuple[Kind, tuple[tuple[str, str], ...], int], list[int]] = {}

    def tokens(self, kind: Kind, contents: Mapping[str, str], index: int = 0) -> list[int]:
        """Of choice `index`, where each expert of the request is the named content."""
        place = (kind, tuple(sorted(contents.items())), index)
        if place not in self._answers:
            self._answers[place] = self._generate(kind, contents, index)
        return self._answers[place]

    def _generate(self, kind: Kind, contents: Mapping[str, str], index: int) -> list[int]:
        folders = {"base": self._world.family.base, "small": self._world.family.untuned}
        folders |= {
            f"{name}.tuned": self._world.contents[content].folder for name, content in contents.items()
        }
        output: list[int] = []
        for _ in range(kind.max_tokens):
            ids = (*kind.prompt, *output)
            law = kind.law({lane: self._law(folder, ids) for lane, folder in folders.items()})
            if kind.seed is None:
                output.append(int(law.argmax()))
            else:
                output.append(draw_one(law, choice_seed(kind.seed, index), len(ids)))
        return output

    @torch.inference_mode()
    def _law(self, folder: Path, ids: tuple[int, ...]) -> Tensor:
        found = self._laws.get((folder, ids))
        if found is None:
            logits = self._model(folder)(torch.tensor([ids]), use_cache=False).logits[0, -1, : self._width]
            found = self._laws[folder, ids] = torch.log_softmax(logits.double(), dim=0)
        return found

    def _model(self, folder: Path) -> PreTrainedModel:
        if folder not in self._models:
            # The server's own loader thread may be making a model as well.
            model = whole_model(
                AutoModelForCausalLM, folder, str(folder), dtype=torch.float32, attn_implementation="eager"
            )
            self._models[folder] = model.eval()
        return self._models[folder]
