"""A conversation in a terminal: reads lines, streams answers, carries out commands. Nothing that goes wrong with one
answer ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from proxyserve.cli.chat_answer import Answer, Piece
from proxyserve.cli.chat_state import CommandError, Conversation, number, parse_value
from proxyserve.cli.connection import Connection
from proxyserve.cli.exits import Refused
from proxyserve.cli.explained import coloured, report
from proxyserve.cli.files import read_text
from proxyserve.cli.line_editor import LineEditor
from proxyserve.errors import ProxyserveError

#: Likeliest tokens per law that explanations ask for; the terminal shows the push alone.
_EXPLAIN = 1

_BOLD = "\x1b[1m"


def harmless(text: str) -> str:
    """Without characters that could make a terminal do something: of the control characters only line feeds and
    tabs stay, and none that turns the direction of a line around."""
    return "".join(char if char in "\n\t" or not _is_control(char) else "\ufffd" for char in text)


def _is_control(char: str) -> bool:
    turning = "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
    return turning or char < " " or "\x7f" <= char <= "\x9f"


@dataclass(frozen=True, slots=True)
class Command:
    usage: str
    help: str
    run: Callable[[Session, str], None]


class Session:
    """`known` are the models that the server lists."""

    def __init__(
        self,
        server: Connection,
        talk: Conversation,
        known: Sequence[str],
        console: Console,
        *,
        history: Path | None,
        timeout: float,
    ) -> None:
        self.server = server
        self.talk = talk
        self.known = known
        self.console = console
        self.explain = False
        self._timeout = timeout
        self._editor = LineEditor(history, self._words)
        #: What was asked and has no answer, because something went wrong.
        self._unanswered: str | None = None
        self._last = Answer()

    def run(self) -> None:
        """Until Ctrl-D, `/quit` or a second Ctrl-C."""
        self._tell(f"{self.server.url}: {', '.join(self.known)}. /help lists the commands; Ctrl-D leaves.")
        stopped = False
        while True:
            try:
                style = _BOLD if self.console.color_system else ""
                line = self._editor.read(f"{self.talk.title}> ", style=style).strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
                if stopped:
                    return
                stopped = True
                self._tell("Ctrl-C again leaves, and so does Ctrl-D.")
                continue
            stopped = False
            if not line:
                continue
            self._editor.remember(line)
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                else:
                    stopped = self._say(line.removeprefix("/") if line.startswith("//") else line)
            except ProxyserveError as error:
                self._complain(error)
            except KeyboardInterrupt:
                self.console.print()
                stopped = True

    # Answers ---------------------------------------------------------------------------------------------------

    def _say(self, user: str) -> bool:
        """Ask and show the answer. Returns whether Ctrl-C stopped it; what had come of it then stays said. Raises
        Refused and Unreachable."""
        body = self.talk.request(user, explain=_EXPLAIN if self.explain else 0)
        answer = self._last = Answer()
        self._unanswered = user
        stopped = False
        try:
            with closing(answer.pieces(self.server, body, timeout=self._timeout)) as pieces:
                for piece in pieces:
                    self._show(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            if answer.first is not None or stopped:
                self.console.print()
        if answer.text or not stopped:
            self.talk.said(user, answer.text)
            self._unanswered = None
        self._tell(
            "stopped" + ("" if answer.text else "; /retry asks again") if stopped else answer.summary()
        )
        return stopped

    def _show(self, piece: Piece) -> None:
        if piece.reasoning:
            self._write(Text(harmless(piece.reasoning), style="dim italic"))
        if not piece.text:
            return
        entries = piece.explained
        if entries and "".join(entry["token"] for entry in entries) == piece.text:
            for entry in entries:
                self._write(coloured({**entry, "token": harmless(entry["token"])}))
        elif entries:  # some tokens are parts of a character: the piece as a whole shows the strongest push
            strongest = max(entries, key=lambda entry: abs(sum(entry["push"].values())))
            self._write(coloured({**strongest, "token": harmless(piece.text)}))
        else:
            self._write(Text(harmless(piece.text)))

    def _write(self, text: Text) -> None:
        self.console.print(text, end="", soft_wrap=True, highlight=False)

    def _tell(self, text: str) -> None:
        self.console.print(Text(harmless(text), style="dim"), soft_wrap=True, highlight=False)

    def _complain(self, error: ProxyserveError) -> None:
        parts = [error.message]
        if isinstance(error, Refused):
            if error.param is not None and error.param not in error.message:
                parts.append(f"(field {error.param})")
            if error.retry_after is not None:
                parts.append(f"Try again in {error.retry_after:.0f} s:")
        if self._unanswered is not None and not isinstance(error, CommandError):
            parts.append("/retry asks again.")
        line = Text.assemble(("error: ", "bold red"), harmless(" ".join(parts)))
        self.console.print(line, soft_wrap=True, highlight=False)

    # Commands --------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        """Raises ProxyserveError."""
        name, _, rest = line.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise CommandError(f"There is no command {name}; /help lists them. (// begins a text with /.)")
        command.run(self, rest.strip())

    def _words(self, before: str, begun: str) -> Sequence[str]:
        if not before:
            return [*COMMANDS, "/quit"]
        match before.split()[0]:
            case "/model":
                return self.known
            case "/weight" | "/expert":
                return [name.split("+", 1)[1] for name in self.known if "+" in name]
            case "/help":
                return list(COMMANDS)
        return ()

    def choose(self, rest: str) -> None:
        if not rest:
            self.known = self.server.models()
            self._tell(f"{self.talk.title} answers; there are {', '.join(self.known)}")
            return
        self._look_up(rest)
        self.talk.choose(rest)

    def weigh(self, rest: str) -> None:
        match rest.split():
            case [name, weight]:
                self._change(name, number(weight))
            case _:
                raise CommandError("Write /weight NAME VALUE, /weight qa 0.8 say.")

    def expert(self, rest: str) -> None:
        match rest.split():
            case []:
                experts = self.talk.experts
                shown = ", ".join(f"{name} {weight:g}" for name, weight in experts.items())
                there = self._words("/expert ", "")
                self._tell(f"{shown or 'none'}; there are {', '.join(there) or 'none'}")
            case [name] if name.startswith("-"):
                self._change(name[1:], None)
            case [name]:
                self._change(name, 1.0)
            case _:
                raise CommandError("Write /expert NAME to add one, /expert -NAME to take it away.")

    def _change(self, name: str, weight: float | None) -> None:
        before = self.talk.model
        self.talk.weigh(name, weight)
        try:
            self._look_up(self.talk.model)
        except ProxyserveError:
            self.talk.model = before
            raise

    def _look_up(self, model: str) -> None:
        """Raises Refused for what the server does not have."""
        self.server.call("GET", f"/v1/models/{_in_url(model)}")

    def use_rule(self, rest: str) -> None:
        if not rest:
            raise CommandError(
                "Write /rule NAME K=V ..., /rule dynamic max_weight=1.5 say; /rule proxy ends it."
            )
        rule, _, given = rest.partition(" ")
        parameters: dict[str, Any] = {}
        for pair in _pairs(given):
            name, equals, value = pair.partition("=")
            if not (name and equals):
                raise CommandError(f"'{pair}' is not of the form NAME=VALUE.")
            parameters[name] = parse_value(value)
        self.talk.use_rule(rule, parameters)

    def sample(self, rest: str) -> None:
        name, equals, value = rest.partition("=")
        if not rest:
            self._tell(json.dumps(self.talk.sampling) if self.talk.sampling else "the server's defaults")
        elif not equals:
            raise CommandError("Write /set NAME=VALUE, /set temperature=0.7 say; nothing after = ends it.")
        else:
            self.talk.sample(name.strip(), parse_value(value.strip()) if value.strip() else None)

    def toggle_explain(self, rest: str) -> None:
        if rest == "table":
            if not self._last.explained:
                raise CommandError("The last answer was not explained: /explain, then ask again.")
            entries = [{**entry, "token": harmless(entry["token"])} for entry in self._last.explained]
            self.console.print(report(entries))
            return
        if rest not in ("", "on", "off"):
            raise CommandError("Write /explain, /explain off or /explain table.")
        self.explain = rest == "on" if rest else not self.explain
        colours = "green tokens were pushed up, red ones down, underlined ones are flips; /explain table has numbers"
        self._tell(colours if self.explain else "explanations are off")

    def system(self, rest: str) -> None:
        self.talk.system = rest or None
        self._tell("the conversation begins with it from now on" if rest else "no system message")

    def undo(self, rest: str) -> None:
        self._tell(f"taken back: {self.talk.undo()}")

    def retry(self, rest: str) -> None:
        self._say(self.talk.undo() if self._unanswered is None else self._unanswered)

    def clear(self, rest: str) -> None:
        self.talk.messages.clear()
        self._unanswered = None
        self._tell("a new conversation")

    def save(self, rest: str) -> None:
        file = _file(rest, "/save")
        text = json.dumps(self.talk.as_json(), indent=2, ensure_ascii=False) + "\n"
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{file} cannot be written: {error.strerror}") from error
        self._tell(f"{len(self.talk.messages)} messages are in {file}")

    def load(self, rest: str) -> None:
        file = _file(rest, "/load")
        self.talk.load(parse_value(read_text(file)))
        self._unanswered = None
        for message in self.talk.messages:
            who = "> " if message["role"] == "user" else ""
            self.console.print(Text(who + harmless(message["content"])), soft_wrap=True, highlight=False)

    def help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            if rest in ("", name, name[1:]):
                left = f"{name} {command.usage}".ljust(26)
                self.console.print(Text.assemble((left, "bold"), command.help), highlight=False)
        if not rest:
            self.console.print(
                Text.assemble(("/quit".ljust(26), "bold"), "Leave; Ctrl-D does too. Ctrl-C stops an answer.")
            )


def _pairs(given: str) -> list[str]:
    """Cut at the spaces before `NAME=`: values may have spaces themselves."""
    pairs: list[str] = []
    for word in given.split():
        name, equals, _ = word.partition("=")
        if pairs and not (equals and name.isidentifier()):
            pairs[-1] += f" {word}"
        else:
            pairs.append(word)
    return pairs


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise CommandError(f"Write {command} FILE.")
    return Path(rest).expanduser()


def _in_url(model: str) -> str:
    """What is no name, `a/b` say, is refused by the server and must not name another route."""
    return quote(model, safe="+:")


COMMANDS: Mapping[str, Command] = {
    "/model": Command("[NAME]", "Who answers: BASE, BASE+EXPERT:WEIGHT... or a preset.", Session.choose),
    "/expert": Command("[[-]NAME]", "Add an expert at weight 1, or take it away.", Session.expert),
    "/weight": Command("NAME VALUE", "How much an expert counts.", Session.weigh),
    "/rule": Command("NAME [K=V]...", "How the models are combined; /rule proxy ends it.", Session.use_rule),
    "/set": Command("[NAME=[VALUE]]", "temperature, max_tokens, seed, top_p, stop...", Session.sample),
    "/explain": Command("[off|table]", "Colour tokens by what the experts did.", Session.toggle_explain),
    "/system": Command("[TEXT]", "What every conversation begins with.", Session.system),
    "/undo": Command("", "Take the last exchange back.", Session.undo),
    "/retry": Command("", "Ask for the last answer again.", Session.retry),
    "/clear": Command("", "Begin a new conversation.", Session.clear),
    "/save": Command("FILE", "Write the conversation as JSON.", Session.save),
    "/load": Command("FILE", "Go on with a saved one.", Session.load),
    "/help": Command("[COMMAND]", "This list.", Session.help),
}
