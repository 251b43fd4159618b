"""From a `Grammar` to the text that llguidance compiles. Runs in the gatekeeper's process only."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher

from proxyserve.grammar.grammar import GrammarKind
from proxyserve.grammar.table import TokenTable, id_ranges

#: Without it, a text that the grammar forces could come in one way of writing it in tokens only.
_OPTIONS = '%llguidance {"no_forcing": true}'

#: A space, or a new line and its indentation: what writers of JSON use. Weak models would go on with spaces for ever.
_WHITE_SPACE = r"\x20|\n[\x20\t]{0,32}"

_PAD = r"/[ \t\r\n]{0,8}/"

_ALTERS_SAMPLING = re.compile(r"^\s*[?!]*[\w-]+\s*\[[^\]]*\btemperature\s*=", re.MULTILINE)


def source_of(kind: GrammarKind, text: str, table: TokenTable) -> str:
    """Raises ValueError, telling what is wrong, for what would be read and then ignored."""
    match kind:
        case GrammarKind.JSON_SCHEMA:
            return _bundle("start: @schema", {"schema": json.loads(text)})
        case GrammarKind.REGEX:
            (expression,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
            return f"{expression['lark_grammar']}\n{_OPTIONS}"
        case GrammarKind.CHOICE:
            return f"start: CHOICE\nCHOICE: {' | '.join(map(_literal, json.loads(text)))}\n{_OPTIONS}"
        case GrammarKind.LARK:
            if _ALTERS_SAMPLING.search(text):
                raise ValueError("'temperature' of a rule is not supported; set the request's temperature")
            return LLMatcher.grammar_from_lark(f"{text}\n{_OPTIONS}")
        case GrammarKind.TAGS:
            return _tags(json.loads(text), table)


def _bundle(lark: str, schemas: dict[str, Any]) -> str:
    """A grammar that refers to schemas by name."""
    grammars: list[dict[str, Any]] = [{"name": "start", "lark_grammar": f"{lark}\n{_OPTIONS}"}]
    for name, schema in schemas.items():
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
        grammars.append({"name": name, "json_schema": schema})
    return json.dumps({"grammars": grammars})


def _literal(text: str) -> str:
    """A terminal for exactly this text."""
    return f"/{_escaped(text)}/"


def _escaped(text: str) -> str:
    return "".join(
        letter if letter.isascii() and letter.isalnum() else f"\\x{{{ord(letter):x}}}" for letter in text
    )


def _tags(document: dict[str, Any], table: TokenTable) -> str:
    schemas: dict[str, Any] = {}
    rules: list[str] = []
    calls: list[str] = []
    triggers: set[int] = set()
    for call in document["calls"]:
        name = f"call{len(calls)}"
        token = table.special_named(call["trigger"])
        if token is not None:
            triggers.add(token)
            opener = f"TEXT <[{token}]>" if document["free"] else f"<[{token}]>"
        elif document["free"]:
            # Lazy: it ends where the trigger first does, and no other reading of the text goes on beyond that.
            opener = f"{name}_trigger"
            rules.append(f"{opener}[lazy]: /(.|\\n)*{_escaped(call['trigger'])}/")
        else:
            opener = _literal(call["trigger"])
        bodies = []
        for tag in call["tags"]:
            schema = f"schema{len(schemas)}"
            schemas[schema] = tag["schema"]
            rest = _literal(tag["rest"]) if tag["rest"] else ""
            end = table.special_named(tag["end"])
            closer = _literal(tag["end"]) if end is None else f"<[{end}]>"
            bodies.append(f"{rest} PAD @{schema} PAD {closer}")
        rules.append(f"{name}: {opener} ({' | '.join(bodies)})")
        calls.append(name)
    rules += [f"call: {' | '.join(calls)}", f"PAD: {_PAD}"]
    least, most = document["least"], document["most"]
    if document["free"]:
        # Special tokens are no text, and free text is free to have them.
        others = table.special - triggers
        text = f"(TEXT <[{id_ranges(others)}]>)*" if others else ""
        rules += ["TEXT: /(.|\\n)*/", f"rest: {text} TEXT", f"piece: {text} call"]
        wholes = []
        if most is None or least < most:
            wholes.append(f"{_times('piece', least, None if most is None else most - 1)} rest")
        if most is not None:  # free text would have room for one more
            wholes.append(f"{_times('piece', most, most)} PAD")
        rules.append(f"start: {' | '.join(wholes)}")
    else:
        again = _times("(PAD call)", max(0, least - 1), None if most is None else most - 1)
        rules.append(f"start: call {again}" if least else f"start: (call {again})?")
    return _bundle("\n".join(rules), schemas)


def _times(rule: str, least: int, most: int | None) -> str:
    return "" if most == 0 else f"{rule}{{{least},{'' if most is None else most}}}"
