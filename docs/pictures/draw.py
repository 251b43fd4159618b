"""Draws the pictures of docs/concepts.md: `python docs/pictures/draw.py`. A test looks whether they are current.

Each picture brings its own background, and colours for light and dark, so that it can be read on any page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH = 760
_STYLE = """
  .back { fill: #ffffff; stroke: #d0d7de }
  text { fill: #1f2328; font: 14px system-ui, -apple-system, "Segoe UI", sans-serif }
  .small { font-size: 12px; fill: #59636e }
  .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
  .strong { font-weight: 600 }
  .box { fill: #f6f8fa; stroke: #59636e }
  .base { fill: #cfe3f7; stroke: #1b6ca8 } .tuned { fill: #fde1c0; stroke: #b35900 }
  .untuned { fill: #eee3c8; stroke: #8a7433 } .fused { fill: #d6efd8; stroke: #2f7d3b }
  .line { stroke: #59636e; stroke-width: 1.5; fill: none } .tip { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    .back { fill: #151b23; stroke: #3d444d } text { fill: #f0f6fc } .small { fill: #aab4be }
    .box { fill: #212830; stroke: #9198a1 }
    .base { fill: #16405f; stroke: #5aa3d6 } .tuned { fill: #5c3a10; stroke: #e08214 }
    .untuned { fill: #4a4021; stroke: #c3a95a } .fused { fill: #1d4a26; stroke: #5fb86c }
    .line { stroke: #9198a1 } .tip { fill: #9198a1 }
  }
"""


@dataclass
class Picture:
    """An SVG of `WIDTH` by `height`. `title` and `words` are read to those who do not see it."""

    title: str
    words: str
    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, words: Iterable[str] = ()
    ) -> None:
        """A rectangle with centred lines of text, the first one strong."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>'
        )
        lines = list(words)
        top = y + height / 2 - 8.5 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * number, line, "small" if number else "", "middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="line" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">\n<title>{escape(self.title)}</title>\n<desc>{escape(self.words)}</desc>\n'
            f"<style>{_STYLE}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>\n'
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" class="back"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def lanes() -> Picture:
    picture = Picture(
        "The lanes of one request",
        "Four models, each with the request's prompt and the text so far in its own KV blocks. Their scores for the "
        "next "
        "token are combined, one token is drawn, and all four lanes get it.",
        300,
    )
    picture.text(20, 30, 'model="atlas+qa:0.8+guard:0.5"', "code")
    picture.text(218, 58, "the prompt, as this lane renders it", "small")
    picture.text(432, 58, "one shared text", "small")
    rows = (
        ("base", "atlas", "base, large"),
        ("tuned", "qa.tuned", "+ 0.8"),
        ("tuned", "guard.tuned", "+ 0.5"),
        ("untuned", "small", "− 1.3, shared by both"),
    )
    for number, (kind, name, sign) in enumerate(rows):
        y = 72 + 50 * number
        picture.box(20, y, 170, 40, kind, (name, sign))
        for block in range(4):
            picture.box(204 + 48 * block, y + 6, 44, 28, kind)
        for block in range(3):
            picture.box(404 + 48 * block, y + 6, 44, 28, "fused")
        picture.arrow((550, y + 20), (592, y + 20), (592, 146), (618, 146))
    picture.box(622, 112, 118, 68, "fused", ("fuse, draw", "one token"))
    picture.arrow((681, 180), (681, 274), (476, 274), (476, 260))
    picture.text(670, 288, "every lane computes it next", "small", "end")
    return picture


def step() -> Picture:
    picture = Picture(
        "One step, from schedule to stream",
        "Requests are admitted, the scheduler hands out work, each model runs its rows in one forward, one call fuses "
        "and "
        "draws for all requests, and tokens are streamed. Then the next step begins.",
        270,
    )
    picture.box(20, 92, 110, 66, "box", ("admit", "keys, caps, turn"))
    picture.box(160, 92, 120, 66, "box", ("schedule", "who computes", "which tokens"))
    for number, (kind, name, rows) in enumerate(
        (("base", "atlas", "17 tokens"), ("tuned", "qa.tuned", "9 tokens"), ("untuned", "small", "12 tokens"))
    ):
        y = 38 + 62 * number
        picture.box(322, y, 124, 50, kind, (name, rows))
        picture.arrow((280, 125), (300, 125), (300, y + 25), (318, y + 25))
        picture.arrow((446, y + 25), (466, y + 25), (466, 125), (484, 125))
    picture.text(322, 26, "one forward per model, of all requests", "small")
    picture.box(488, 84, 124, 82, "fused", ("fuse and draw", "one call", "for all requests"))
    picture.box(644, 92, 96, 66, "box", ("append", "and stream"))
    picture.arrow((130, 125), (156, 125))
    picture.arrow((612, 125), (640, 125))
    picture.arrow((692, 158), (692, 246), (220, 246), (220, 162))
    picture.text(
        456, 240, "next step: lanes that are behind their text compute what they lack", "small", "middle"
    )
    return picture


def generations() -> Picture:
    picture = Picture(
        "Generations during a swap",
        "Generation 2 of an expert is loaded, verified and warmed while generation 1 serves. Publishing is one moment. "
        "A "
        "request that began before it ends on generation 1, one that begins after it runs on generation 2.",
        268,
    )
    publish = 432
    picture.text(20, 58, "generation 1", "strong")
    picture.box(130, 38, publish - 130, 32, "base", ("published",))
    picture.box(publish, 38, 116, 32, "box", ("draining",))
    picture.box(publish + 116, 38, 192, 32, "untuned", ("stands by for a rollback",))
    picture.text(20, 108, "generation 2", "strong")
    for x, width, name in ((176, 96, "loading"), (272, 84, "verifying"), (356, 76, "warming")):
        picture.box(x, 88, width, 32, "box", (name,))
    picture.box(publish, 88, 308, 32, "fused", ("published",))
    picture.text(20, 166, "request A", "strong")
    picture.box(290, 146, 258, 32, "base", ("runs on generation 1 to its end",))
    picture.text(20, 212, "request B", "strong")
    picture.box(478, 192, 226, 32, "fused", ("runs on generation 2",))
    picture.parts.append(f'<path d="M{publish} 24 V232" class="line" stroke-dasharray="5 4"/>')
    picture.text(publish, 252, "one assignment: new requests get generation 2", "small", "middle")
    picture.text(publish, 18, "swap", "small", "middle")
    return picture


#: The next token after `Task: Which instrument does Kustin play?\nReply:`.
PROMPT = "Task: Which instrument does Kustin play?\nReply:"
TOKENS = (" harp", " The", " She", " bugle", " banjo", " fiddle")


def distribution(laws: Mapping[str, Mapping[str, float]]) -> Picture:
    """`laws`: by `base`, `tuned`, `untuned` and `fused`, the probability of each of `TOKENS`."""
    picture = Picture(
        "What fusion does to one distribution",
        "Probabilities of six next tokens under base, tuned, untuned and fused law. "
        + "; ".join(
            f"{token.strip()}: {laws['base'][token]:.2f} to {laws['fused'][token]:.2f}" for token in TOKENS
        ),
        312,
    )
    picture.text(20, 28, "Task: Which instrument does Kustin play? Reply: …", "code")
    titles = {
        "base": "base atlas: knows it, rambles",
        "tuned": "tuned: one word, no idea which",
        "untuned": "untuned: rambles, no idea",
        "fused": "fused: one word, the right one",
    }
    for number, (kind, title) in enumerate(titles.items()):
        left, top = (20, 400)[number % 2], (56, 188)[number // 2]
        picture.text(left, top, title, "strong")
        for row, token in enumerate(TOKENS):
            y, value = top + 10 + 17 * row, laws[kind][token]
            picture.text(left + 56, y + 11, token.strip(), "code small", "end")
            picture.box(left + 64, y, max(1.0, 330 * value), 13, kind)
            picture.text(left + 70 + max(1.0, 330 * value), y + 11, f"{value:.3f}", "small")
    return picture


def measured() -> dict[str, dict[str, float]]:
    """The laws of the demo family, in float32, by forwards of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from proxyserve.demo.family import family_paths

    family = family_paths()
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    folders = {"base": family.base, "tuned": family.experts["qa"], "untuned": family.untuned}
    scores = {}
    for kind, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            scores[kind] = model(ids).logits[0, -1].log_softmax(-1)
    scores["fused"] = (scores["base"] + scores["tuned"] - scores["untuned"]).log_softmax(-1)
    places = {token: tokenizer(token).input_ids for token in TOKENS}
    assert all(len(place) == 1 for place in places.values())
    return {
        kind: {token: round(float(law[place[0]].exp()), 3) for token, place in places.items()}
        for kind, law in scores.items()
    }


def pictures() -> dict[str, Picture]:
    """By file name."""
    return {
        "lanes.svg": lanes(),
        "step.svg": step(),
        "generations.svg": generations(),
        "distribution.svg": distribution(measured()),
    }


if __name__ == "__main__":
    for name, picture in pictures().items():
        (Path(__file__).parent / name).write_text(picture.svg(), encoding="utf-8")
