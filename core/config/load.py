"""YAML files and dotted overrides -> one validated Config, or one message with every fault."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from core.config import Config
from core.config.base import merge
from core.config.nearest import keys_of, nearest
from core.errors import ConfigError

Tree = dict[str, Any]
"""Sections and values as a YAML file holds them, before they are checked."""
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: ValueError of bytes that are not UTF-8, and of 2024-99-99, which looks like a date."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):  # the base class names the place
                break
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(files: Iterable[Path | str], overrides: Iterable[str] = ()) -> Config:
    """Lay `files` over the defaults, then `overrides` (`a.b=value`); raise ConfigError with all faults at once."""
    tree: Tree = {}
    for file in files:
        tree = merge(tree, read_yaml(Path(file)))
    rm = tree.get("rm") or {}
    if isinstance(rm, dict) and "variants" not in rm:
        # Files that name reward models replace the default ones; overrides then change those.
        tree = merge({"rm": Config().model_dump(include={"rm": {"variants"}})["rm"]}, tree)
    for text in overrides:
        tree = merge(tree, parse_override(text))
    faults: list[str] = []
    while True:
        try:
            config = Config.model_validate(tree)
            break
        except ValidationError as error:
            # Rules over several sections are checked only when each section is valid: take what is faulty
            # out and look again, so that one message lists everything.
            faults += [fault for fault in _faults(error) if fault not in faults]
            if not any([_remove(tree, e["loc"]) for e in error.errors()]):
                break
    if faults:
        raise ConfigError("\n".join(["the configuration is not valid:", *faults]))
    return config


def read_yaml(file: Path) -> Tree:
    """The mapping in `file`; a missing file, bad YAML or another type is a ConfigError naming the file and line."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: give a config file, such as configs/offline.yaml")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        hint = "" if file.parent.is_dir() else ": `grm init FOLDER` makes a folder with a configuration to start from"
        raise ConfigError(f"no config file {file}{hint}") from None
    except NOT_YAML as error:
        raise ConfigError(f"{file} is not valid YAML: {_reason(error)}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping of sections, not {type(tree).__name__}")
    return tree


def parse_override(text: str) -> Tree:
    """`ppo.kl.coef=0.1` -> `{"ppo": {"kl": {"coef": 0.1}}}`; the value is YAML, so lists and null work."""
    path, sep, value = text.partition("=")
    if not sep or not all(path.split(".")):
        raise ConfigError(f"override {text!r}: expected key.path=value")
    try:
        leaf = yaml.safe_load(value)
    except NOT_YAML as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {_reason(error)}") from None
    *sections, last = path.split(".")
    tree: Tree = {last: leaf}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _remove(tree: Tree, path: tuple[int | str, ...]) -> bool:
    """Take the key at `path` out of `tree`; False when it is not there."""
    part: Any = tree
    for key in path[:-1]:
        part = part.get(key) if isinstance(part, dict) else None
    return bool(path) and isinstance(part, dict) and part.pop(path[-1], part) is not part


def _faults(error: ValidationError) -> list[str]:
    lines = []
    for e in error.errors():
        path = ".".join(str(part) for part in e["loc"] if part != "[key]")  # pydantic's word for a key that is wrong
        if e["type"] == "extra_forbidden":
            near, section = nearest(e["loc"]), ".".join(map(str, e["loc"][:-1])) or "the configuration"
            hint = f"the nearest is {near}" if near else f"{section} has {', '.join(keys_of(e['loc'][:-1]))}"
            lines.append(f"  {path}: no such key (got {e['input']!r}); {hint}")
        elif e["type"] in ("model_type", "model_attributes_type"):
            lines.append(f"  {path}: is a section with {', '.join(keys_of(e['loc']))}, not {e['input']!r}")
        elif e["type"] == "value_error":
            # A rule over several fields: its input is a whole section, of no use in a message.
            message = e["msg"].removeprefix("Value error, ")
            lines += [f"  {path + ': ' if path else ''}{part}" for part in message.split("; ")]
        else:
            lines.append(f"  {path}: {e['msg']} (got {e['input']!r})")
    return lines
