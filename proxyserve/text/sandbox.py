"""Where chat templates run: transformers' sandboxed environment, with bounds on time and size.

Jinja's sandbox keeps templates away from Python's insides. It does not keep them from loops in loops, or from making
gigabytes of a few characters; here that ends in `OutOfBounds`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Private, but the only way to the filters, globals and tags that templates are written for.
from transformers.utils.chat_template_utils import _compile_jinja_template

#: Most characters that a template may make of one conversation, and of any value on the way there.
MAX_CHARACTERS = 16 * 2**20

#: Most seconds of CPU time for one conversation.
MAX_SECONDS = 1.0

_TICKS_PER_LOOK = 32
_SIZED = (str, bytes, list, tuple)

#: Widths (of padding, of indentation) above this have no use in a prompt.
_MAX_WIDTH = 1000
_WIDE_FIELD = re.compile(r"\d{4,}")

#: Nothing that a chat template needs, and no telling how much they make.
_WITHOUT = ("lipsum", "pprint", "urlize", "wordwrap", "xmlattr")

_TICK, _SEEN, _JOIN = "bounds__tick", "bounds__seen", "bounds__join"


class OutOfBounds(Exception):
    """The message says what went beyond its bound. No TemplateError, so that no template hides it."""


class SandboxedTemplate:
    """A compiled template. `variables` are the names that it reads and does not set. Thread-safe."""

    def __init__(self, source: str) -> None:
        """Raises jinja2's TemplateError where the source is no template."""
        environment = _environment()
        tree = environment.parse(source)
        self.variables = frozenset(find_undeclared_variables(tree))
        watched = _Watched().visit(tree).set_environment(environment)
        self._template: Template = environment.from_string(watched)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises OutOfBounds, and whatever the template raises."""
        watch = _Watch()
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate({**variables, **watch.functions}):
            size += len(piece)
            _require_small(size)
            watch.tick()
            pieces.append(piece)
        return "".join(pieces)


class _Watched(NodeTransformer):
    """Puts calls of the watch into everything that can go on, or grow, for long: each turn of a loop, each call of a
    macro, each value that is printed or joined with `~`. Jinja names the methods after its nodes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._ticking(node)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(_call(_TICK, [], node.lineno))
        tick.set_lineno(node.lineno)
        node.body.insert(0, tick)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for position, child in enumerate(node.nodes):
            if not isinstance(child, nodes.TemplateData):
                node.nodes[position] = _call(_SEEN, [child], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call(_JOIN, node.nodes, node.lineno)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    call = nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)
    call.set_lineno(line)
    return call


class _Watch:
    """The clock of one rendering."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS
        self._ticks = 0
        self.functions = {_TICK: self.tick, _SEEN: self._seen, _JOIN: self._join}

    def tick(self) -> None:
        """Looks at the clock now and then: asking the system takes longer than most turns of a loop."""
        self._ticks += 1
        if self._ticks % _TICKS_PER_LOOK == 0 and time.thread_time() > self._end:
            raise OutOfBounds(f"it ran for {MAX_SECONDS:g} s")

    def _seen(self, value: Any) -> Any:
        """A value that is printed."""
        self.tick()
        _require_small(_size(value))
        return value

    def _join(self, *values: Any) -> str:
        parts = [str(value) for value in values]
        _require_small(sum(map(len, parts)))
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """Values cannot grow without bound."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+":
                _require_small(_size(left) + _size(right))
            case "*":
                _require_small(max(_size(left) * _number(right), _size(right) * _number(left)))
                _require_small(_number(left).bit_length() + _number(right).bit_length())
            case "**":
                _require_small(_number(left).bit_length() * _number(right))
            case "%" if isinstance(left, str):
                _require_modest("format", left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(callee, "__wrapped__", callee)  # Jinja wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _require_modest(method.__name__, owner, (*args, *kwargs.values()))
        return super().call(context, callee, *args, **kwargs)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Transformers' own environment, whose class is exchanged: only it knows what it puts in there."""
    environment = _compile_jinja_template("").environment.overlay()
    environment.__class__ = _Environment
    environment.globals = {name: value for name, value in environment.globals.items() if name not in _WITHOUT}
    environment.filters = {
        name: _modest(name, function)
        for name, function in environment.filters.items()
        if name not in _WITHOUT
    }
    return environment


def _modest(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is refused what would make too much."""

    @wraps(function)  # with the marks of filters that want the environment as their first argument
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if given:
            _require_modest(name, given[0], (*given[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return checked


def _require_modest(name: str, subject: Any, arguments: Sequence[Any]) -> None:
    """Raise OutOfBounds if a string's method, or a filter, of that name would make too much."""
    match name:
        case "replace":
            _require_small(_size(subject) * max([1, *map(_size, arguments)]))
        case "join":
            # `separator.join(texts)`, and as a filter `texts | join(separator)`
            texts, separators = (
                (arguments[:1], [subject]) if isinstance(subject, str) else ([subject], arguments)
            )
            parts = [part for text in texts if isinstance(text, list | tuple) for part in text]
            _require_small(sum(map(_size, parts)) + max(map(_size, separators), default=0) * len(parts))
        case "format" | "format_map":
            if isinstance(subject, str) and _WIDE_FIELD.search(subject):
                raise OutOfBounds(f"it pads to more than {_MAX_WIDTH} characters")
            _require_narrow(arguments)
            _require_small(_size(subject) * (1 + sum(map(_size, arguments))))
        case "center" | "ljust" | "rjust" | "zfill" | "tojson":
            _require_narrow(arguments)
        case "expandtabs" | "indent":
            _require_narrow(arguments)
            width = 8 + sum(map(_number, arguments)) + sum(map(_size, arguments))
            _require_small(_size(subject) * width)


def _require_narrow(arguments: Sequence[Any]) -> None:
    if any(_number(argument) > _MAX_WIDTH for argument in arguments):
        raise OutOfBounds(f"it pads to more than {_MAX_WIDTH} characters")


def _require_small(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise OutOfBounds(f"it makes more than {MAX_CHARACTERS} characters")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, _SIZED) else 0


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0
