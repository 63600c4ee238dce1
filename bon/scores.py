"""Rewards and gold scores of a pool of samples, in tables that are joined by id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tqdm import tqdm

from bon.joining import Keys
from bon.pools import Pools, Scores, from_columns
from core.column_files import Kind, first_row, pick, read_columns
from core.config import Gold
from core.data.rows import ResponseRow, SampleRow, ScoreRow
from core.errors import ArtefactError
from core.files import digest, write_table
from core.generation.pool import SampledPool
from core.models.architecture import hidden_size, text_config
from core.models.layers import FrozenLayers, frozen_layers_of, shared_depth
from core.models.state_cache import FrozenStateCache
from core.parts import write_part
from core.shares import remove_shards, shard_file
from rm.checkpoints.folder import locate, read_config
from rm.checkpoints.layout import read_about
from rm.combine import proxy_reward
from rm.gold import GoldModel, load_gold, score_samples
from rm.model import RewardModel

Writer = Callable[[Path, list[SampleRow], list[float]], None]
"""Writes the scores of these samples to a file."""
CACHED_STATES = 4 << 30
"""Most bytes of host memory for the states of frozen layers that reward models share, of all processes together."""

SCORER = partial(RewardModel.from_pretrained, lm_head=False)
"""What makes a reward model that only scores of a folder or hub id."""


def score_proxies(folder: Path, pool: SampledPool, out: Path) -> list[str]:
    """Score this process's shards by each reward model that has not done so; returns the names of all of them."""
    names = reward_models(folder)
    score_models({name: (folder / name, out / "scores" / f"{name}.parquet") for name in names}, pool)
    return names


def score_models(
    models: Mapping[str, tuple[str | Path, Path]], pool: SampledPool, *, title: str = "bon",
    load: Callable[[str | Path], RewardModel] = SCORER,
) -> None:  # fmt: skip
    """Score this process's shards by reward models, where that is not done yet; `put_together` makes tables of them.

    Args:
        models: name -> a folder or hub id, and the table of its rewards.
        title: of progress bars.
        load: what makes a model of a folder or hub id.
    """
    waiting = [name for name, (_, file) in models.items() if pool.share.missing(file, pool.count)]
    rows = cast(list[ResponseRow], pool.mine)
    # Size by size: models of two sizes share only the frozen layers of the smaller one.
    size = {name: _size(models[name][0]) for name in waiting}
    for alike in (list(names) for _, names in groupby(sorted(waiting, key=size.__getitem__), key=size.__getitem__)):
        shared, loaded = None, {}
        if len(alike) > 1:
            loaded = {name: load(models[name][0]) for name in alike[:2]}
            room = CACHED_STATES // pool.share.ranks
            shared = SharedLayers.of(loaded[alike[0]], loaded[alike[1]], rows, room)
        for name in alike:
            model = loaded.pop(name, None) or load(models[name][0])
            cache = shared.cache if shared and shared.fits(model) else None
            score = lambda shard, bar: model.score_rows(shard, frozen=cache, progress=bar).tolist()  # noqa: B023, E731
            score_shards(models[name][1], pool, score, title=f"{title}: {name}")


def score_gold(cfg: Gold, table: Path, pool: SampledPool, *, write: Writer | None = None) -> GoldModel | None:
    """Score this process's shards by gold, where that is not done yet; the first process gets the model too.

    Args:
        write: as in `score_shards`.
    """
    if not pool.share.is_first and not pool.share.missing(table, pool.count):
        return None
    gold = load_gold(cfg)
    score_shards(table, pool, lambda shard, bar: score_samples(gold, shard, bar).tolist(), title="gold", write=write)
    return gold


def score_shards(
    table: Path, pool: SampledPool, score: Callable[[list[ResponseRow], tqdm], list[float]], *, title: str,
    write: Writer | None = None,
) -> None:  # fmt: skip
    """Write the scores of this process's shards that have none yet, each to a file of its own.

    Shard by shard, so that no score depends on the number of processes: rows in other batches may be rounded otherwise.

    Args:
        score: scores of a shard, by a model that shows its progress on a bar.
        write: writes them; by default `write_scores`.
    """
    missing = pool.share.missing(table, pool.count)
    if not missing:
        return
    total = sum(len(pool.shards[number]) for number in missing)
    with pool.share.bar(total=total, desc=title, unit="resp") as bar:
        for number in missing:
            shard, before = pool.shards[number], bar.n
            scores = score(cast(list[ResponseRow], shard), bar)
            write_part(shard_file(table, number), lambda file: (write or write_scores)(file, shard, scores))  # noqa: B023
            bar.update(before + len(shard) - bar.n)  # equal responses are scored once


def put_together(tables: Iterable[Path], pool: SampledPool, *, title: str) -> None:
    """Make tables of the scores of all shards, and remove what only shards were: for the first process, at its end."""
    whole = list(tables)
    for table in whole:
        pool.share.make_whole(table, pool.count, title=f"{title}: {table.stem}")
    remove_shards([*whole, pool.table])


def _size(path: str | Path) -> tuple[str, int, int]:
    """Architecture, hidden size and layers: reward models in which these differ share no layers."""
    try:
        config = text_config(read_config(locate(path)))
    except ArtefactError:  # an adapter that leaves them to its base
        return str(path), 0, 0
    return config.model_type, config.hidden_size, config.num_hidden_layers


class SharedLayers:
    """The lowest layers that reward models of one base share, which are run once for all of them."""

    def __init__(self, model: RewardModel, layers: FrozenLayers):
        self.model, self.cache = model, FrozenStateCache(layers)

    @classmethod
    def of(
        cls, first: RewardModel, second: RewardModel, rows: Sequence[ResponseRow], room: float = CACHED_STATES
    ) -> SharedLayers | None:
        """None if they share no layers, if these cannot be run apart, or if the states would take more bytes than there
        is room for."""
        depth = shared_depth(first.lm.requires_grad_(False), second.lm.requires_grad_(False))
        if not depth or not first.shares_prompts:
            return None
        reader = first.reader
        tokens = sum(len(prompt) + len(response) for prompt, response in {reader.row(row) for row in rows})
        size = tokens * hidden_size(first.lm) * next(first.parameters()).element_size()
        layers = frozen_layers_of(first.lm, depth, first.lm) if size <= room else None
        return None if layers is None else cls(first, layers)

    def fits(self, model: RewardModel) -> bool:
        same = model.tokenizer.fingerprint == self.model.tokenizer.fingerprint
        return same and shared_depth(self.model.lm, model.lm.requires_grad_(False)) >= self.cache.layers.depth


def write_scores(path: Path, samples: list[SampleRow], scores: list[float]) -> None:
    """The table of the scores by one reward model or gold, in the order of the samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt_id": s["prompt_id"], "sample_id": s["sample_id"], "text_sha": digest(s["response"]), "score": x}
        for s, x in zip(samples, scores, strict=True)
    ]
    write_table(path, rows, ScoreRow)


def reward_models(rm_folder: Path) -> list[str]:
    """Names of the reward models in the folder of stage `rm`."""
    return sorted(p.parent.name for p in rm_folder.glob("*/reward_model.json"))


def read_pools(folder: Path, names: Sequence[str], second_gold: Path | None = None) -> Pools:
    """The pools in the folder of stage `bon`, with the scores of these reward models.

    Args:
        second_gold: a table of scores by another gold, if there is one.
    """
    files = {name: folder / "scores" / f"{name}.parquet" for name in ("gold", *names)}
    other = second_gold if second_gold and second_gold.is_file() else None
    return pools_of_files(folder / "samples.parquet", files.pop("gold"), files, other)


def pools_of_files(samples: Path, gold: Path, proxies: Mapping[str, Path], second_gold: Path | None = None) -> Pools:
    """Pools from a table of samples (`SampleRow`) and tables of their scores (`ScoreRow`), read column by column."""
    about = first_row(samples)
    scores = {name: _scores(file) for name, file in {"gold": gold, **proxies}.items()}
    second = _scores(second_gold) if second_gold else None
    wanted: dict[str, tuple[str, Kind]] = dict(IDS)
    others: dict[str, tuple[str, Kind]] = {
        "length": ("n_tokens", "number"), "logp": ("logp_sampler", "number"), "responses": ("response", "text")
    }  # fmt: skip
    wanted |= {name: (column, kind) for name, (column, kind) in others.items() if column in about}
    if "response" in about and any(s.texts is not None for s in (*scores.values(), second) if s):
        wanted["texts"] = ("response", "digest")  # so that scores of other texts under the same ids are refused
    found = read_columns(samples, wanted)
    keys = Keys(found.pop("prompt_id"), found.pop("sample_id"))
    prompts = None
    if "prompt" in about:
        first = np.unique(keys.prompts.codes, return_index=True)[1]
        chats = pick(samples, "prompt", first.tolist())
        prompts = {i: chat[-1]["content"] for i, chat in zip(keys.prompts.distinct, chats, strict=True)}
    return from_columns(keys, scores.pop("gold"), scores, second, prompts=prompts, **found)


IDS: dict[str, tuple[str, Kind]] = {"prompt_id": ("prompt_id", "name"), "sample_id": ("sample_id", "whole")}
"""Columns that name a sample."""


def _scores(file: Path) -> Scores:
    """A table of scores, with the digests of what was scored where it has them."""
    wanted: dict[str, tuple[str, Kind]] = {**IDS, "score": ("score", "number")}
    if first_row(file).get("text_sha") is not None:
        wanted["text_sha"] = ("text_sha", "hex")
    found = read_columns(file, wanted)
    return Scores(Keys(found["prompt_id"], found["sample_id"]), found["score"], found.get("text_sha"))


def optimised_rewards(reward_models: Path, pools: Pools, members: Sequence[str], rule: str | None) -> np.ndarray:
    """[P, N]: what PPO optimised, one reward model or members combined by a rule, on the pools.

    Args:
        reward_models: the folder of stage `rm`, where each member's mean and spread under the reference are known.
    """
    raw = torch.from_numpy(np.stack([pools.proxies[name].ravel() for name in members]))
    about = [read_about(reward_models / name) for name in members]
    return proxy_reward(raw, [(a["mean"], a["std"]) for a in about], rule).numpy().reshape(pools.gold.shape)
