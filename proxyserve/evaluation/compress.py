"""What compressing an expert's diff costs: sizes, and how far its law moves on a probe text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxyserve.errors import InvalidRequest
from proxyserve.evaluation.beginning import beginning
from proxyserve.models.formats.build import build_changed, load_changed
from proxyserve.models.formats.diff import Change
from proxyserve.models.loading import Placement, load_model
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

#: A little of everything. A text from the expert's own field says more.
PROBE_TEXT = """\
The library opens at nine and closes at six, except on Sundays. It was built in 1904 by a merchant who had made his
fortune in tea, and its reading room still has the green lamps he ordered from Vienna.

Question: What is the capital of Portugal, and how many people live there?
Answer: Lisbon. About half a million people live in the city itself, and close to three million in the region.

def mean(values):
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

Step 1: Heat the oven to 180 degrees. Step 2: Mix 200 g of flour with 100 g of sugar. Step 3: Add two eggs and stir.

If a train leaves at 14:20 and the journey takes 95 minutes, it arrives at 15:55, because 95 minutes are one hour and
35 minutes. Therefore, the meeting at 16:30 can still be reached on foot.

Dear Ms Alvarez, thank you for your letter of 3 March. We are sorry that the parcel was damaged; a new one is on its
way and should reach you within five working days. Kind regards, Tom.

{"name": "probe", "size": [3, 4], "valid": true, "note": null}
"""

#: What the diff is multiplied by when it is looked for what serves best. The kept entries are a part of the diff, so
#: that often more than 1 does.
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)

_CPU = Placement(torch.device("cpu"), torch.float32)
#: Longest piece of the text, in tokens.
_WINDOW = 512


@dataclass(frozen=True, slots=True)
class Divergences:
    """Mean over the tokens of the probe text, in nats: KL(tuned || untuned), and by scale KL(tuned || untuned + scale *
    change)."""

    tokens: int
    untuned: float
    changed: Mapping[float, float]

    @property
    def best_scale(self) -> float:
        return min(self.changed, key=lambda scale: self.changed[scale])


def measure(
    tuned: Path,
    untuned: Path,
    change: Change,
    text: str,
    scales: Sequence[float] = SCALES,
    progress: Callable[[float], None] = lambda share: None,
) -> Divergences:
    """Read `text` with the tuned model, the untuned one and the changed one at each scale: plain Hugging Face forwards
    in float32 on the CPU, two models in memory at a time. `progress` is told which share is done. Raises LoadError, and
    InvalidRequest for a text without tokens."""
    reference = load_model(tuned, ModelKey("tuned"), _CPU)
    windows = list(_windows(reference.tokenizer, text, min(_WINDOW, reference.context_length)))
    if not windows:
        raise InvalidRequest("The probe text is empty.", param="text")
    tokens = sum(window.shape[1] for window in windows)

    def divergence(model: PreTrainedModel) -> float:
        return sum(_divergence(reference.module, model, window) for window in windows) / tokens

    changed = {}
    for done, scale in enumerate(scales):
        progress(done / (len(scales) + 1))
        state = build_changed(untuned, change, scale=scale)
        changed[scale] = divergence(load_changed(untuned, state, _CPU))
    progress(len(scales) / (len(scales) + 1))
    return Divergences(tokens, divergence(load_model(untuned, ModelKey("untuned"), _CPU).module), changed)


def _windows(tokenizer: Tokenizer, text: str, length: int) -> Iterator[Tensor]:
    """The text in pieces [1, at most `length`] int64. Every position predicts the token after it, so the first piece
    begins with what a text begins after."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids:
        ids = [*beginning(tokenizer), *ids]
    for start in range(0, len(ids), length):
        yield torch.tensor([ids[start : start + length]])


@torch.inference_mode()
def _divergence(reference: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> float:
    """The sum over positions of KL(reference || model) in nats."""
    ours = reference(ids, use_cache=False).logits.double().log_softmax(-1)
    theirs = model(ids, use_cache=False).logits.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum())
