"""What a conversation in a terminal consists of: who is asked, with which fusion, and what was said."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from proxyserve.errors import ProxyserveError

#: Rules that name their models in parameters of their own.
_WITHOUT_EXPERTS = frozenset({"guidance", "mixture", "formula"})
#: Fields of a request that the conversation itself decides on.
_OWN_FIELDS = frozenset({"model", "messages", "fusion", "stream", "stream_options", "n", "tools"})

Message = dict[str, str]


class CommandError(ProxyserveError):
    """A command that cannot be carried out; the message says what to type instead."""


@dataclass(slots=True)
class Conversation:
    """`base` is the name of the server's base. `model` is asked for by name, unless there is a `rule` with
    `parameters` of its own: then it names the experts and their weights alone. `sampling` are further fields of
    requests. `messages` alternate between user and assistant."""

    base: str
    model: str
    rule: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def choose(self, model: str) -> None:
        """Any name that the server knows; a rule of one's own ends."""
        self.model, self.rule, self.parameters = model, None, {}

    @property
    def experts(self) -> dict[str, float]:
        """With their weights. Raises CommandError for a preset, which has its own."""
        base, *parts = self.model.split("+")
        if base != self.base:
            raise CommandError(
                f"{self.model} is a preset and has its experts and weights in it; /model {self.base} leaves it."
            )
        weights: dict[str, float] = {}
        for part in parts:
            name, colon, weight = part.partition(":")
            weights[name] = number(weight) if colon else 1.0
        return weights

    def weigh(self, expert: str, weight: float | None) -> None:
        """None takes the expert away. Raises CommandError."""
        experts = self.experts
        if weight is None and expert not in experts:
            raise CommandError(f"{expert} takes no part; there {_listed(list(experts))}.")
        if weight is None:
            del experts[expert]
        else:
            experts[expert] = weight
        named = (name if value == 1.0 else f"{name}:{value!r}" for name, value in experts.items())
        self.model = "+".join([self.base, *named])

    def use_rule(self, rule: str, parameters: dict[str, Any]) -> None:
        """`proxy` without parameters is what names of models mean, and so no rule of one's own. Raises CommandError."""
        _ = self.experts
        self.rule, self.parameters = (None, {}) if rule == "proxy" and not parameters else (rule, parameters)

    def sample(self, name: str, value: Any) -> None:
        """None goes back to the server's default. Raises CommandError."""
        if name in _OWN_FIELDS:
            raise CommandError(f"{name} is not set like this; see /help.")
        self.sampling.pop(name, None)
        if value is not None:
            self.sampling[name] = value

    @property
    def title(self) -> str:
        """Who answers, in short."""
        if self.rule is None:
            return self.model
        more = "".join(f" {name}={json.dumps(value)}" for name, value in self.parameters.items())
        return f"{self.base if self.rule in _WITHOUT_EXPERTS else self.model} {self.rule}{more}"

    def request(self, user: str, *, explain: int = 0) -> dict[str, Any]:
        """The body that asks for an answer to `user`."""
        fusion: dict[str, Any] = {}
        if self.rule is not None:
            fusion = {"rule": self.rule, **self.parameters}
            if self.rule not in _WITHOUT_EXPERTS:
                fusion["experts"] = self.experts
        if explain:
            fusion["explain"] = explain
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {
            "model": self.model if self.rule is None else self.base,
            "messages": [*system, *self.messages, {"role": "user", "content": user}],
            **({"fusion": fusion} if fusion else {}),
            **self.sampling,
        }

    def said(self, user: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    def undo(self) -> str:
        """Take the last exchange back; returns what the user had said. Raises CommandError."""
        if not self.messages:
            raise CommandError("Nothing has been said yet.")
        user, _ = self.messages[-2:]
        del self.messages[-2:]
        return user["content"]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "rule": self.rule,
            "parameters": self.parameters,
            "system": self.system,
            "sampling": self.sampling,
            "messages": self.messages,
        }

    def load(self, value: Any) -> None:
        """What `as_json` gave. Raises CommandError, with nothing changed, for anything else."""
        try:
            model, rule, system = value["model"], value["rule"], value["system"]
            parameters, sampling = dict(value["parameters"]), dict(value["sampling"])
            messages = [{"role": each["role"], "content": each["content"]} for each in value["messages"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"That is no conversation that /save has written: {error}") from error
        texts = [model, *(each["content"] for each in messages)]
        roles = [each["role"] for each in messages]
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(text is None or isinstance(text, str) for text in (rule, system))
            or roles != ["user", "assistant"] * (len(roles) // 2)
        ):
            raise CommandError("That is no conversation that /save has written.")
        self.model, self.rule, self.parameters = model, rule, parameters
        self.system, self.sampling, self.messages = system, sampling, messages


def number(text: str) -> float:
    """Raises CommandError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise CommandError(f"'{text}' is no number.")
    return value


def parse_value(text: str) -> Any:
    """As JSON where it is some, else the text itself: `1.5`, `true`, `ray`."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _listed(names: list[str]) -> str:
    return f"are {', '.join(names)}" if names else "are no experts now"
