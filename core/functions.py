"""Python functions of the user's own, which the configuration names as `module:function`.

A module is looked for in the current folder first, then where Python finds modules. `source_file` finds it without
running it, so that a manifest can record what was run and a change of the file makes a result out of date.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import ConfigError

NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""What such a name looks like, as a regular expression."""


def source_file(option: str, name: str) -> Path:
    """The file of the module that `name` (`module:function`) is in.

    Args:
        option: of the configuration, for messages.

    Raises:
        ConfigError: there is no such module, or it has no Python source.
    """
    module = name.partition(":")[0]
    below = Path.cwd().joinpath(*module.split("."))
    for file in (below.with_suffix(".py"), below / "__init__.py"):
        if file.is_file():
            return file
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"{option}: no module {module!r}: {below.with_suffix('.py').name} is neither in the current folder "
            "nor where Python finds modules"
        )
    return Path(spec.origin)


def load_function(option: str, name: str) -> Callable[..., Any]:
    """The function that `name` (`module:function`) stands for.

    Args:
        option: of the configuration, for messages.

    Raises:
        ConfigError: there is no such module or function, its module cannot be imported, or Python has another module
            of this name.
    """
    file, (module, _, function) = source_file(option, name), name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"{option}: {file.name} cannot be imported: {type(error).__name__}: {error}") from error
    if Path(found.__file__ or "").resolve() != file.resolve():
        raise ConfigError(f"{option}: {module!r} is the name of another module of Python: rename {file.name}")
    value = getattr(found, function, None)
    if not callable(value):
        names = [n for n, v in vars(found).items() if callable(v) and getattr(v, "__module__", "") == module]
        raise ConfigError(f"{option}: {file.name} has no function {function!r}; it has {', '.join(names) or 'none'}")
    return value
