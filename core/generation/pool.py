"""Pools of samples: `n` responses to each prompt, drawn in shards.

A stage that was killed goes on at the first shard that is missing, and several processes divide the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import starting, whereabouts
from core.data.chat import ChatTokenizer
from core.data.rows import PromptRow, SampleRow
from core.data.streams import stream_seed
from core.files import read_table, write_table
from core.generation.local import Completion, Generator
from core.parts import write_part
from core.shares import ALONE, Share, shard_file

Shards = Mapping[int, list[SampleRow]]
"""Number of a shard of a pool -> its samples, prompt by prompt."""


@dataclass(frozen=True)
class SampledPool:
    """A pool of samples on disk, of which this process has its share of the shards in memory."""

    table: Path
    """Of all samples; there once the first process has put the shards together."""
    count: int
    """Shards of all processes."""
    shards: Shards
    """Those of this process."""
    share: Share = ALONE

    @property
    def mine(self) -> list[SampleRow]:
        """The samples of this process's shards."""
        return [row for shard in self.shards.values() for row in shard]

    def whole(self) -> list[SampleRow]:
        """All samples, prompt by prompt."""
        return self.mine if self.share.ranks == 1 else read_table(self.table, SampleRow)


def sample_pool(
    make_generator: Callable[[], Generator],
    tokenizer: ChatTokenizer,
    rows: Sequence[PromptRow],
    n: int,
    *,
    out: Path,
    shard_prompts: int,
    seed: int,
    name: str,
    temperature: float | None = None,
    top_p: float = 1.0,
    share: Share = ALONE,
) -> SampledPool:
    """`n` responses to every prompt of `rows`, in the table `out/samples.parquet`: `len(rows) * n` rows.

    Each shard of `shard_prompts` prompts is written to `out/samples/shard-0000.parquet` and so on, and is read back
    if it exists already. Its seed depends on `seed`, `name` and its number alone, so a resumed pool equals an
    uninterrupted one, and one that several processes have drawn. The first process puts the shards together, and
    returns when the table is there. Whoever calls this removes the shards at its end (`core.shares.remove_shards`).

    Args:
        make_generator: not called if all shards of this process exist.
        seed: `cfg.run.seed`.
        name: of the random stream; the stages use their own name.
        temperature, top_p: as of `Generator.generate`.
        share: the process's part of the shards.
    """
    table, parts = out / "samples.parquet", prompt_shards(rows, shard_prompts)
    share.advise(f"{name}.shard_prompts", len(rows), len(parts))
    missing = share.missing(table, len(parts))
    if missing:
        whereabouts.enter("sample")
        generator = make_generator()
        shard_file(table, 0).parent.mkdir(parents=True, exist_ok=True)
        starting.working()
        total = sum(len(parts[number]) for number in missing)
        with share.bar(total=total, desc=f"{name}: {n} samples each", unit="prompt") as bar:
            for number in missing:
                prompts = [tokenizer.prompt_ids(row["prompt"]) for row in parts[number]]
                groups = generator.generate(
                    prompts, n=n, seed=stream_seed(seed, name, number), temperature=temperature, top_p=top_p
                )
                drawn = [
                    _row(prompt, group[k], k, tokenizer)
                    for prompt, group in zip(parts[number], groups, strict=True)
                    for k in range(n)
                ]
                write_part(shard_file(table, number), partial(write_table, rows=drawn, schema=SampleRow))
                bar.update(len(prompts))
        generator.close()  # its memory is that of the reward models that come next
    whereabouts.enter("score")
    share.make_whole(table, len(parts), title=name)
    mine = _read_shards(table, len(parts), shard_prompts * n, share)
    return SampledPool(table, len(parts), mine, share)


def prompt_shards(rows: Sequence[PromptRow], shard_prompts: int) -> list[Sequence[PromptRow]]:
    return [rows[start : start + shard_prompts] for start in range(0, len(rows), shard_prompts)]


def _read_shards(table: Path, count: int, rows: int, share: Share) -> Shards:
    """The shards of this process, from their files, or from the table where these were removed.

    Args:
        count: shards of all processes.
        rows: of a shard; the last one may have fewer.
    """
    mine = share.of(count)
    if all(shard_file(table, number).exists() for number in mine):
        return {number: read_table(shard_file(table, number), SampleRow) for number in mine}
    whole = read_table(table, SampleRow)
    return {number: whole[number * rows : (number + 1) * rows] for number in mine}


def _row(prompt: PromptRow, completion: Completion, sample_id: int, tokenizer: ChatTokenizer) -> SampleRow:
    return {
        "prompt_id": prompt["prompt_id"],
        "sample_id": sample_id,
        "split": prompt["split"],
        "prompt": prompt["prompt"],
        "response": completion.text,
        "token_ids": completion.token_ids,
        "n_tokens": len(completion.token_ids),
        "finished": completion.finished,
        "logp_sampler": float(sum(completion.logprobs)),
        "tokenizer": tokenizer.fingerprint,
    }
