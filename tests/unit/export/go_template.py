"""What Go's text/template makes of the templates for Ollama: as much of the language as they use.

Text, fields (``.Role``, ``$.Messages``, ``(index X i).Content``), variables, ``if``, ``else if``,
``else``, ``range $i, $x``, and the functions ``eq``, ``and``, ``or``, ``not``, ``len``, ``index`` and
``slice`` (pkg.go.dev/text/template). Anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

ACTION = re.compile(r"\{\{(.*?)\}\}", re.S)
WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)\.\w+|\)|:=|=|,|\$?\.?[\w.]+|\$[\w.]*)')
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "and": lambda *a: next((x for x in a if not x), a[-1]),
    "or": lambda *a: next((x for x in a if x), a[-1]),
    "not": lambda a: not a,
    "len": len,
    "index": lambda a, i: a[i],
    "slice": lambda a, i: a[i:],
}


class Scope:
    """Variables by name; an inner scope sees the outer ones, and sets them where it names them by =."""

    def __init__(self, outer: Scope | None, values: dict[str, Any] | None = None) -> None:
        self.outer, self.values = outer, dict(values or {})

    def holder(self, name: str) -> Scope:
        if name in self.values:
            return self
        assert self.outer is not None, f"no variable {name}"
        return self.outer.holder(name)


def render(template: str, data: dict[str, Any]) -> str:
    parts = iter(_parts(template))
    text, end = _block(parts, data, Scope(None, {"$": data}), True)
    assert end is None, f"{end} ends nothing"
    return text


def _parts(template: str) -> Iterator[tuple[bool, str]]:
    at = 0
    for found in ACTION.finditer(template):
        yield False, template[at : found.start()]
        yield True, found.group(1).strip()
        at = found.end()
    yield False, template[at:]


def _block(
    parts: Iterator[tuple[bool, str]], dot: Any, scope: Scope, live: bool
) -> tuple[str, str | None]:
    """Render up to the end of a block; return the text and the action that ends it."""
    out = []
    for action, text in parts:
        if not action:
            out.append(text if live else "")
            continue
        head, _, rest = text.partition(" ")
        if head in ("end", "else"):
            return "".join(out), text
        if head == "if":
            out.append(_if(parts, rest, dot, scope, live))
        elif head == "range":
            out.append(_range(parts, rest, dot, scope, live))
        elif live:
            out.append(_value(text, dot, scope))
    return "".join(out), None


def _if(parts: Iterator[tuple[bool, str]], test: str, dot: Any, scope: Scope, live: bool) -> str:
    holds = live and bool(_pipeline(test, dot, scope))
    text, end = _block(parts, dot, Scope(scope), holds)
    open_ = live and not holds
    while end != "end":
        assert end is not None and end.startswith("else")
        rest = end.removeprefix("else").strip()
        test = rest.removeprefix("if ")
        holds = open_ and (not rest or bool(_pipeline(test, dot, scope)))
        more, end = _block(parts, dot, Scope(scope), holds)
        text, open_ = text + more, open_ and not holds
    return text


def _range(parts: Iterator[tuple[bool, str]], over: str, dot: Any, scope: Scope, live: bool) -> str:
    names, _, what = over.rpartition(":=")
    inside: list[tuple[bool, str]] = []
    depth = 1
    for part in parts:
        head = part[1].partition(" ")[0] if part[0] else ""
        depth += head in ("if", "range")
        depth -= head == "end"
        if not depth:
            break
        inside.append(part)
    out = []
    for at, item in enumerate(_pipeline(what, dot, scope) if live else ()):
        named = [name.strip() for name in names.split(",")] if names.strip() else []
        values = dict(zip(named, (at, item) if len(named) == 2 else (item,), strict=False))
        out.append(_block(iter(inside), item, Scope(scope, values), True)[0])
    return "".join(out)


def _value(text: str, dot: Any, scope: Scope) -> str:
    for sign in (":=", "="):
        name, found, rest = text.partition(f" {sign} ")
        if found and name.startswith("$"):
            value = _pipeline(rest, dot, scope)
            (scope if sign == ":=" else scope.holder(name)).values[name] = value
            return ""
    return str(_pipeline(text, dot, scope))


def _pipeline(text: str, dot: Any, scope: Scope) -> Any:
    words = [found.group(1) for found in WORD.finditer(text)]
    assert "".join(words) == re.sub(r"\s+", "", text) or '"' in text, text
    value, rest = _call(words, dot, scope)
    assert not rest, text
    return value


def _call(words: list[str], dot: Any, scope: Scope) -> tuple[Any, list[str]]:
    """Return the value of words up to a closing bracket, and the words from there on."""
    if words[0] in FUNCTIONS:
        function, arguments, rest = FUNCTIONS[words[0]], [], words[1:]
        while rest and not rest[0].startswith(")"):
            value, rest = _operand(rest, dot, scope)
            arguments.append(value)
        return function(*arguments), rest
    return _operand(words, dot, scope)


def _operand(words: list[str], dot: Any, scope: Scope) -> tuple[Any, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _call(rest, dot, scope)
        close, rest = rest[0], rest[1:]
        return (value[close[2:]] if close.startswith(").") else value), rest
    if word.startswith('"'):
        return word[1:-1], rest
    if word.lstrip("-").isdigit():
        return int(word), rest
    if word in ("true", "false"):
        return word == "true", rest
    if word.startswith("."):
        return dot[word[1:]], rest
    assert word.startswith("$"), f"no function {word}"
    name, _, key = word.partition(".")
    held = scope.holder(name).values[name]
    return (held[key] if key else held), rest
