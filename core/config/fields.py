"""The configuration tree as a list: every field with its key, type, default and explanation."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from core.config.tree import Config

REQUIRED = object()
"""Default of a field that has none."""
PASSIVE = "decides_result"
"""Key of a field's `json_schema_extra`: False where the field cannot change what a stage computes."""

FORMERLY = "formerly"
"""Key of a field's `json_schema_extra`: an earlier default, which gives the same results as the default."""


@dataclass(frozen=True, slots=True)
class ConfigField:
    key: str
    """Dotted, as in overrides; `*` stands for the name of a mapping's entry, as in `rm.variants.*.alpha`."""
    annotation: Any
    default: Any
    """REQUIRED, a value as JSON holds it, or for a section its values as a dictionary."""
    explanation: str
    sections: tuple[type[BaseModel], ...]
    """The sections that the field may hold; empty for a plain value."""
    decides_result: bool
    """False where the field cannot change what a stage computes, so that a change makes nothing stale."""
    formerly: Any = None
    """An earlier default, in whose place the default came without a change of any result; None for none."""


@cache
def all_fields() -> tuple[ConfigField, ...]:
    """Every field of the tree, each section before its own fields."""
    return tuple(_walk(Config, "", Config().model_dump(mode="json")))


@cache
def by_key() -> dict[str, ConfigField]:
    return {field.key: field for field in all_fields()}


def field_of(key: str) -> ConfigField | None:
    """The field of a dotted key in which entries of mappings are named (`rm.variants.grm.alpha`)."""
    known, parts = by_key(), key.split(".")
    pattern: list[str] = []
    for part in parts:
        named, starred = ".".join([*pattern, part]), ".".join([*pattern, "*"])
        if named in known:
            pattern.append(part)
        elif any(k == starred or k.startswith(starred + ".") for k in known):
            pattern.append("*")
        else:
            return None
    return known.get(".".join(pattern))


def _walk(section: type[BaseModel], prefix: str, defaults: dict[str, Any] | None) -> Iterator[ConfigField]:
    """Fields of `section`; `defaults` are its values where it stands in the tree, None for those of its class."""
    if defaults is None:
        defaults = section.model_construct().model_dump(mode="json", warnings=False)
    for name, info in section.model_fields.items():
        kinds, default = sections_in(info.annotation), defaults.get(name, REQUIRED)
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        yield ConfigField(
            prefix + name,
            info.annotation,
            default,
            info.description or "",
            tuple(kinds),
            extra.get(PASSIVE) is not False,
            extra.get(FORMERLY),
        )
        mapping = typing.get_origin(info.annotation) is dict
        for kind in kinds:
            inner = default if isinstance(default, dict) and not mapping else None
            yield from _walk(kind, f"{prefix}{name}.{'*.' if mapping else ''}", inner)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections in a type: of itself, of a union, or of the entries of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, dict):
        return [s for part in typing.get_args(annotation) for s in sections_in(part)]
    return []
