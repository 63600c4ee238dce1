"""Pools of samples: `n` responses to each prompt, drawn in shards, so that a killed stage can resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from core import starting
from core.data.chat import ChatTokenizer
from core.data.rows import PromptRow, SampleRow
from core.data.streams import stream_seed
from core.files import read_table, write_table
from core.generation.local import Completion, Generator


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
) -> list[SampleRow]:
    """`n` responses to every prompt of `rows`: `len(rows) * n` rows, prompt by prompt.

    Each shard of `shard_prompts` prompts is written to `out/samples/shard-0000.parquet` and so on, and is read back
    if it exists already. Its seed depends on `seed`, `name` and its number alone, so a resumed pool equals an
    uninterrupted one. At the end the shards are merged into one table, `out/samples.parquet`.

    Args:
        make_generator: not called if all shards exist.
        seed: `cfg.run.seed`.
        name: of the random stream; the stages use their own name.
        temperature, top_p: as of `Generator.generate`.
    """
    folder, whole = out / "samples", out / "samples.parquet"
    if whole.exists():
        return read_table(whole, SampleRow)
    generator = None
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[SampleRow] = []
    with tqdm(total=len(rows), desc=f"{name}: {n} samples each", unit="prompt") as bar:
        for index, start in enumerate(range(0, len(rows), shard_prompts)):
            shard, path = rows[start : start + shard_prompts], folder / f"shard-{index:04d}.parquet"
            if not path.exists():
                generator = generator or make_generator()
                starting.working()
                prompts = [tokenizer.prompt_ids(row["prompt"]) for row in shard]
                groups = generator.generate(
                    prompts, n=n, seed=stream_seed(seed, name, index), temperature=temperature, top_p=top_p
                )
                drawn = [
                    _row(prompt, group[k], k, tokenizer) for prompt, group in zip(shard, groups, strict=True)
                    for k in range(n)
                ]  # fmt: skip
                write_table(path, drawn, SampleRow)
            samples += read_table(path, SampleRow)
            bar.update(len(shard))
    write_table(whole, samples, SampleRow)
    shutil.rmtree(folder)
    return samples


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
