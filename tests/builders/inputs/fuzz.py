"""Seeded random trees, rows and bytes: what people's files may hold, right, wrong and damaged.

`RLHF_FUZZ=20` makes twenty times as many cases as the fast tests do. With RLHF_FUZZ_TABLE=FILE their numbers are
written there as a table (`make fuzz`).
"""

from __future__ import annotations

import ast
import copy
import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.files import write_table
from tests.builders.processes import SEED

TIMES = int(os.environ.get("RLHF_FUZZ", "1"))
TABLE = os.environ.get("RLHF_FUZZ_TABLE")
tried: Counter[str] = Counter()
"""Cases by the file of the test."""
NUMBERS = (0, -1, 1, 2, 7, 0.5, -0.0, 1e-9, 1e308, 10**30, 2**63, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "", " ", "a", "Why?", "0", "nan", "1e400", "true", "null", "\x00", "\n\n", "é", "\ud800", "\u202e", "a\u0300" * 50,
    "👩‍👩‍👧", "../../etc", "/", "x" * 3000, "<script>alert(1)</script>", "{{ x }}", "%s%n", "\\", '"', "'", "[", "user",
    "assistant", "system", "A>B", "2024-99-99", "-", "model_a", "tie",
)  # fmt: skip
KEYS = ("role", "content", "from", "value", "prompt", "chosen", "rejected", "score", "messages", "id", "", "__class__")


def cases(name: str, number: int) -> Iterator[random.Random]:
    """One generator a case. A failed case is repeated by the test's name and RLHF_TEST_SEED."""
    for case in range(number * TIMES):
        tried[os.environ["PYTEST_CURRENT_TEST"].split("::")[0]] += 1
        yield random.Random(f"{SEED} {name} {case}")


def write_table_of_cases(file: Path) -> None:
    """How many cases the tests of each file tried, all of which passed."""
    lines = [
        "# Odd and damaged input",
        "",
        "Tests write files and requests that are odd in places drawn at random: values of another type, missing,",
        "doubled and renamed keys, numbers that are not finite, broken Unicode, files cut short, with flipped bits or",
        "with bytes put in. Each case must end with a result in which every row is counted, or with one message that",
        "names the file or the row. A traceback, or a row that is dropped without a word, fails the test.",
        "",
        f"`make fuzz RLHF_FUZZ={TIMES}` tried {sum(tried.values()):,} cases with seed {SEED}, and all ended so:",
        "",
        "| input | cases | test |",
        "| --- | ---: | --- |",
    ]
    for test, number in sorted(tried.items()):
        first = ast.get_docstring(ast.parse(Path(test).read_text())) or ""
        subject = re.split(r"[:,] ", first.splitlines()[0])[0].rstrip(".")
        lines.append(f"| {subject} | {number:,} | `{test}` |")
    file.write_text("\n".join(lines) + "\n")


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any value that JSON can hold, the odd ones often."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind < 7:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*KEYS, *TEXTS[:12])): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, tree: Any) -> Any:
    """A copy of `tree` in which one place is another: replaced, removed, repeated, renamed, wrapped or added to."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return value(rng)
    parent, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0 and isinstance(parent, dict):
        del parent[key]
    elif how == 0:
        parent.pop(key)
    elif how == 1 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif how == 1:
        parent[rng.choice(KEYS)] = parent.pop(key)
    elif how == 2:
        parent[key] = [parent[key]]
    elif how == 3 and isinstance(parent, dict):
        parent[rng.choice((*KEYS, *TEXTS[:10]))] = value(rng)
    else:
        parent[key] = value(rng)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` cut short, with bits flipped, bytes put in, or a part left out or doubled."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.randrange(1, 40))
    how = rng.randrange(5)
    if how == 0:
        del data[at:]
    elif how == 1 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif how == 2:
        data[at:at] = rng.choice((b"\x00", b"\xff\xfe", b"\n", b"[" * 30, b"\xc3", b'"', b",", b"{}", b"\r", b"NaN"))
    elif how == 3:
        del data[at:to]
    else:
        data[at:at] = data[at:to]
    return bytes(data)


def lines(rows: list[Any]) -> bytes:
    """JSON Lines; lone surrogates and NaN as other people's programs write them."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(file: Path, rows: list[dict[str, Any]]) -> bytes:
    """The bytes of a file of rows, in the format of its suffix."""
    if file.suffix == ".parquet":
        write_table(file, rows)
        return file.read_bytes()
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return file.read_bytes()
    return json.dumps(rows).encode() if file.suffix == ".json" else lines(rows)
