"""Work that the processes of a stage divide: tables that are made shard by shard.

A shard is a file of its own until the table is whole. Which process makes it follows from its number alone, and so do
its random draws. So a table does not depend on the number of processes, and a stage that was killed goes on with any
number of them. The processes have no process group: vLLM and models work in each as if it were alone, and what one
waits for is a file.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.files import check_part, concatenate_tables
from core.parts import write_part
from core.ranks import place

LOOK_SECONDS = 0.2
"""Between two looks for the files of other processes."""


@dataclass(frozen=True)
class Share:
    """This process's part of the work."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        """As `grm` or torchrun started it."""
        return cls(*place())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, count: int) -> range:
        """Numbers of this process's shards, of `count` in all."""
        return range(self.rank, count, self.ranks)

    def missing(self, table: Path, count: int) -> list[int]:
        """Numbers of this process's shards that are not made yet; none where the table is whole.

        Raises:
            ArtefactError: one that is made is damaged. It is found here, before any other is made or a model is loaded.
        """
        if table.exists():
            return []
        made = [number for number in self.of(count) if shard_file(table, number).exists()]
        for number in made:
            check_part(shard_file(table, number))
        return [number for number in self.of(count) if number not in made]

    def make_whole(self, table: Path, count: int, *, title: str) -> None:
        """Put the shards of all processes together, once they are there; the first process alone does so.

        The shards stay until `remove_shards`, since other processes may still read theirs.

        Args:
            title: of the progress bar, which is there while other processes still work.
        """
        if table.exists() or not self.is_first:
            return
        files = [shard_file(table, number) for number in range(count)]
        self.wait_for(files, title=title)
        write_part(table, lambda file: concatenate_tables(files, file))

    def wait_for(self, files: Iterable[Path], *, title: str) -> None:
        """Return when all of these are there. Whoever started the processes ends this one where another has failed."""
        all_files = list(files)
        missing = [file for file in all_files if not file.exists()]
        if not missing:
            return
        with self.bar(total=len(all_files), desc=f"{title}: all processes", unit="shard") as bar:
            while missing:
                bar.update(len(all_files) - len(missing) - bar.n)
                time.sleep(LOOK_SECONDS)
                missing = [file for file in missing if not file.exists()]
            bar.update(len(all_files) - bar.n)

    def bar(self, **options) -> tqdm:
        """A progress bar on this process's share, which the first process alone shows."""
        return tqdm(disable=not self.is_first, **options)

    def advise(self, option: str, prompts: int, shards: int, *, tables: int = 1) -> None:
        """Say where there are fewer shards than processes.

        Args:
            option: the prompts of a shard.
            shards: of one table.
        """
        if self.is_first and shards * tables < self.ranks:
            idle, better = self.ranks - shards * tables, max(1, prompts // -(-self.ranks // tables))
            print(
                f"{option}: {prompts} prompts are {shards * tables} shards, so {idle} of {self.ranks} processes have "
                f"nothing to do; {option}={better} gives work to all, and other samples",
                file=sys.stderr, flush=True,
            )  # fmt: skip


ALONE = Share()
"""One process that does all of the work."""


def remove_shards(tables: Iterable[Path]) -> None:
    """Remove the shards of whole tables, once no process reads them any more."""
    for table in tables:
        shutil.rmtree(shard_file(table, 0).parent, ignore_errors=True)


def shard_file(table: Path, number: int) -> Path:
    """Where a shard is until the table is whole."""
    return table.with_suffix("") / f"shard-{number:04d}.parquet"
