"""The text of chat templates (Jinja): where it comes from, and what is fixed in it.

Everything that the configuration sets is written into the template itself. A saved tokenizer therefore renders the same
conversation as the same text in every tool and on every day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from core.config.spelling import nearest_name
from core.errors import DataError

DEFAULT_DATE = "2024-07-26"
"""The date that the templates of Llama 3.1 and 3.2 show where there is no clock."""
END_OF_VARIABLES = "{#- the variables above are fixed #}\n"
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
OWN_CLOCK = "macro strftime_now"
RESERVED = ("messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now")
"""Variables that the caller of a template gives it: one of the same name would take their place."""


def named_template(name: str) -> str:
    """The text of a template: of the file at the path `name`, or of TRL's template of that name.

    Raises:
        DataError: neither a file nor a name.
    """
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"chat_template: {name} is not UTF-8 ({error})") from None
    folder = files("trl") / "chat_templates"
    template = folder / f"{name}.jinja"
    if not re.fullmatch(r"\w+", name) or not template.is_file():
        known = sorted(f.name.removesuffix(".jinja") for f in folder.iterdir() if f.name.endswith(".jinja"))
        near = nearest_name(name, known)
        hint = f"the nearest of TRL's is {near}" if near else f"TRL's are {', '.join(known)}"
        raise DataError(f"chat_template: {name!r} is neither a file nor one of TRL's templates; {hint}")
    return template.read_text(encoding="utf-8")


def with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """The template with variables set in its first lines, as if every caller passed them.

    A variable that an earlier call has set gets the new value.

    Raises:
        DataError: a name that Jinja cannot read, or one of `RESERVED`.
    """
    if wrong := [name for name in variables if not name.isidentifier()]:
        raise DataError(f"template_kwargs: {wrong[0]!r} cannot be a variable of a chat template")
    if taken := [name for name in variables if name in RESERVED]:
        raise DataError(
            f"template_kwargs: {taken[0]!r} is what a chat template is given for each conversation, so it cannot be "
            "fixed: leave it out"
        )
    return _with_first_lines(
        template, {f"{{%- set {name} =": f" {_jinja(value)} %}}\n" for name, value in variables.items()}
    )


def with_date(template: str, day: str | None) -> str:
    """The template with `day` (2024-07-26) where it asks for today's date; one that does not ask stays as it is.

    Args:
        day: None for the one that was fixed earlier, else `DEFAULT_DATE`.
    """
    formats = sorted({found[2] for found in CLOCK.finditer(template)})
    if "strftime_now" not in template or (day is None and OWN_CLOCK in template):
        return template
    when = date.fromisoformat(day or DEFAULT_DATE)
    cases = "".join(
        f"{{%- {'if' if i == 0 else 'elif'} format == {_jinja(form)} %}}{{{{- {_jinja(when.strftime(form))} }}}}"
        for i, form in enumerate(formats)
    )
    other = f"{{{{- {_jinja(when.isoformat())} }}}}"
    body = f"{cases}{{%- else %}}{other}{{%- endif %}}" if cases else other
    return _with_first_lines(template, {f"{{%- {OWN_CLOCK}": f"(format) %}}{body}{{%- endmacro %}}\n"})


def with_answer_header(template: str, header: str) -> str:
    """The template with `header` in place of its own generation prompt."""
    return (
        "{%- set generation_prompt_wanted = add_generation_prompt %}\n{%- set add_generation_prompt = false %}\n"
        + template.removesuffix("\n")  # which Jinja leaves out at the end
        + f"{{% if generation_prompt_wanted %}}{{{{ {_jinja(header)} }}}}{{% endif %}}"
    )


def _with_first_lines(template: str, lines: Mapping[str, str]) -> str:
    """The template after `lines` (start -> rest), in place of those with the same start that were put there earlier.

    Each line ends with a block and a line break, which Jinja leaves out with `trim_blocks`.
    """
    if not lines:
        return template
    before, _, after = template.rpartition(END_OF_VARIABLES)
    kept = [line for line in before.splitlines(keepends=True) if not line.startswith(tuple(lines))]
    return "".join([*kept, *(start + rest for start, rest in lines.items()), END_OF_VARIABLES, after])


def _jinja(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_jinja(str(k))}: {_jinja(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_jinja, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    # Jinja reads the escapes of Python in a string; JSON's are the same where no character is above U+FFFF.
    return json.dumps(value, ensure_ascii=False)
