"""Secrets are taken out of what is written for other people to read."""

from __future__ import annotations

import os
import re
import sys

HIDDEN = "[hidden]"
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
"""In the name of an environment variable or an option, other than of what is counted in tokens."""
NO_SECRET = re.compile(r"TOKENIZERS|MAX_|_TOKENS|NUM_|PAD_TOKEN", re.IGNORECASE)
SHORTEST = 6
"""Characters of a value that is looked for: shorter ones stand everywhere."""
FORMS = (
    re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(sk|gh[pousr]|glpat|xox[bp])[-_][A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?<=bearer )[\w.~+/=-]+", re.IGNORECASE),
    re.compile(r"(?<=--token[ =])\S+"),
)
"""Tokens of the Hugging Face hub and of other services, passwords in addresses, tokens of headers and options."""


def redacted(text: str) -> str:
    """`text` without what looks like a secret, or is the value of a variable whose name says that it is one."""
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    for form in FORMS:
        text = form.sub(HIDDEN, text)
    return text


def _secrets() -> list[str]:
    """The longest first, since one may be part of another."""
    named = [v for k, v in os.environ.items() if SECRET.search(k) and not NO_SECRET.search(k)]
    hub = sys.modules.get("huggingface_hub")  # importing it takes a while; what has not used it has no token of it
    named.append((hub.get_token() if hub else None) or "")
    return sorted({value for value in named if len(value) >= SHORTEST}, key=len, reverse=True)
