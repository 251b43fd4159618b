"""The OpenAPI document as a page to read: every route with its answers, every object with its fields.

`/docs` of a server is this page in HTML, with nothing to fetch from elsewhere. docs/routes.md is the same in Markdown,
of `proxyserve demo`:

    curl -s http://127.0.0.1:8000/openapi.json | python -m proxyserve.api.reference > docs/routes.md
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SCHEMAS = "#/components/schemas/"
#: The object that every refusal is.
_REFUSAL = f"{_SCHEMAS}ErrorBody"


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of `level` 1 to 3 with what is below it. Texts have no other marks than `code` and [links](#anchor)."""

    level: int
    title: str
    texts: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    @property
    def anchor(self) -> str:
        """As Markdown's table of contents makes it of the title."""
        return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", self.title).strip().lower())


def sections(document: Mapping[str, Any]) -> Iterator[Section]:
    """The page, from its title on. `document` is what `/openapi.json` answers."""
    yield Section(
        1,
        "Routes",
        (
            "What `/openapi.json` says, to read: each route, what it answers, and the fields of every object. "
            "`/docs` on a server is this page, for that server.",
        ),
    )
    groups: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            (group,) = operation.get("tags", ["other"])
            groups.setdefault(group, []).append((method, path, operation))
    refusals: dict[str, str] = {}
    for group, members in groups.items():
        yield Section(2, group.capitalize())
        for method, path, operation in members:
            yield _route(method, path, operation, refusals)
    rows = tuple((f"`{status}`", when) for status, when in sorted(refusals.items()))
    yield Section(
        2, "Refusals", (f"All in OpenAI's shape, {_kind({'$ref': _REFUSAL})}.",), ("status", "when"), rows
    )
    yield Section(2, "Objects")
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield _object(name, schema)


def _route(method: str, path: str, operation: Mapping[str, Any], refusals: dict[str, str]) -> Section:
    """`refusals` collects what a status means; a route for which it means something else says so itself."""
    texts = [_sentence(operation["summary"]), _flat(operation.get("description", ""))]
    for parameter in operation.get("parameters", ()):
        meaning = _flat(parameter.get("description", ""))
        texts.append(
            f"In the {parameter['in']}: `{parameter['name']}`, {_kind(parameter['schema'])}. {meaning}".strip()
        )
    for content in operation.get("requestBody", {}).get("content", {}).values():
        texts.append(f"Body: {_kind(content['schema'])}.")
    rows, refused = [], []
    for status, answer in operation["responses"].items():
        if _is_refusal(answer) and refusals.setdefault(status, _flat(answer["description"])) == _flat(
            answer["description"]
        ):
            refused.append(f"`{status}`")
            continue
        kinds = [
            _kind(content["schema"]) if "schema" in content else f"`{media}`"
            for media, content in answer.get("content", {}).items()
        ]
        rows.append((f"`{status}`", " or ".join(kinds), _flat(answer["description"])))
    texts.append(f"[Refusals](#refusals): {', '.join(refused)}." if refused else "")
    title = f"{method.upper()} {path}"
    return Section(3, title, tuple(filter(None, texts)), ("status", "answer", "when"), tuple(rows))


def _is_refusal(answer: Mapping[str, Any]) -> bool:
    return any(content.get("schema") == {"$ref": _REFUSAL} for content in answer.get("content", {}).values())


def _object(name: str, schema: Mapping[str, Any]) -> Section:
    about = _flat(schema.get("description", ""))
    if "properties" not in schema:
        return Section(3, name, tuple(filter(None, (about, _sentence(_kind(schema))))))
    required = schema.get("required", ())
    rows = tuple(
        (
            f"`{field}`" + (" (required)" if field in required else ""),
            _kind(entry),
            _flat(entry.get("description", "")),
        )
        for field, entry in schema["properties"].items()
    )
    return Section(3, name, (about,) if about else (), ("field", "value", "meaning"), rows)


def _kind(schema: Mapping[str, Any]) -> str:
    """What values a schema takes, in a few words."""
    if reference := schema.get("$ref"):
        name = reference.removeprefix(_SCHEMAS)
        return f"[{name}](#{Section(3, name).anchor})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(_kind, schema[several])))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            if fixed := schema.get("prefixItems"):
                return "list of " + " and ".join(map(_kind, fixed))
            return f"list of {_kind(schema.get('items', {}))}" + _bounds(schema, "Items")
        case "object":
            values = schema.get("additionalProperties")
            return f"map to {_kind(values)}" if isinstance(values, Mapping) and values else "object"
        case "string":
            return "text" + _bounds(schema, "Length")
        case "integer":
            return "whole number" + _range(schema)
        case "number":
            return "number" + _range(schema)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    return "any value"


def _range(schema: Mapping[str, Any]) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return "".join(f", {word} {schema[key]:,g}" for key, word in words.items() if key in schema)


def _bounds(schema: Mapping[str, Any], what: str) -> str:
    unit = "entries" if what == "Items" else "characters"
    words = {f"min{what}": "at least", f"max{what}": "at most"}
    return "".join(f", {word} {schema[key]:,} {unit}" for key, word in words.items() if key in schema)


def _flat(text: str) -> str:
    """One paragraph; marks of other formats that docstrings have are none here."""
    return " ".join(text.split())


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def as_markdown(page: Sequence[Section]) -> str:
    """docs/routes.md."""
    parts = []
    for section in page:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += section.texts
        if section.head:
            table = [section.head, ("---",) * len(section.head), *section.rows]
            parts.append("\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h3 {{ font-family: ui-monospace, monospace; margin-top: 2.5rem }}
table {{ border-collapse: collapse; width: 100%; display: block; overflow-x: auto }}
th, td {{ border: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top }}
code {{ font-family: ui-monospace, monospace; font-size: .9em }}
</style></head><body>
{body}
</body></html>
"""


def as_html(page: Sequence[Section], title: str) -> str:
    """The page that a server shows under `/docs`: one document, which needs nothing else."""
    parts = []
    for section in page:
        tag = f"h{section.level}"
        parts.append(f'<{tag} id="{section.anchor}">{html.escape(section.title)}</{tag}>')
        parts += [f"<p>{_inline(text)}</p>" for text in section.texts]
        if section.head:
            rows = ["".join(f"<th>{cell}</th>" for cell in section.head)]
            rows += ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in section.rows]
            parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    return _HTML.format(title=html.escape(title), body="\n".join(parts))


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\[([^\]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', text)


if __name__ == "__main__":
    sys.stdout.write(as_markdown(list(sections(json.load(sys.stdin)))))
