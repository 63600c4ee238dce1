"""Where rows come from: files, folders of splits, what `datasets` saved to disk, and data sets of the hub.

`datasets` decides which files of a folder are of a split and a configuration (`subset`), as it does on the hub; the
rows of files are read by `core.row_files`, which says why.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from core.config import PreferenceSource
from core.errors import DataError
from core.row_files import COMPRESSIONS, SUFFIXES, format_of, numbered_rows

KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Kind of split -> what `datasets` takes for its name in the names of files and folders."""


@dataclass(slots=True)
class Malformed:
    """Rows that cannot be used, counted by reason, with the first three of each; and what was done to the others."""

    counts: Counter[str] = field(default_factory=Counter)
    """By reason."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> file and number of its first rows."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """Reason and place of each, for `rejected.jsonl`."""
    read: int = 0
    """Rows that could be used."""
    changed: Counter[str] = field(default_factory=Counter)
    """Rows that were used after a change, or left out for no fault of theirs, by what was done."""
    unread: set[str] = field(default_factory=set)
    """Columns with content that nothing was read from."""

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.rows.append({"reason": reason, "where": where})
        if len(rows := self.first.setdefault(reason, [])) < 3:
            rows.append(where)

    def lines(self) -> list[str]:
        return [f"{n} x {reason} ({', '.join(self.first[reason])})" for reason, n in self.counts.most_common()]


class Table(NamedTuple):
    name: str
    """Source of rows that name none."""
    file: str
    """For messages."""
    rows: Iterator[tuple[int, dict[str, Any]]]
    """With their numbers from 1."""


def source_tables(source: PreferenceSource, malformed: Malformed) -> Iterator[Table]:
    """The tables of a source: of its local path if there is one, else of the hub.

    Raises:
        DataError: nothing at `source.path`, or no such split or subset; names those there are.
    """
    path = source.path
    if path.exists():
        tables = local_tables(path, malformed, split=source.split, subset=source.subset)
    elif path.is_absolute() or len(path.parts) != 2:
        raise DataError(
            f"{path}: neither a {', '.join(SUFFIXES)} file, nor a folder of such files, nor a hub id (owner/name)"
        )
    else:
        tables = iter([Table(path.name, str(path), iter(enumerate(_of_hub(source), start=1)))])
    for table in tables:
        yield table._replace(rows=_of_split(table, source.split, malformed))


def local_tables(
    path: Path, malformed: Malformed, *, split: str | None = None, subset: str | None = None
) -> Iterator[Table]:
    """The tables of a file or a folder.

    Args:
        split: only what belongs to it; None: everything there is.
        subset: configuration of the folder, or one of its folders.
    """
    if path.is_file():
        _check_file(path, split, subset, malformed)
        yield _table(path, path.parent, malformed)
    elif _is_saved(path):
        yield from _saved(path, split, subset)
    elif subset is not None and _is_saved(path / subset):
        yield from _saved(path / subset, split, None)
    else:
        files = _every_file(path) if split is None else _files_of_split(path, split, subset, malformed)
        if not files:
            raise DataError(f"{path}: a folder without {', '.join(SUFFIXES)} files, compressed or not")
        for file in files:
            yield _table(file, path, malformed)


def _table(file: Path, folder: Path, malformed: Malformed) -> Table:
    name = str(file.relative_to(folder))
    rows = numbered_rows(file, lambda number, fault: malformed.add(fault, f"{name} row {number}"))
    return Table(_stem(file), name, rows)


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix in COMPRESSIONS else file.stem


def _every_file(folder: Path) -> list[Path]:
    about = ("dataset_info.json", "dataset_infos.json")
    return sorted(p for p in folder.rglob("*") if format_of(p) and p.name not in about)


def kinds_of(name: str) -> list[str]:
    """train, validation or test, for each of their words in a name (`valid1`, `test_prefs`, `hh_train`)."""
    words = re.findall(r"[a-z]+", name.lower())
    return [kind for word in words for kind, known in KINDS.items() if word in known]


def kind_of(split: str) -> str | None:
    """The kind of split that a name begins with."""
    first = re.match(r"[a-zA-Z]+", split)
    return next(iter(kinds_of(first[0])), None) if first else None


def _check_file(file: Path, split: str | None, subset: str | None, malformed: Malformed) -> None:
    """DataError for a single file that is not of the split: only its name can say of which it is."""
    if split is None:
        return
    if subset is not None:
        raise DataError(f"{file} is one file, which has no subset {subset!r}: leave subset out, or give its folder")
    named, begins = kinds_of(_stem(file)), kind_of(_stem(file))
    kind = kind_of(split)
    if _kind(file) == split or (kind in named and split in KINDS[str(kind)]):
        return
    if begins:
        name = begins if begins != kind else _kind(file)  # train_prefs is another split than train_sft
        raise DataError(f"{file} is named as a split {name!r}, not {split!r}: set split to {name} to read it")
    if kind != "train" and not _rows_name_splits(file):
        raise DataError(f"{file} is one file, whose name says no split: leave split out, or give a folder of splits")
    if named:
        malformed.changed[f"file {file.name} read as split {split!r}"] += 1


def _rows_name_splits(file: Path) -> bool:
    """Whether the first row of a file has a column `split` that names one."""
    _, row = next(numbered_rows(file, lambda *_: None), (0, {}))
    return isinstance(row.get("split"), str) and kind_of(row["split"]) is not None


def _files_of_split(folder: Path, split: str, subset: str | None, malformed: Malformed) -> list[Path]:
    splits = _splits(folder, subset)
    files = splits.get(split)
    if files is None:  # a name that `datasets` knows no split by, as of train_prefs.parquet
        files = [file for of_split in splits.values() for file in of_split if _kind(file) == split]
    if not files and splits.keys() == {"train"}:
        files = [file for file in splits["train"] if format_of(file) and _rows_name_splits(file)]
    if not files:
        raise DataError(f"{folder}: no files of split {split!r}; there are {', '.join(sorted(splits))}")
    groups: dict[Path, set[str]] = {}
    for file in files:
        groups.setdefault(file.parent, set()).add(_kind(file))
    for kinds in groups.values():  # train_prefs and train_sft are not one split
        if len(kinds) > 1 and all(kind_of(kind) for kind in kinds):
            raise DataError(f"{folder}: split {split!r} is {', '.join(sorted(kinds))}: set split to one of them")
    for file in files:
        if format_of(file) is None:
            raise DataError(f"{file}: neither a {', '.join(SUFFIXES)} file nor one of these compressed")
    if subset is None:
        known = {file for of_split in splits.values() for file in of_split}
        for file in set(_every_file(folder)) - known:
            malformed.changed[f"file {file.relative_to(folder)} not read, as it is of no split"] += 1
    return sorted(files)


def _kind(file: Path) -> str:
    """The name of a file without the number of its shard."""
    return re.sub(r"([-_.]\d+)?([-_.]of[-_.]\d+)?$", "", _stem(file))


def _splits(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    """Split -> files, as `datasets` resolves a folder: by its README.md, its folders or the names of its files."""
    from datasets import load_dataset_builder

    try:
        where: dict[str, str] = {}
        if subset is not None and (folder / subset).is_dir() and not _has_configuration(folder, subset):
            where = {"data_dir": subset}
        elif subset is not None:
            where = {"name": subset}
        base = os.path.realpath(folder)  # as `datasets` does; files in it may be links, as in the cache of the hub
        builder = load_dataset_builder(base, **where)
    except Exception as error:  # of any kind that `datasets` raises: its message needs the folder
        raise DataError(f"{folder}" + (f", subset {subset!r}" if subset else "") + f": {error}") from None
    found = builder.config.data_files or {}
    return {str(split): [folder / os.path.relpath(file, base) for file in files] for split, files in found.items()}


def _has_configuration(folder: Path, subset: str) -> bool:
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(str(folder), name=subset)
    except ValueError:
        return False
    return True


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved(folder: Path, split: str | None, subset: str | None) -> Iterator[Table]:
    """Tables of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import Dataset, load_from_disk

    if subset is not None:
        raise DataError(f"{folder} was saved by save_to_disk, which keeps no subset {subset!r}: leave subset out")
    loaded = load_from_disk(str(folder))
    if isinstance(loaded, Dataset):
        own = str(loaded.split) if loaded.split is not None else "train"
        loaded = {own: loaded}
    if split is not None and split not in loaded:
        raise DataError(f"{folder}: no split {split!r}; there are {', '.join(sorted(loaded))}")
    for name in [split] if split is not None else loaded:
        yield Table(folder.name, f"{folder.name}/{name}", iter(enumerate(loaded[name], start=1)))


def _of_hub(source: PreferenceSource) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    chosen = {"split": source.split, "revision": source.revision}
    try:
        try:
            return load_dataset(str(source.path), source.subset, **chosen)
        except ValueError as error:
            if source.subset is None or "BuilderConfig" not in str(error):
                raise
            return load_dataset(str(source.path), data_dir=source.subset, **chosen)  # as HelpSteer2's `preference`
    except Exception as error:  # of any kind that the hub client raises: its message needs the option
        raise DataError(
            f"{source.path}: no such file or folder, and the hub gives no split {source.split!r} of it: {error}"
        ) from None


def _of_split(table: Table, split: str, malformed: Malformed) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows without those whose own column `split` names another one, as in HelpSteer2-preference."""
    for number, row in table.rows:
        own = row.get("split")
        if isinstance(own, str) and not _same_split(own, split):
            malformed.changed[f"row of split {own!r} not read"] += 1
        else:
            yield number, row


def _same_split(own: str, wanted: str) -> bool:
    """Whether a row of the split `own` is of `wanted`, which may be written as for the hub (`train[:1000]`, `a+b`)."""
    kind = kind_of(own)
    names = [part.partition("[")[0] for part in wanted.split("+")]
    if kind is None or own in names:
        return True
    bare = KINDS[kind]
    return any(kind_of(name) == kind and (name in bare or own in bare) for name in names)
