"""Every shipped configuration runs: its twin goes through all stages on a tiny model. `make twins`.

With RLHF_TWINS_TABLE=FILE the outcomes are written there as a table.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from core.config.load import load
from tests.builders.processes import GRM, ROOT
from tests.builders.shipped import twin_rows, twins
from tests.builders.shipped.twins import AXES, CPU, SIZES, TWINS, Twin, allowed, get

PAGE = ROOT / "docs" / "twins.md"
TABLE = os.environ.get("RLHF_TWINS_TABLE")
WELL, FAILED, NOT_YET = "ran to its end", "FAILED", "not run yet"
HEADING = """\
# Twins of the shipped configurations

What a configuration says is tried before it is shipped. Most of those in `configs/` need a hub or GPUs, so each has a
twin, which is run in its place: the same files, with other paths and smaller sizes, on a tiny random model of the same
architecture with the same kind of tokenizer and chat template, and on rows of the same layout. What a twin overrides
is a fixed list of keys in `tests/builders/shipped/twins.py`, which a test checks. It shows that every option fits the
others and every stage reaches its end, and nothing about memory, speed or results at full size.

`make twins` runs them and writes this page. A new configuration is not shipped before its twin has run; those that are
"not run yet" are older than twins are.

| files | model | commands of `grm` | outcome |
| --- | --- | --- | --- |
"""


def run(twin: Twin, tokenizer: Path, folder: Path) -> None:
    """All commands of a twin, each of them well; a failed test with the end of the output of one that is not."""
    found = twins.overrides(twin, twins.paths_of(twin, tokenizer, folder))
    for command in twin.commands:
        if command == "rm-eval":
            cfg = load(twin.paths, twins.words(found))
            words = [*(str(cfg.run_dir / "rm" / name) for name in cfg.rm.variants),
                     *twin_rows.evaluation_sets(folder), "--bootstrap", "100"]  # fmt: skip
        else:
            words = [part for file in twin.paths for part in ("--config", str(file))] + twins.words(found)
        done = subprocess.run([*GRM, command, *words], cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-5000:]}"


@pytest.mark.parametrize(
    "twin",
    [pytest.param(t, id=t.name, marks=pytest.mark.e2e if t.fast else pytest.mark.models) for t in TWINS],
)
def test_a_shipped_configuration_runs(twin, tokenizer_path, tmp_path):
    outcome = FAILED
    try:
        run(twin, tokenizer_path, tmp_path)
        outcome = WELL
    finally:
        if TABLE:
            add_to_table(Path(TABLE), twin, outcome)


def row(twin: Twin, outcome: str) -> str:
    model = " and ".join(dict.fromkeys(filter(None, (twin.policy, twin.base))))
    gold = f", gold: {twin.gold[1]} ({twin.gold[0]})" if twin.gold else ""
    files = ", ".join(f"`configs/{file}`" for file in twin.files)
    return f"| {files} | {model}{gold} | {', '.join(twin.commands)} | {outcome} |"


def add_to_table(page: Path, twin: Twin, outcome: str) -> None:
    """Add or replace a row, so that twins can be run one by one; rows of twins that are no more are left out."""
    before = page.read_text() if page.is_file() else ""
    known = {t.name: said for t in TWINS for said in (WELL, FAILED) if row(t, said) in before} | {twin.name: outcome}
    lines = [row(t, known.get(t.name, NOT_YET)) for t in TWINS]
    lines += [f"| `configs/{file}` | as it is | {', '.join(twins.MAIN)} | run by `{test}` |"
              for file, test in twins.RUN_AS_THEY_ARE.items()]  # fmt: skip
    page.write_text(HEADING + "\n".join(lines) + "\n")


def test_no_configuration_is_without_a_twin_that_ran():
    covered = {file for twin in TWINS for file in twin.files} | set(twins.RUN_AS_THEY_ARE)
    assert covered == set(twins.shipped())
    assert len({twin.name for twin in TWINS}) == len(TWINS)
    page = PAGE.read_text()
    for twin in TWINS:
        older = not any(file.startswith("paper/") for file in twin.files)  # than twins, and run by hand before
        assert row(twin, WELL) in page or (older and row(twin, NOT_YET) in page), f"run {twin.name}, or drop it"
    assert FAILED not in page and all((ROOT / test).is_file() for test in twins.RUN_AS_THEY_ARE.values())


@pytest.mark.parametrize("twin", TWINS, ids=lambda t: t.name)
def test_a_twin_differs_in_paths_and_sizes_alone(twin):
    cfg, paths = load(twin.paths), dict.fromkeys(("run.dir", "policy.path", "rm.base.path"), "x")
    if twin.gold:
        assert cfg.gold.kind == "hub"
        paths["gold.path"] = "x"
    if twin.sources:
        paths |= {f"preferences.sources.{name}.path": "x" for name in cfg.preferences.sources or ["human"]}
    found = twins.overrides(twin, paths)
    assert all(allowed(key) for key in found), found
    small = load(twin.paths, twins.words(found))
    for key in SIZES:
        before, after = get(cfg, key), get(small, key)
        assert before == after or before in (None, "auto") or after < before, key
    for key in AXES:
        before, after = get(cfg, key), get(small, key)
        assert key == "study.pairs" or set(after) <= set(before) and bool(after) == bool(before), key
    changed = [*SIZES, *AXES, *CPU, *paths] + ([] if cfg.preferences.sources else ["preferences.sources"])
    plain, full = small.model_dump(mode="json"), cfg.model_dump(mode="json")
    for key in changed:
        _forget(plain, key), _forget(full, key)
    assert plain == full


def _forget(tree: dict, key: str) -> None:
    """Take the value at a dotted key out of a dumped configuration."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.get(section) or {}
    tree.pop(last, None)
