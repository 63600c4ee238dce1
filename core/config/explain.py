"""The configuration explained from its own docstrings: `grm config --explain KEY`, and docs/configuration.md.

python -m core.config.explain > docs/configuration.md
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import typing
from collections.abc import Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel

from core.config.base import NATIVE_DTYPE
from core.config.fields import REQUIRED, ConfigField, all_fields
from core.errors import ConfigError

HEADER = """# Configuration

Every option with its type, its default and what it does. A YAML file names only what differs from the defaults; several
files are laid over each other, and `a.b=value` on the command line comes last. `grm config` prints the resolved tree,
`grm config --explain ppo.kl` a part of this page. `*` stands for a name of your own, as in `rm.variants.grm.alpha`.

This page is generated from the docstrings in `core/config/` by `python -m core.config.explain > docs/configuration.md`.
"""


def explain(key: str = "", width: int = 100) -> str:
    """The fields at and below a dotted key (all of them for ""), for a terminal.

    Raises:
        ConfigError: no such key; names the nearest.
    """
    pattern = key.strip(".")
    chosen = [f for f in all_fields() if not pattern or _matches(f.key, pattern)]
    if not chosen:
        near = difflib.get_close_matches(pattern, [f.key for f in all_fields()], n=3, cutoff=0.5)
        raise ConfigError(f"no configuration key {key!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    lines = []
    for field in chosen:
        lines.append(field.key + ("" if field.sections else f" = {_default(field)}  ({type_name(field)})"))
        lines += textwrap.wrap(_text(field), width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def reference() -> str:
    """docs/configuration.md: a heading and a table for each section."""
    lines = [HEADER]
    plain: dict[str, list[ConfigField]] = {}
    texts = {}
    for field in all_fields():
        if field.sections:
            texts[_section_key(field)] = _text(field)
        plain.setdefault(field.key.rpartition(".")[0], []).append(field)
    for section, fields in plain.items():
        rows = [f for f in fields if not f.sections]
        if not section or not (rows or texts.get(section)):
            continue
        lines += [f"## {section}", ""]
        lines += [texts[section], ""] if texts.get(section) else []
        if rows:
            lines += ["| key | type | default | |", "| --- | --- | --- | --- |"]
            for f in rows:
                cells = (f"`{f.key.rpartition('.')[2]}`", type_name(f), f"`{_default(f)}`", _text(f))
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def type_name(field: ConfigField) -> str:
    """A type as a user would write it: `number`, `text or null`, `bfloat16 | float32`."""
    return _type(field.annotation)


def shown(default: Any) -> str:
    return "required" if default is REQUIRED else json.dumps(default, ensure_ascii=False)


def _default(field: ConfigField) -> str:
    if field.key.endswith("dtype") and field.default == NATIVE_DTYPE:
        return "what this machine computes fast"  # not the value: the page would depend on where it was made
    return shown(field.default)


def _section_key(field: ConfigField) -> str:
    return field.key + (".*" if typing.get_origin(field.annotation) is dict else "")


def _text(field: ConfigField) -> str:
    """The field's explanation, with that of its section where it is one."""
    kinds = [k.__doc__ or "" for k in field.sections if isinstance(k, type) and issubclass(k, BaseModel)]
    parts: Sequence[str] = [field.explanation, *(k for k in kinds if k and k != field.explanation)]
    return re.sub(r"\s+", " ", " ".join(p.strip() for p in parts if p)).strip()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:  # a union
        return " or ".join(_type(a) for a in arguments)
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        date: "date",
        type(None): "null",
        dict: "mapping",
    }
    return names.get(annotation, "path" if getattr(annotation, "__name__", "") == "Path" else "section")


def _matches(key: str, wanted: str) -> bool:
    """Whether `key` is at or below `wanted`, in which entries of mappings may be named."""
    have, want = key.split("."), wanted.split(".")
    return len(have) >= len(want) and all(h in (w, "*") for h, w in zip(have, want, strict=False))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
